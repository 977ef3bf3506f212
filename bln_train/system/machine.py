"""The machine: device, precision, threads, and what to write down about it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bln_train.errors import UsageError
from bln_train.system.launch import launch
from bln_train.system.units import format_bytes, parse_bytes

_LEAST_HEADROOM = 256 * 2**20
# PyTorch keeps these for the life of the process, for each stream: by default 8 MiB, and 32 on Hopper, for a network of 1 MiB whose
# only matrix product is its last layer. In KiB: 8 buffers of 16, and 128; with either of two sizes, of which this is one, cuBLAS is
# deterministic.
_WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "128"}
WORKSPACE_BYTES = 128 * 1024
"""Of matrix products, kept for each stream."""
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


@dataclass(frozen=True)
class Budget:
    """Memory that training may take of a device."""

    num_bytes: int
    source: str
    """Where the number comes from, for people."""


def free_budget(device: torch.device) -> Budget:
    """What is free on the device less a headroom for what others and the driver still take: a tenth, at least 256 MiB.

    On CUDA what this process' allocator holds counts as free. On the CPU it is the system's estimate of what can be had without
    swapping, half of the physical memory where the system gives none.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        what = f"free on {torch.cuda.get_device_name(device)}"
    else:
        free, what = _available_memory(), "available on this machine"
    headroom = max(_LEAST_HEADROOM, free // 10)
    return Budget(max(1, free - headroom), f"{what}, less {headroom / 2**20:.0f} MiB")


def limit_memory(device: torch.device, num_bytes: int) -> None:
    """Let this process' allocator take no more of a CUDA device than so many bytes; above them it runs out of memory."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, num_bytes / total)), _with_index(device))


def memory_limit(device: torch.device, memory_budget: str | None) -> int | None:
    """What a peak is held against: on CUDA what the allocator may take of the card, elsewhere the budget, None without one."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(torch.cuda.get_per_process_memory_fraction(_with_index(device)) * total)
    return None if memory_budget is None else parse_bytes(memory_budget)


def _with_index(device: torch.device) -> torch.device:
    """The current CUDA device where none is named: not every function of PyTorch takes it for that."""
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _available_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 4 * 2**30 if sys.platform == "win32" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


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
    deterministic: bool,
    cudnn_benchmark: bool,
    tf32: bool,
) -> None:
    """Set the switches that PyTorch has for the whole process."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cuda":
        for name, value in _WORKSPACES.items():
            os.environ.setdefault(name, value)
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


_MUCH_BY_OTHERS_BYTES = 500 * 2**20  # a desktop takes less
_CONTEXT_BYTES = 500 * 2**20  # of CUDA itself in this process, which nothing tells: about what drivers take


def memory_notices(device: torch.device) -> list[str]:
    """What the user should know of a card's memory before training: who else takes it, and whether the driver may spill."""
    if device.type != "cuda":
        return []
    spills = may_spill(platform.system(), platform.release())
    free, total = torch.cuda.mem_get_info(device)
    held_bytes = torch.cuda.memory_reserved(device) + _CONTEXT_BYTES
    return [text for text in (spill_notice(spills), others_notice(total - free, held_bytes, total)) if text]


def may_spill(system: str, release: str) -> bool:
    """Whether the driver may use system memory where the card has none left, from what `platform` says: Windows, or WSL."""
    return system == "Windows" or "microsoft" in release.lower()


def spill_notice(spills: bool) -> str:
    """What to know where the driver may spill, "" where it does not."""
    if not spills:
        return ""
    return (
        "Under Windows and WSL the driver may move what does not fit into system memory instead of failing: training then becomes "
        "many times slower without a word. NVIDIA control panel: `CUDA - Sysmem Fallback Policy`, `Prefer No Sysmem Fallback`."
    )


def others_notice(used_bytes: int, held_bytes: int, total_bytes: int) -> str:
    """What to know where other processes hold more than 500 MiB of a card, "" elsewhere.

    Args:
        used_bytes, total_bytes: of the whole card.
        held_bytes: by this process, its CUDA context included.
    """
    others = used_bytes - held_bytes
    if others <= _MUCH_BY_OTHERS_BYTES:
        return ""
    return (
        f"Other processes hold some {format_bytes(others)} of the card's {format_bytes(total_bytes)}; nvidia-smi lists them. "
        "Training has the rest."
    )


def environment(device: torch.device) -> dict[str, str | int | bool | None]:
    """What a figure needs beside it: device, threads, versions."""
    import torchvision

    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "num_threads": torch.get_num_threads(),
        "world_size": launch().size,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
