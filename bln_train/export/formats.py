"""The file formats of an export: each writes a network with metadata and opens what it wrote as other programs would."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bln_train.errors import BlnError, ExportError, UsageError, first_line

METADATA_FILE = "bln_train.json"
"""Name of the metadata among a .pt2's extra files."""
IMAGES, LOGITS, BATCH = "images", "logits", "batch"

Runner = Callable[[Tensor], Tensor]
"""From images, (N, 3, S, S), to logits, (N, num_classes)."""


def require(suffix: str, packages: tuple[str, ...]) -> None:
    """Raise UsageError if packages that a format needs are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{suffix} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            "Install what exporting needs: pip install 'bln-train[export]'",
        )


@contextmanager
def _explained(what: str, hint: str = "") -> Iterator[None]:
    """Turn whatever the libraries inside raise into an ExportError; a full disk stays an OSError where it is one."""
    try:
        yield
    except (BlnError, OSError):
        raise
    except Exception as error:
        raise ExportError(f"{what}: {first_line(error)}", hint) from error


def write_onnx(
    network: nn.Module, file: Path, *, shape: tuple[int, ...], batch: int | None, metadata: dict[str, str]
) -> None:
    """Write an ONNX model that passes ONNX's checker; arguments and errors of `write_pt2`."""
    import onnx

    program = _program(network, shape, batch)
    dynamic = None if batch else {IMAGES: {0: BATCH}}  # names the axis in the file
    with _explained("the network cannot be written as ONNX"):
        model = torch.onnx.export(program, dynamo=True, dynamic_shapes=dynamic, input_names=[IMAGES], output_names=[LOGITS],
                                  verbose=False)  # fmt: skip
        assert model is not None
        model.model.metadata_props.update(metadata)
        model.save(file, external_data=False)
        onnx.checker.check_model(file, full_check=True)


def open_onnx(file: Path) -> Runner:
    """Open an ONNX model with onnxruntime, on the CPU; raises ExportError where it cannot."""
    import onnxruntime

    problem = "onnxruntime cannot run the file"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with _explained(problem):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        with _explained(problem):
            return torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])

    return run


def write_pt2(
    network: nn.Module, file: Path, *, shape: tuple[int, ...], batch: int | None, metadata: dict[str, str]
) -> None:
    """Write a torch.export program, with the metadata as JSON in an extra file.

    Args:
        network: takes one tensor called `images`.
        shape: of one image.
        batch: images at once; None for any number.

    Raises:
        ExportError: the network's forward cannot be captured or written.
    """
    program = _program(network, shape, batch)
    with _explained("torch.export cannot write the network"):
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})


def open_pt2(file: Path) -> Runner:
    """Open a torch.export program; raises ExportError where it cannot."""
    with _explained("torch.export cannot open the file"):
        return torch.export.load(file).module()


def write_safetensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write tensors by name, with the metadata in the header."""
    from safetensors.torch import save_file

    with _explained("safetensors cannot write the weights"):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def _program(network: nn.Module, shape: tuple[int, ...], batch: int | None) -> torch.export.ExportedProgram:
    example = torch.zeros(batch or 2, *shape)  # of 1 image the batch would be taken for a constant
    dynamic: Any = None if batch else {IMAGES: {0: torch.export.Dim(BATCH)}}
    hint = "" if batch else "If the number of images is what it needs to know, try --batch 1."
    with _explained("the network's forward cannot be captured", hint):
        return torch.export.export(network, (example,), dynamic_shapes=dynamic)
