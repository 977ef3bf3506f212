"""What this machine has and can do, with advice where something is missing; it changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bln_train.build.experiment import build_experiment
from bln_train.data.datasets import default_root
from bln_train.norm.kernels.backend import why_not_triton
from bln_train.norm.kernels.library import why_not_compiled
from bln_train.recipe.recipe import Recipe
from bln_train.system.machine import device_name
from bln_train.system.units import format_bytes
from bln_train.train.batches import EffectiveBatch

LARGEST_DIFFERENCE = 1e-12
"""Of float64 gradients of two splits, relative to each gradient's largest entry: law 1."""
_LITTLE_DISK, _NO_DISK = 2**30, 100 * 2**20
_IMAGES, _MICRO_BATCHES = 12, (1, 5)
_SELF_TEST = {
    "data": {"name": "shapes", "num_train": 20, "num_test": 10},
    "model": {"name": "resnet8"},
    "norm": {"name": "batchless", "init_images": 4, "probe_images": 4},
    "train": {"epochs": 1, "effective_batch_size": _IMAGES, "micro_batch_size": _IMAGES, "precision": "fp64"},
    "optimizer": {"name": "sgd", "lr": 0.1},
}
# The child makes its CUDA context and one tensor, says how much its allocator took, and waits to be let go.
_CHILD = (
    "import sys, torch; torch.zeros(1, device='cuda:{index}'); torch.cuda.synchronize();"
    "print(torch.cuda.memory_reserved({index}), flush=True); sys.stdin.read()"
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    value: str
    """What was found; `-` where it could not be measured."""
    status: Literal["ok", "warning", "problem"] = "ok"
    advice: str = ""
    """What to do about it."""


def examine() -> Iterator[Finding]:
    """Look at everything, the quick things first."""
    yield from _versions()
    yield from _devices()
    yield from _data()
    yield from _places()
    for device in _torch_devices():
        yield _law_1(device)


def _torch_devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", n) for n in range(torch.cuda.device_count()))]


def _versions() -> Iterator[Finding]:
    import torchvision

    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("torch", torch.__version__)
    yield Finding("torchvision", torchvision.__version__)
    driver = _driver()
    if driver and not torch.cuda.is_available():
        yield Finding(
            "cuda",
            f"{torch.version.cuda or 'not in this PyTorch'}, driver {driver}, but no device",
            "warning",
            "Install a PyTorch with CUDA that the driver supports (pytorch.org/get-started), or run on the CPU as it is.",
        )
    else:
        yield Finding("cuda", f"{torch.version.cuda}, driver {driver or '-'}" if torch.cuda.is_available() else "-")
    why = why_not_compiled()
    if why:
        advice = "Install a C compiler (gcc or clang): CPU training is slower without, and the same up to rounding."
        yield Finding("compiled kernels", why, "warning", advice)
    else:
        yield Finding("compiled kernels", "yes")
    for device in _torch_devices()[1:]:
        why = why_not_triton(device)
        if why:
            advice = "Training there runs PyTorch's operators: slower, and the same up to rounding. A C compiler may be missing."
            yield Finding(f"Triton kernels on {device}", why, "warning", advice)
        else:
            yield Finding(f"Triton kernels on {device}", "yes")
    system = platform.platform()
    if "microsoft" in platform.release().lower() or sys.platform == "win32":
        yield Finding(
            "system",
            system,
            "warning",
            "Under Windows and WSL the driver may move GPU memory to the host's instead of reporting that it is full: training "
            "slows down many times. In the NVIDIA control panel set CUDA - Sysmem Fallback Policy to `Prefer No Sysmem Fallback`.",
        )
    else:
        yield Finding("system", system)


def _driver() -> str:
    """Version of the NVIDIA driver, "" where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.split()), "")


def _devices() -> Iterator[Finding]:
    threads, cores = torch.get_num_threads(), _num_cores()
    advice = "Set runtime.num_threads or OMP_NUM_THREADS to the number of cores." if threads > cores else ""
    memory = format_bytes(_host_bytes())
    name = device_name(torch.device("cpu"))
    yield Finding("cpu", f"{name} of {cores} cores, {memory} of memory", "warning" if advice else "ok", advice)
    for n in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(n)
        advice = "Another process holds most of it: see nvidia-smi." if free < total / 2 else ""
        value = f"{torch.cuda.get_device_name(n)}, {format_bytes(free)} free of {format_bytes(total)}"
        yield Finding(f"cuda:{n}", value, "warning" if advice else "ok", advice)
        yield Finding(f"cuda:{n} context", format_bytes(_context_bytes(n)))
    if not torch.cuda.is_available():
        yield Finding("cuda context", "-")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _context_bytes(index: int) -> int | None:
    """What a process takes from the device beside its tensors: the fall of free memory while another one has a context."""
    before = torch.cuda.mem_get_info(index)[0]
    command = [sys.executable, "-c", _CHILD.format(index=index)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        reserved = child.stdout.readline()
        during = torch.cuda.mem_get_info(index)[0]
        child.stdin.close()
    taken = before - during - int(reserved or 0)
    return taken if reserved and taken > 0 else None


def _data() -> Iterator[Finding]:
    root = default_root()
    found = []
    try:
        for name, extracted, archive in (
            ("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
            ("cifar100", "cifar-100-python", "cifar-100-python.tar.gz"),
        ):
            places = (root / name / "train", root / extracted, root / archive)
            found += [f"{name} ({place.name})" for place in places if place.exists()][:1]
        if (root / "train").is_dir():
            found.append("an image folder")
    except OSError as error:
        yield Finding(
            "data", f"{root}: {error.strerror}", "problem", "Change its permissions, or name another $BLN_DATA."
        )
        return
    advice = (
        "" if found else "CIFAR is downloaded there by the first run that names it; data.name=shapes needs no files."
    )
    yield Finding("data", f"{root}: {', '.join(found) or 'nothing yet'}", advice=advice)


def _places() -> Iterator[Finding]:
    """Whether runs and caches can be written, and how much room there is."""
    runs, cache = Path("runs"), default_root()
    cannot_run = "Change to a folder that can be written, or give run --out another one."
    cannot_cache = "Name another place with $BLN_DATA; nothing can be downloaded to this one."
    for name, place, status, advice in (
        ("runs folder", runs, "problem", cannot_run),
        ("cache folder", cache, "warning", cannot_cache),
    ):
        existing = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            level: Literal["warning", "problem"] = "problem" if status == "problem" else "warning"
            yield Finding(name, f"{place.absolute()}: {error.strerror}", level, advice)
            continue
        free = shutil.disk_usage(existing).free
        room = f"{place.absolute()}: can be written, {format_bytes(free)} free"
        if free < _LITTLE_DISK:
            level = "problem" if free < _NO_DISK and status == "problem" else "warning"
            yield Finding(
                name, room, level, "Free some disk space: a checkpoint takes twice the network's size and more."
            )
        else:
            yield Finding(name, room)


def _law_1(device: torch.device) -> Finding:
    """Gradients of 12 images, in float64, whole against one by one and in fives."""
    name = f"law 1 on {device}"
    try:
        difference = largest_difference(str(device))
    except Exception as error:  # whatever a broken driver or library raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding(
            name,
            f"failed: {reason}",
            "problem",
            "Training cannot run there; BLN_DEBUG=1 bln-train run quickstart shows why.",
        )
    value = f"micro-batches of 1 and 5 against {_IMAGES}: gradients differ by {difference:.1e}"
    if difference <= LARGEST_DIFFERENCE:
        return Finding(name, value)
    advice = "Results there depend on the micro-batch: try runtime.compiled=false, another PyTorch, or another device."
    return Finding(name, f"{value}, above {LARGEST_DIFFERENCE:g}", "problem", advice)


def largest_difference(device: str) -> float:
    """Largest difference of a small network's gradients between splits, relative to each gradient's largest entry."""
    recipe = Recipe.model_validate({**_SELF_TEST, "runtime": {"device": device}})
    experiment = build_experiment(recipe)
    step, images = experiment.trainer.accumulation, experiment.data.train

    def gradients(micro_batch_size: int) -> list[torch.Tensor]:
        step.micro_batch_size = micro_batch_size
        step.model.train()
        step.accumulate(EffectiveBatch(images, torch.arange(_IMAGES), 0, 0))
        found = [p.grad.clone() for p in step.model.parameters() if p.grad is not None]
        step.give_up()
        return found

    whole = gradients(_IMAGES)
    return max(
        float((one - other).abs().max() / one.abs().max())
        for size in _MICRO_BATCHES
        for one, other in zip(whole, gradients(size), strict=True)
    )
