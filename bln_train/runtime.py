"""The machine: device, precision, threads, and what to write down about it."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import AbstractContextManager, nullcontext

import torch

from bln_train.errors import UsageError
from bln_train.launch import launch
from bln_train.norm.compiled import use_compiled, uses_compiled

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:<index>` into a device; under torchrun each process has a GPU of its own.

    Raises:
        UsageError: CUDA is asked for and absent, or the index does not exist, or several processes would share a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"runtime.device is {name}, but PyTorch {torch.__version__} finds no CUDA device",
                "Check the driver with nvidia-smi, or use --device cpu.",
            )
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise UsageError(f"runtime.device is {name}, but there are only {count} CUDA devices (from cuda:0)")
        own = launch()
        if own.size > 1 and (":" in name or own.local_rank >= count):
            raise UsageError(
                f"process {own.local_rank} of this machine has no GPU of its own: runtime.device is {name}, "
                f"and there are {count} CUDA devices",
                "Use --device cuda and at most that many processes for each machine, or --device cpu.",
            )
        if own.size > 1:
            return torch.device("cuda", own.local_rank)
    return device


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        model = ""
    model = (model or platform.processor() or platform.machine()).strip()
    count = torch.get_num_threads()
    return f"{model} CPU, {count} thread{'s' * (count > 1)}"


def weight_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and statistics: float64 for fp64, otherwise float32 (autocast lowers activations only)."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context in which layers run at `precision`.

    Raises:
        UsageError: the device cannot compute at that precision.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("train.precision: tf32 needs CUDA", "Use fp32 on the CPU: --set train.precision=fp32")
    dtype = _AUTOCAST.get(precision)
    if dtype is None:
        return nullcontext()
    if dtype == torch.float16 and device.type != "cuda":
        raise UsageError("train.precision: fp16 needs CUDA", "Use bf16 or fp32 on the CPU: --set train.precision=bf16")
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UsageError(
            f"train.precision: {torch.cuda.get_device_name(device)} has no bf16",
            "Use fp16 or fp32: --set train.precision=fp16",
        )
    # Each weight is used once per forward: a cache of low-precision copies would only take memory.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def set_up(
    device: torch.device,
    *,
    num_threads: int | None,
    compiled: bool,
    deterministic: bool,
    cudnn_benchmark: bool,
    tf32: bool,
) -> None:
    """Process-wide switches, in one place."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    use_compiled(compiled)
    if device.type == "cpu":
        _keep_freed_memory()
    if deterministic:  # cuBLAS is deterministic only with a fixed workspace, which it reads when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # we write what we allocate
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = cudnn_benchmark and not deterministic
    # PyTorch's default for convolutions is TF32, whose rounding depends on the algorithm, and that on the micro-batch.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor: the system would take megabytes back, and give them out in page faults."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)


def environment(device: torch.device) -> dict[str, str | int | bool | None]:
    """What a figure needs beside it: versions, device, threads."""
    import torchvision

    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "num_threads": torch.get_num_threads(),
        "world_size": launch().size,
        "compiled": None if cuda else uses_compiled(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
