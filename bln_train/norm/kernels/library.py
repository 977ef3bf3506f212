"""Builds the kernels in C with the system's compiler, once for each processor and state of the sources, and loads them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bln_train.norm.kernels.fake import FakeKernels
from bln_train.norm.kernels.table import HORIZON, LARGEST_SQUARE, ProbeRow, Row, StateRow, kernels_are_wanted, pretends

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("epilogue.c", "convolution.c"))
_HEADER = Path(__file__).with_name("vectors.h")
# OpenMP by the name under which PyTorch has loaded its own, so that there is one pool of threads; without it, one thread.
_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ())
_COMMON = ("-O3", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")
# The sources have the names of table.py, so that no number is written twice.
_NAMES = {row.name: int(row) for rows in (Row, StateRow, ProbeRow) for row in rows}
_DEFINED = tuple(
    f"-D{name}={value}" for name, value in {"HORIZON": HORIZON, "LARGEST_SQUARE": LARGEST_SQUARE, **_NAMES}.items()
)

TYPES = {torch.float32: "float", torch.float64: "double"}  # of C, for which `library` has kernels


def why_not_compiled() -> str:
    """Why no kernel is compiled on this machine; "" if they are, or are not wanted."""
    return _build("float")[1] if kernels_are_wanted() else ""


def uses_compiled() -> bool:
    """Whether kernels are compiled, and wanted."""
    return library("float") is not None


def library(real: str) -> Any:
    """The kernels for a C type, "float" or "double"; None where there is no compiler, or none is wanted."""
    kernels = _build(real)[0] if kernels_are_wanted() else None
    return FakeKernels() if kernels is not None and pretends("native") else kernels


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's memory begins, for a kernel; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _build(real: str) -> tuple[ctypes.CDLL | None, str]:
    compiler = next((found for name in _compilers() if (found := shutil.which(name))), None)
    if compiler is None:
        return None, f"no C compiler is installed ({', '.join(_compilers())})"
    source = b"\0".join(path.read_bytes() for path in (*_SOURCES, _HEADER))
    what = f"{real} {compiler} {_COMMON} {_DEFINED} {_FLAGS}".encode()
    key = hashlib.sha256(b"\0".join([source, what, _processor()])).hexdigest()[:24]
    name = f"kernels-{real}-{key}.so"
    folder = _folder()
    path = folder / name
    problem = ""
    if not path.exists():
        own = Path(tempfile.mkdtemp(prefix="build-", dir=folder))  # two processes may build at once
        try:
            problem = _compile(compiler, real, own / name)
            if not problem:
                os.replace(own / name, path)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    if problem:
        return None, problem
    try:
        return _declared(ctypes.CDLL(str(path)), real), ""
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"


def _compilers() -> tuple[str, ...]:
    return (os.environ["CC"],) if os.environ.get("CC") else ("cc", "gcc", "clang")


def _compile(compiler: str, real: str, to: Path) -> str:
    """Compile with as many of the flags as the compiler takes; returns what is wrong, "" if nothing."""
    problem = ""
    for flags in _FLAGS:
        command = [compiler, *_COMMON, *_DEFINED, *flags, f"-DREAL={real}", *map(str, _SOURCES), "-o", str(to), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler} failed: {error}"
        if done.returncode == 0:
            return ""
        problem = problem or f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return problem


def _folder() -> Path:
    """Where built kernels stay: the user's cache, or a folder of this process where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bln-train" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What is loaded from here runs: nobody else may have put it there.
        found = folder.stat()
        ours = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
        if ours and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    import atexit

    folder = tempfile.mkdtemp(prefix="bln-train-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()


def _declared(library: ctypes.CDLL, real: str) -> ctypes.CDLL:
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    number = ctypes.c_float if real == "float" else ctypes.c_double
    library.forward.argtypes = [*[pointer] * 4, long, number, *[long] * 4, *[integer] * 2, *[pointer] * 3]
    library.backward.argtypes = [
        *[pointer] * 6, long, number, *[long] * 3, integer, *[pointer] * 2, integer, *[pointer] * 3,
    ]  # fmt: skip
    library.follow.argtypes = [*[pointer] * 4, *[long] * 3, integer, number, integer, pointer]
    library.convolve.argtypes = [*[pointer] * 5, integer]
    library.convolve_backward.argtypes = [*[pointer] * 6, integer]
    library.centre_filters.argtypes = [pointer, long, long, number]
    library.filter_scale.argtypes = [pointer, long, long, number, pointer]
    library.filter_moments.argtypes = [pointer, pointer, long, long, pointer]
    library.project_filters.argtypes = [*[pointer] * 5, long, long]
    filters = (library.centre_filters, library.filter_scale, library.filter_moments, library.project_filters)
    for function in (library.convolve_backward, *filters):
        function.restype = None
    for function in (library.forward, library.backward, library.follow, library.convolve):
        function.restype = integer
    return library
