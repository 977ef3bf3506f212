"""Export a trained network for use elsewhere: norms merged, written as ONNX, torch.export or safetensors, and compared first."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bln_train.build.data import build_preprocess, input_spec, load
from bln_train.build.experiment import build_network
from bln_train.build.trained_run import read_checkpoint
from bln_train.data.augment import Preprocess
from bln_train.errors import BlnError, CheckpointError, DataError, ExportError, UsageError, first_line
from bln_train.export.formats import Runner, open_onnx, open_pt2, require, write_onnx, write_pt2, write_safetensors
from bln_train.norm.convert.merge import MergeReport, merge_norms
from bln_train.recipe.load import dump_recipe, parse_recipe
from bln_train.recipe.recipe import Recipe
from bln_train.records import InputSpec
from bln_train.system import machine

TOLERANCE = 1e-4
"""Largest difference between the file's outputs and the run's, relative to the run's largest output; or, where that is more,"""
ROUNDINGS = 4
"""as many times the run's own difference from its network in float64: what rounding does to a deep, badly scaled network."""
NUM_COMPARED = 64
_FEW = 16  # images of a batch where the file takes any number

_PACKAGES: dict[str, tuple[str, ...]] = {
    ".onnx": ("onnx", "onnxruntime", "onnxscript"),
    ".pt2": (),
    ".safetensors": ("safetensors",),
}


class ImageClassifier(nn.Module):
    """A network with its normalisation: images (N, 3, S, S) float32 in [0, 1], RGB, to logits (N, num_classes).

    out = network((images - mean) / std)

    The normalisation is not folded into the first convolution: what that pads with is 0 after it, not before.

    Args:
        network: takes normalised images of that size.
        spec: their size, mean and standard deviation.
    """

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network, self.image_size = network, spec.image_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.network((images - self.mean) / self.std)


@dataclass(frozen=True)
class _Trained:
    """A checkpoint, opened."""

    recipe: Recipe
    recipe_text: str
    step: int
    network: nn.Module
    """In eval mode, as the run evaluates it."""
    spec: InputSpec
    images: Tensor
    """(n, 3, S, S) uint8."""
    are_real: bool
    """Whether those are the run's test images, not random ones."""


def export_run(
    source: Path,
    out: Path,
    *,
    batch: int | None = None,
    force: bool = False,
    notify: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the network of a run folder or checkpoint to `out`, whose suffix says how: .onnx, .pt2 or .safetensors.

    The file appears only after its outputs on the run's test images (random ones where those are not there) were compared
    with the run's own; it takes the images in [0, 1] of `ImageClassifier`, and its metadata say what it is (`_metadata`).

    Args:
        source: a run folder, or a checkpoint file.
        out: the file to write, in a folder that is there.
        batch: images at once; None for any number. .safetensors has none.
        force: replace an existing `out`.
        notify: see `trained_run.read_checkpoint`.

    Returns: what was written and how it compares, JSON-ready.

    Raises:
        UsageError: the suffix is unknown, a package is missing, or there is a batch where none belongs.
        CheckpointError: there is no checkpoint, or it is damaged or of another network.
        DataError: the checkpoint is one of before they kept their normalisation, and the data are missing.
        ExportError: `out` exists or cannot be written, the network cannot be exported, or the file computes something else.
    """
    _check_request(out, batch, force)
    trained = _open(source, notify)
    network = copy.deepcopy(trained.network).double()  # merged exactly, rounded once
    norms = merge_norms(network)
    classifier = ImageClassifier(network.float(), trained.spec).eval()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder, torch.no_grad():
            file = Path(folder) / out.name
            compared = _compare(trained, _write(classifier, file, batch, _metadata(trained, norms, batch)), batch)
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            num_bytes = file.stat().st_size
            os.replace(file, out)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}; nothing was written") from error
    return {
        "file": str(out),
        "bytes": num_bytes,
        "model": trained.recipe.model.name,
        "norm": trained.recipe.norm.name,
        "step": trained.step,
        "batch": None if out.suffix == ".safetensors" else batch or "dynamic",
        "norms": asdict(norms),
        **compared,
    }


def load_merged(file: Path) -> ImageClassifier:
    """The network of an exported .safetensors `file`, in eval mode; executes nothing from it.

    Raises:
        CheckpointError: the file is missing, damaged, or not an export of bln-train.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dict
        recipe = parse_recipe(metadata["recipe"], origin=f"{file} (recipe)")
        about = json.loads(metadata["input"])
        spec = _spec({**about, "image_size": about["shape"][-1], "class_names": json.loads(metadata["class_names"])})
        network = _network(recipe, spec)
        merge_norms(network.float())  # the same layers, whatever their values
        network.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, IndexError, ValueError, RuntimeError, BlnError) as error:
        raise CheckpointError(f"{file} is damaged or not an export of bln-train: {first_line(error)}") from error
    return ImageClassifier(network, spec).eval()


def _check_request(out: Path, batch: int | None, force: bool) -> None:
    """Refuse, before anything is computed, what cannot be written."""
    if out.suffix not in _PACKAGES:
        raise UsageError(
            f"{out}: the suffix says the format, and '{out.suffix}' is none", f"One of: {', '.join(_PACKAGES)}."
        )
    if out.suffix == ".safetensors" and batch is not None:
        raise UsageError("a .safetensors file holds weights, which have no batch", "Leave out --batch.")
    require(out.suffix, _PACKAGES[out.suffix])
    if out.is_dir() or (out.exists() and not force):
        way_out = "Give another name." if out.is_dir() else "Give another name, or replace it with --force."
        raise ExportError(f"{out} exists; nothing was written", way_out)
    if not out.parent.is_dir():
        raise ExportError(f"there is no folder {out.parent}", "Create it, or give another -o.")


def _write(classifier: ImageClassifier, file: Path, batch: int | None, metadata: dict[str, str]) -> Runner:
    """Write the file and open it again."""
    if file.suffix == ".safetensors":
        write_safetensors(classifier.network.state_dict(), file, metadata)
        return load_merged(file)
    write, open_ = (write_onnx, open_onnx) if file.suffix == ".onnx" else (write_pt2, open_pt2)
    size = classifier.image_size
    write(classifier, file, shape=(3, size, size), batch=batch, metadata=metadata)
    return open_(file)


def _open(source: Path, notify: Callable[[str], None]) -> _Trained:
    """Read a checkpoint, on the CPU; its images are test images if they can be had without a download, else random."""
    recipe, state = read_checkpoint(source, notify=notify)
    if recipe.runtime.num_threads is not None:
        torch.set_num_threads(recipe.runtime.num_threads)
    model, stored = state.get("model"), state.get("input")
    if not isinstance(model, dict):
        raise CheckpointError(f"{source} holds no network")
    images, are_real = None, True
    if stored is None:
        data = load(recipe)
        spec, images = input_spec(data, build_preprocess(recipe, data)), data.test.images
    else:
        try:
            spec = _spec(stored)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source} carries a damaged input: {first_line(error)}") from error
        offline = recipe.data.model_copy(update={"download": False})
        try:
            images = load(recipe.model_copy(update={"data": offline})).test.images
        except DataError:
            images = None
    if images is None or images.shape[-1] != spec.image_size:  # the data have changed
        shape = (NUM_COMPARED, 3, spec.image_size, spec.image_size)
        images, are_real = (
            torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
            False,
        )
    network = _network(recipe, spec)
    try:
        network.load_state_dict(model)
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{source} does not fit its recipe: {error}") from error
    # Test images come class by class: those at equal distances show all of them.
    chosen = torch.linspace(0, len(images) - 1, min(NUM_COMPARED, len(images))).long()
    return _Trained(
        recipe, str(state["recipe"]), int(state.get("step", 0)), network.eval(), spec, images[chosen], are_real
    )


def _network(recipe: Recipe, spec: InputSpec) -> nn.Module:
    return build_network(
        recipe, num_classes=len(spec.class_names), image_size=spec.image_size, initialize=False
    )[0]  # fmt: skip


def _spec(stored: dict[str, Any]) -> InputSpec:
    """An InputSpec from plain containers; raises KeyError, TypeError or ValueError for anything else."""
    mean, std = (tuple(map(float, stored[key])) for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise ValueError(f"mean {mean} and std {std} are not those of three channels")
    return InputSpec(int(stored["image_size"]), mean, std, tuple(map(str, stored["class_names"])))


def _metadata(trained: _Trained, norms: MergeReport, batch: int | None) -> dict[str, str]:
    """What a file says about itself: strings, those of structure as JSON.

    `recipe_sha256` is that of the run folder's recipe.yaml; `recipe` is it without paths of this machine.
    """
    recipe, spec = trained.recipe.untrained(), trained.spec
    data = recipe.data.model_copy(update={"root": None if recipe.data.root is None else "."})
    size = spec.image_size
    return {
        "producer": f"bln-train {version('bln-train')}",
        "model": recipe.model.name,
        "norm": recipe.norm.name,
        "step": str(trained.step),
        "class_names": json.dumps(spec.class_names),
        "input": json.dumps({
            "name": "images", "shape": [batch or "batch", 3, size, size], "dtype": "float32", "range": [0, 1],
            "channels": "RGB", "mean": spec.mean, "std": spec.std, "then": "(images - mean) / std",
        }),
        "output": json.dumps({"name": "logits", "shape": [batch or "batch", len(spec.class_names)], "dtype": "float32"}),
        "norms": json.dumps(asdict(norms)),
        "recipe": dump_recipe(recipe.model_copy(update={"data": data})),
        "recipe_sha256": hashlib.sha256(trained.recipe_text.encode()).hexdigest(),
    }  # fmt: skip


# Comparison


def _compare(trained: _Trained, run: Runner, batch: int | None) -> dict[str, Any]:
    """How a file's outputs differ from those that the run's network evaluates to; raises ExportError if they do.

    Those are computed at the precision of the weights, also where training lowered that of activations.
    """
    spec = trained.spec
    preprocess = Preprocess(
        torch.tensor(spec.mean, dtype=torch.float64),
        torch.tensor(spec.std, dtype=torch.float64),
        dtype=machine.weight_dtype(trained.recipe.train.precision),
    )

    def outputs(network: nn.Module, dtype: torch.dtype) -> Tensor:
        parts = trained.images.split(_FEW)
        return torch.cat([network(preprocess.test(part).to(dtype)) for part in parts]).double()

    expected = outputs(trained.network, machine.weight_dtype(trained.recipe.train.precision))
    found = _outputs(run, trained.images / 255, batch).double()
    if not expected.isfinite().all():
        raise ExportError("the run's own outputs are not finite; nothing was written", "Did its training diverge?")
    if found.shape != expected.shape:
        raise ExportError(f"the file gives {tuple(found.shape)}, the run {tuple(expected.shape)}; nothing was written")
    largest = float((found - expected).abs().max())
    unit = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    relative, tolerance = largest / unit, TOLERANCE
    if relative > tolerance:
        exact = outputs(copy.deepcopy(trained.network).double(), torch.float64)
        tolerance = max(tolerance, ROUNDINGS * float((expected - exact).abs().max()) / unit)
    if not relative <= tolerance:
        raise ExportError(
            f"the file's outputs differ from the run's by up to {largest:.3g}, {relative:.3g} of the largest, over the "
            f"tolerance of {tolerance:.3g}; nothing was written"
        )
    agreement = float((found.argmax(1) == expected.argmax(1)).double().mean())
    return {
        "max_abs_difference": largest,
        "max_rel_difference": relative,
        "tolerance": tolerance,
        "compared_on": "test images" if trained.are_real else "random images",
        "num_compared": len(trained.images),
        "top1_agreement": agreement if trained.are_real else None,
    }


def _outputs(run: Runner, images: Tensor, batch: int | None) -> Tensor:
    """Outputs for all images: a single one and then more where any number is taken, else in batches, the last one filled up."""
    if batch is None:
        parts = [images[:1], *images[1:].split(_FEW)] if len(images) > 1 else [images]
    else:
        starts = range(0, len(images), batch)
        parts = [images[torch.arange(start, start + batch) % len(images)] for start in starts]
    return torch.cat([run(part) for part in parts])[: len(images)]
