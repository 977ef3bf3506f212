"""Runs the kernels of norm/triton_kernels.py, where there are any: CUDA tensors, and a Triton that works on their device.

Triton comes with PyTorch's CUDA builds for Linux. It compiles a kernel when it is first called, into ~/.triton/cache, and builds
its launcher with the system's C compiler. Nothing here waits for the device, so that all of it can be recorded in a CUDA graph.

Memory: results, and partial sums of at most `PARTIAL_BYTES`, or a few vectors of C, which are free again when a function returns.
No other temporary, and no copy: but for those sums never more than PyTorch's operators take. A plan traces both paths
(memory/predict.py), this one inside `hollow_launches`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bln_train.errors import first_line
from bln_train.norm.compiled import compiled_is_wanted

_TYPES: tuple[str, ...] = ("cuda",)  # of devices; a test adds the CPU, on which Triton's interpreter runs
_OLDEST = (7, 0)  # compute capability that Triton supports
_WHAT_SUMS = {torch.float16: torch.float32, torch.bfloat16: torch.float32} | {
    k: k for k in (torch.float32, torch.float64)
}

# Guesses, none of them measured. A tile has as many entries as keep a thread's loads and six sums in registers; a row of it
# is one line of the cache in float32.
_TILE = 1024
_TILE_CHANNELS = {0: 32, 1: 8}  # at most, by the axis of positions
_MOST_PROGRAMS = 512
_FINISH_TILE = 4096
_FINISH_CHANNELS = 512
_FINISH_WARPS = 16
_MOST_SUMS = 6
PARTIAL_BYTES = _MOST_SUMS * _MOST_PROGRAMS * max(_TILE_CHANNELS.values()) * torch.float64.itemsize
"""The most that partial sums take; beyond 16,384 channels it is `_MOST_SUMS` values for each."""

_hollow = False


@contextmanager
def hollow_launches() -> Iterator[None]:
    """Take tensors of the CPU for those of a CUDA device inside, and allocate what launches would, without any."""
    global _hollow
    before, _hollow = _hollow, True
    try:
        yield
    finally:
        _hollow = before


class _Grid(NamedTuple):
    """How programs share a tensor; see norm/triton_kernels.py."""

    axis: int
    length: int
    tiles_per_part: int
    num_tiles: int
    tiles_per_program: int
    num_blocks: int
    num_channel_blocks: int
    block_positions: int
    block_channels: int


def takes(order: Tensor, dtype: torch.dtype, *others: Tensor | None) -> bool:
    """Whether kernels can take a tensor, constants of dtype, and other tensors of its shape, which must be in its memory order."""
    if not _hollow and not (order.device.type in _TYPES and compiled_is_wanted()):
        return False
    if _WHAT_SUMS.get(order.dtype) != dtype:
        return False
    if _axis(order) is None or not order.numel():
        return False
    for other in others:
        if other is not None and (_axis(other) != _axis(order) or _WHAT_SUMS.get(other.dtype) != dtype):
            return False
    return _hollow or not why_not_triton(order.device)


def why_not_triton(device: torch.device) -> str:
    """Why no Triton kernel runs on a CUDA device; "" if they do, or are not wanted."""
    if not compiled_is_wanted():
        return ""
    return _trial(torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device)


def forward(
    y: Tensor, residual: Tensor | None, table: Tensor | None, activation: int, slope: float, sums: Tensor | None,
    nll: Tensor | None = None, num_watched: int = 0, watched: Tensor | None = None,
) -> None:  # fmt: skip
    """`forward_` of norm/epilogue.py, into sums; without sums the map alone, without table the sums alone."""
    grid = _grid(y)
    num_images, num_channels = y.shape[:2]
    num_positions = y.numel() // (num_images * num_channels)
    num_sums = 0 if sums is None else (2 if watched is None else _MOST_SUMS)
    real = (sums if table is None else table).dtype  # type: ignore[union-attr] # one of them is there
    partials = None
    if num_sums:
        partials = torch.empty(grid.num_blocks, num_sums, num_channels, dtype=real, device=y.device)
    if _hollow:
        return
    kernels = _kernels()
    with torch.cuda.device_of(y):
        kernels.forward[grid.num_blocks, grid.num_channel_blocks](
            y, residual, table, partials, grid.length, grid.tiles_per_part, grid.num_tiles, grid.tiles_per_program,
            num_watched * num_positions, num_channels, **_constants(grid, real, activation, slope), NUM_SUMS=num_sums,
        )  # fmt: skip
        if num_sums:
            block_channels = min(_power_of_2(num_channels), _FINISH_CHANNELS)
            kernels.finish_forward[1,](
                partials, table, sums, watched, nll, grid.num_blocks, num_images, num_positions, num_channels,
                REAL=_real(real), NUM_SUMS=num_sums, BLOCK=_FINISH_TILE // block_channels, BLOCK_CHANNELS=block_channels,
                num_warps=_FINISH_WARPS,
            )  # fmt: skip


def backward(
    grad_out: Tensor, z: Tensor | None, given: Tensor | None, residual: Tensor | None, table: Tensor, sums: Tensor,
    grad_nll: Tensor | None, activation: int, slope: float, corrects: bool, grad_y: Tensor, grad: Tensor | None, vectors: Tensor,
) -> None:  # fmt: skip
    """`backward` of norm/epilogue.py, into grad_y and, where it is wanted, grad; each may be grad_out. All in one memory order."""
    grid = _grid(grad_out)
    num_images, num_channels = grad_out.shape[:2]
    num_positions = grad_out.numel() // (num_images * num_channels)
    partials = torch.empty(grid.num_blocks, 2, num_channels, dtype=table.dtype, device=grad_out.device)
    if _hollow:
        return
    kernels = _kernels()
    with torch.cuda.device_of(grad_out):
        kernels.backward[grid.num_blocks, grid.num_channel_blocks](
            grad_out, z, given, residual, table, grad_nll if corrects else None, grad_y, grad, partials, grid.length,
            grid.tiles_per_part, grid.num_tiles, grid.tiles_per_program, num_channels,
            **_constants(grid, table.dtype, activation, slope),
        )  # fmt: skip
        block_channels = min(_power_of_2(num_channels), _TILE_CHANNELS[0])
        kernels.finish_backward[-(-num_channels // block_channels),](
            partials, table, sums, grad_nll, vectors, grid.num_blocks, num_images, num_positions, num_channels,
            REAL=_real(table.dtype), BLOCK=_FINISH_TILE // block_channels, BLOCK_CHANNELS=block_channels,
            num_warps=_FINISH_WARPS,
        )  # fmt: skip


def _axis(tensor: Tensor) -> int | None:
    """Of a tile's positions: 0 where channels are adjacent in memory, 1 where positions are, None for what is not dense."""
    if tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.is_contiguous(memory_format=torch.channels_last):
        return 0
    if tensor.dim() < 2 or not tensor.is_contiguous():
        return None
    return 0 if tensor.dim() == 2 else 1


def _grid(tensor: Tensor) -> _Grid:
    num_images, num_channels = tensor.shape[:2]
    num_rows = tensor.numel() // num_channels
    axis = _axis(tensor)
    assert axis is not None
    length = num_rows if axis == 0 else num_rows // num_images
    block_channels = min(_power_of_2(num_channels), _TILE_CHANNELS[axis])
    block_positions = _TILE // block_channels
    tiles_per_part, num_channel_blocks = -(-length // block_positions), -(-num_channels // block_channels)
    num_tiles = tiles_per_part * (num_rows // length)
    tiles_per_program = -(-num_tiles // max(1, _MOST_PROGRAMS // num_channel_blocks))
    num_blocks = -(-num_tiles // tiles_per_program)
    return _Grid(
        axis, length, tiles_per_part, num_tiles, tiles_per_program, num_blocks, num_channel_blocks, block_positions, block_channels
    )  # fmt: skip


def _constants(grid: _Grid, real: torch.dtype, activation: int, slope: float) -> dict[str, Any]:
    return {
        "REAL": _real(real),
        "ACTIVATION": activation,
        "SLOPE": float(slope) if activation == 2 else 0.0,
        "AXIS": grid.axis,
        "BLOCK_POSITIONS": grid.block_positions,
        "BLOCK_CHANNELS": grid.block_channels,
    }


def _power_of_2(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()


def _real(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


@functools.cache
def _kernels() -> ModuleType:
    from bln_train.norm import triton_kernels

    return triton_kernels


@functools.cache
def _trial(device: torch.device) -> str:
    """What is wrong with the kernels on a device, "" if nothing: they run once, and have to give what they should."""
    try:
        if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) < _OLDEST:
            have = ".".join(map(str, torch.cuda.get_device_capability(device)))
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {have}, below {_OLDEST[0]}.{_OLDEST[1]}"
            )
        return _try_on(device)
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernels
    except ImportError as error:
        return f"Triton cannot be imported: {first_line(error)}"
    except Exception as error:  # of its compiler, of the system's, of the driver: whatever it is, there is another way
        return f"Triton failed: {first_line(error)}"


@torch.no_grad()
def _try_on(device: torch.device) -> str:
    from bln_train.norm.epilogue import Row, cut_off

    shape = (3, 5)
    numbers = torch.arange(float(len(Row) * shape[1]), device=device)
    table = torch.sin(numbers).view(len(Row), shape[1])
    table[Row.SPREAD].abs_()
    y, residual, grad_out, weight = (torch.cos(n * numbers[:15] + n).view(shape) for n in range(1, 5))
    out, sums, nll = y.clone(), torch.empty(2, 5, device=device), torch.zeros((), device=device)
    forward(out, residual, table, 1, 0.0, sums, nll)
    z = torch.relu(y * table[Row.SCALE] + table[Row.SHIFT] + residual)
    likelihood = (table[Row.NLL_SQUARE] * (y * y).sum(0) + 3 * table[Row.NLL_IMAGE]).sum()
    vectors, grad_y, grad_nll = torch.zeros(4, 5, device=device), torch.empty_like(y), weight[0, 0]
    backward(grad_out, out, None, residual, table, sums, grad_nll, 1, 0.0, True, grad_y, None, vectors)
    g = grad_out * (z > 0)
    shift = table[Row.SHIFT]
    q = torch.where(z > 0, z - residual, shift + cut_off(residual + shift, table[Row.SPREAD]))
    gives = g * table[Row.SCALE] + grad_nll * (table[Row.OFFSET] + table[Row.GAIN] * q)
    pairs = (
        (out, z),
        (sums, torch.stack((y.sum(0), (y * y).sum(0)))),
        (nll, likelihood),
        (grad_y, gives),
        (vectors[3], g.sum(0)),
    )
    close = all(torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for found, expected in pairs)
    return "" if close else "Triton's kernels compute something else than PyTorch on this device"
