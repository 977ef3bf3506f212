"""Every classifier with BatchNorm of torchvision, and timm's of each family: fused, it has the unfused network's gradients.

    python benchmarks/fuse_all.py [--only PATTERN] [--out FILE]

Each network is converted and takes one step on two random images in float64, unfused and fused, with the same random masks. Output
and every gradient have to agree to 1e-6 of their norm. A line a network: its name, the norms that were folded and kept, the largest
difference, seconds, and why norms were kept. With --out the lines go to a file too, and names that it has already are left out. At
the end a summary; exit code 1 if a network differs.

torchvision has fewer than 60 such classifiers that are not too large: its segmentation networks are taken as well. Of timm's four
families of each of its files are taken, a family being what a name is without its numbers and sizes. What is too large is skipped,
and said to be.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from bln_train.norm import BatchlessNorm2d, BatchlessStatistics, convert_batchnorm, fold_once, folded_layers, fuse
from bln_train.norm.fused.check import TOLERANCE, largest_difference

NUM_IMAGES = 2
FAMILIES_OF_A_FILE = 4
SIZES = (128, 224, 256, 299)  # the first that a network takes
MOST_PARAMETERS = {"torchvision": 150_000_000, "timm": 60_000_000}
_SIZE_WORDS = re.compile(
    r"(?<=_)(nano|pico|femto|atto|tiny|small|medium|base|large|xlarge|huge|giant|lite|xxs|xs|s|m|l|xl|t|b)(?=_|$)|\d+\w?"
)


class Result(NamedTuple):
    """What came of one network."""

    outcome: str
    """equal, differs, skipped or failed"""
    text: str


def torchvision_names() -> Iterator[str]:
    """Classifiers and segmentation networks."""
    from torchvision import models

    yield from models.list_models(module=models)
    yield from models.list_models(module=models.segmentation)


def timm_names() -> list[str]:
    """One name of each family, the shortest and first, of at most so many families of each file of timm's."""
    import timm

    found = []
    for module in timm.list_modules():
        families: dict[str, str] = {}
        for name in sorted(timm.list_models(module=module), key=lambda name: (len(name), name)):
            families.setdefault(_SIZE_WORDS.sub("", name), name)
        found += list(families.values())[:FAMILIES_OF_A_FILE]
    return sorted(found)


def build(name: str) -> nn.Module:
    """`torchvision:<name>` or `timm:<name>`, with ten classes and drawn weights."""
    library, _, own = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(own, pretrained=False, num_classes=10)
    from torchvision.models import get_model

    settings: dict[str, Any] = {"weights": None, "num_classes": 10}
    if own in ("googlenet", "inception_v3"):
        settings["init_weights"] = False
    if own.startswith(("fcn", "deeplab", "lraspp")):
        settings["weights_backbone"] = None
    return get_model(own, **settings)


def too_large(name: str) -> str:
    """Why a network is skipped, "" if it is not."""
    try:
        with torch.device("meta"):
            model = build(name)
    except Exception:  # some draw their weights, and cannot without memory
        model = build(name)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return "no BatchNorm"
    number = sum(parameter.numel() for parameter in model.parameters())
    most = MOST_PARAMETERS[name.partition(":")[0]]
    return f"{number / 1e6:.0f} M parameters, more than {most / 1e6:.0f} M" if number > most else ""


@torch.no_grad()
def give_statistics(model: nn.Module, x: Tensor) -> None:
    """Let BatchNorms take the images' statistics, so that activations have their size."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    torch.manual_seed(0)
    model.train()(x)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of one training step's forward and backward."""
    torch.manual_seed(1)  # of dropout, whose masks may be drawn by begin or by the forward
    statistics = BatchlessStatistics(model)
    statistics.begin(len(x))
    with fold_once(folded_layers(model)):
        outputs = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]
        generator = torch.Generator().manual_seed(2)
        draws = [torch.randn(out.shape, generator=generator) for out in outputs]
        loss = sum((out * draw).sum() for out, draw in zip(outputs, draws, strict=True))
        ((loss + statistics.nll()) / len(x)).backward()
    statistics.discard()
    found = {f"output {n}": out.detach() for n, out in enumerate(outputs)}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def on_images(model: nn.Module) -> Tensor:
    """The images, of the first size that the network takes."""
    for size in SIZES:
        x = torch.randn(NUM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(3))
        try:
            give_statistics(model, x)
        except (RuntimeError, AssertionError, ValueError, NotImplementedError):
            if size == SIZES[-1]:
                raise
        else:
            return x
    raise AssertionError


def compare(name: str) -> Result:
    """Convert, fuse and compare one network."""
    why = too_large(name)
    if why:
        return Result("skipped", why)
    start = time.perf_counter()
    model = build(name)
    x = on_images(model)
    convert_batchnorm(model)
    model.train()
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, BatchlessNorm2d) and module.correction is not None:
            module.correction.copy_(torch.randn(module.correction.shape, generator=generator) * 0.1)
    wanted = step(model, x)
    report = fuse(model)
    difference, what = largest_difference(wanted, step(model, x))
    reasons = Counter(report.kept.values())
    text = (
        f"{x.shape[-1]:4d}px  folded {len(report.folded):3d}  kept {len(report.kept):3d}  largest difference {difference:.1e}"
        f"  {time.perf_counter() - start:5.1f} s"
    )
    if not difference <= TOLERANCE:
        text += f"  in {what}"
    for reason, number in reasons.most_common():
        text += f"\n    {number} kept: {reason}"
    return Result("equal" if difference <= TOLERANCE else "differs", text)


def main() -> int:
    """Compare the networks that the command line names; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression that names have to contain, as in timm:tf_")
    parser.add_argument("--out", type=Path, help="a file that lines are added to; what it has already is left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    names = [*(f"torchvision:{name}" for name in torchvision_names()), *(f"timm:{name}" for name in timm_names())]
    names = [name for name in names if re.search(arguments.only, name)]
    earlier = arguments.out.read_text() if arguments.out and arguments.out.exists() else ""
    done = {line.split()[1]: line.split()[0] for line in earlier.splitlines() if ":" in line[8:] and line[0] != " "}
    write = writer(arguments.out)
    for name in names:
        if name in done:
            continue
        try:
            result = compare(name)
        except Exception as error:
            result = Result("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        done[name] = result.outcome
        if result.text != "no BatchNorm":
            write(f"{result.outcome:8s} {name:50s} {result.text}")
        gc.collect()
    for library in ("torchvision", "timm"):
        count = Counter(outcome for name, outcome in done.items() if name.startswith(f"{library}:") and name in names)
        write(f"{library}: {', '.join(f'{number} {outcome}' for outcome, number in sorted(count.items()))}")
    return int(any(done[name] in ("differs", "failed") for name in names))


def writer(path: Path | None) -> Callable[[str], None]:
    """Prints lines, and adds them to a file."""

    def write(line: str) -> None:
        print(line, flush=True)
        if path is not None:
            with path.open("a") as file:
                file.write(line + "\n")

    return write


if __name__ == "__main__":
    sys.exit(main())
