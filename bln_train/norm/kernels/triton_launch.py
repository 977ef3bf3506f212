"""Runs the kernels of kernels/triton_kernels.py, where there are any: CUDA tensors, and a Triton that works on their device.

Triton comes with PyTorch's CUDA builds for Linux. It compiles a kernel when it is first called, into ~/.triton/cache, and builds
its launcher with the system's C compiler. Nothing here waits for the device, so that all of it can be recorded in a CUDA graph.

Memory: results, and partial sums of at most `PARTIAL_BYTES`, or a few vectors of C, which are free again when a function returns.
No other temporary, and no copy: but for those sums never more than PyTorch's operators take. A plan traces both paths
(plan/predict.py), this one inside `hollow_launches`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bln_train.errors import first_line
from bln_train.norm.kernels.compiled import compiled_is_wanted
from bln_train.norm.kernels.layout import channels_last, group_size, positions_of

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
"""The most that partial sums take, unless `_MOST_SUMS` values for each image and channel are more."""

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
    """How programs share a tensor; see kernels/triton_kernels.py."""

    axis: int
    num_images: int
    num_positions: int
    num_tiles: int
    tiles_per_program: int
    num_blocks: int
    """Programs of an image, for each block of channels."""
    num_channel_blocks: int
    block_positions: int
    block_channels: int

    @property
    def programs(self) -> tuple[int, int]:
        """Along images and positions, and along channels."""
        return self.num_images * self.num_blocks, self.num_channel_blocks


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
    y: Tensor, residual: Tensor | None, table: Tensor, activation: int, slope: float, nll: Tensor, num_watched: int = 0,
    watched: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`forward_` of kernels/epilogue.py."""
    partials, total = _forward(y, residual, table, activation, slope, table.dtype, nll, num_watched, watched)
    return _of_images(partials, len(y), total)


def sums_of(y: Tensor, dtype: torch.dtype) -> Tensor:
    """`sums_of` of kernels/epilogue.py."""
    return _forward(y, None, None, 0, 0.0, dtype, None, 0, None)[1]


def map_(y: Tensor, residual: Tensor | None, table: Tensor, activation: int, slope: float) -> None:
    """`map_` of kernels/epilogue.py."""
    grid = _grid(y)
    if not _hollow:
        with torch.cuda.device_of(y):
            _kernels().forward[grid.programs](
                y, residual, table, None, grid.num_positions, grid.num_tiles, grid.tiles_per_program, grid.num_blocks, 0,
                y.shape[1], **_constants(grid, table.dtype, activation, slope), NUM_SUMS=0, PER_IMAGE=table.dim() == 3,
            )  # fmt: skip


def _forward(
    y: Tensor, residual: Tensor | None, table: Tensor | None, activation: int, slope: float, real: torch.dtype,
    nll: Tensor | None, num_watched: int, watched: Tensor | None, *, stays: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial sums, and those of all images, (2, C); y stays where there is no table, or `stays`."""
    grid = _grid(y)
    num_images, num_channels = y.shape[:2]
    num_sums = 2 if watched is None else _MOST_SUMS
    partials = torch.empty(grid.programs[0], num_sums, num_channels, dtype=real, device=y.device)
    total = torch.empty(2, num_channels, dtype=real, device=y.device)
    if _hollow:
        return partials, total
    kernels = _kernels()
    with torch.cuda.device_of(y):
        kernels.forward[grid.programs](
            y, residual, None if stays else table, partials, grid.num_positions, grid.num_tiles, grid.tiles_per_program,
            grid.num_blocks, num_watched, num_channels, **_constants(grid, real, activation, slope), NUM_SUMS=num_sums,
            PER_IMAGE=False,
        )  # fmt: skip
        block_channels = min(_power_of_2(num_channels), _FINISH_CHANNELS)
        kernels.finish_forward[1,](
            partials, table, total, watched, nll, grid.programs[0], num_images, grid.num_positions, num_channels,
            REAL=_real(real), NUM_SUMS=num_sums, BLOCK=_FINISH_TILE // block_channels, BLOCK_CHANNELS=block_channels,
            num_warps=_FINISH_WARPS,
        )  # fmt: skip
    return partials, total


def _of_images(partials: Tensor, num_images: int, total: Tensor | None = None) -> Tensor:
    """The first two sums of each image, (N, 2, C)."""
    if num_images == 1 and total is not None:
        return total.unsqueeze(0)
    if partials.shape[:2] == (num_images, 2):
        return partials
    return partials.view(num_images, -1, *partials.shape[1:])[:, :, :2].sum(1)


def backward(
    grad_out: Tensor, z: Tensor | None, given: Tensor | None, residual: Tensor | None, table: Tensor, sums: Tensor,
    grad_nll: Tensor | None, activation: int, slope: float, prior: Tensor | None, state: Tensor | None, grad_y: Tensor,
    grad: Tensor | None, vectors: Tensor,
) -> None:  # fmt: skip
    """`backward` of kernels/epilogue.py, into grad_y and, where it is wanted, grad; each may be grad_out. All in one memory order.

    One image's correction is known before its sums; of several images the sums come first, in a pass of their own.
    """
    grid = _grid(grad_out)
    num_images, num_channels = grad_out.shape[:2]
    partials = torch.empty(grid.programs[0], 2, num_channels, dtype=table.dtype, device=grad_out.device)
    first = state is None or num_images == 1
    taken = None if first else torch.empty(num_images, 2, num_channels, dtype=table.dtype, device=grad_out.device)
    constants = _constants(grid, table.dtype, activation, slope)

    def run(grad_y: Tensor | None, grad: Tensor | None, partials: Tensor | None) -> None:
        _kernels().backward[grid.programs](
            grad_out, z, given, residual, table, sums, grad_nll, prior, state, taken, grad_y, grad, partials, grid.num_positions,
            grid.num_tiles, grid.tiles_per_program, grid.num_blocks, num_channels, **constants, PER_IMAGE=False,
        )  # fmt: skip

    with torch.cuda.device_of(grad_out):
        if not _hollow:
            run(*((grad_y, grad, partials) if first else (None, None, partials)))
        seen = partials if num_images == 1 else _of_images(partials, num_images)
        if _hollow:
            return
        block_channels = min(_power_of_2(num_channels), _TILE_CHANNELS[0])
        _kernels().finish_backward[-(-num_channels // block_channels),](
            seen, table, sums, grad_nll, prior, state, taken, vectors, grid.programs[0], num_images, grid.num_positions,
            num_channels, REAL=_real(table.dtype), IS_ONE=num_images == 1, BLOCK=_FINISH_TILE // block_channels,
            BLOCK_CHANNELS=block_channels, num_warps=_FINISH_WARPS,
        )  # fmt: skip
        if not first:
            run(grad_y, grad, None)


def forward_groups(
    y: Tensor, residual: Tensor | None, table: Tensor | None, groups: nn.GroupNorm, activation: int, slope: float,
    real: torch.dtype, nll: Tensor | None, num_watched: int = 0, watched: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`forward_` of kernels/channel.py, or, without a table, its `map_`."""
    grid = _grid(y)
    num_images, num_channels = y.shape[:2]
    partials, _ = _forward(y, None, table, 0, 0.0, real, nll, num_watched, watched, stays=True)
    sums = torch.empty(num_images, 2, num_channels, dtype=real, device=y.device)
    maps = torch.empty_like(sums)
    if _hollow:
        return sums
    size = group_size(groups)
    block_channels = _power_of_2(size)
    some = min(_power_of_2(grid.num_blocks), _FINISH_TILE // block_channels)  # sums loaded at once
    with torch.cuda.device_of(y):
        _group_kernels().finish_groups[groups.num_groups, num_images](
            partials, table, groups.weight, groups.bias, sums, maps, grid.num_blocks, grid.num_positions, num_channels, size,
            EPS=groups.eps, REAL=_real(real), NUM_SUMS=partials.shape[1], BLOCK=max(1, some),
            BLOCK_CHANNELS=block_channels,
        )  # fmt: skip
    map_(y, residual, maps, activation, slope)
    return sums


def backward_groups(
    grad_out: Tensor, z: Tensor | None, given: Tensor, table: Tensor, sums: Tensor, grad_nll: Tensor | None,
    groups: nn.GroupNorm, activation: int, slope: float, prior: Tensor | None, state: Tensor | None, grad: Tensor | None,
    vectors: Tensor,
) -> None:  # fmt: skip
    """`backward` of kernels/channel.py, into `given` and, where it is wanted, grad, which may be grad_out."""
    grid = _grid(grad_out)
    num_images, num_channels = grad_out.shape[:2]
    partials = torch.empty(grid.programs[0], 2, num_channels, dtype=table.dtype, device=grad_out.device)
    maps = torch.empty(num_images, 3, num_channels, dtype=table.dtype, device=grad_out.device)
    constants = _constants(grid, table.dtype, activation, slope)

    def run(taken: Tensor | None, grad_y: Tensor | None, grad: Tensor | None, partials: Tensor | None) -> None:
        _kernels().backward[grid.programs](
            grad_out, z, given, None, table, None, None, None, None, taken, grad_y, grad, partials, grid.num_positions,
            grid.num_tiles, grid.tiles_per_program, grid.num_blocks, num_channels, **constants,
            PER_IMAGE=taken is not None,
        )  # fmt: skip

    with torch.cuda.device_of(grad_out):
        if not _hollow:
            run(None, None, None, partials)
        seen = _of_images(partials, num_images)
        if _hollow:
            return
        size = group_size(groups)
        _group_kernels().finish_groups_backward[groups.num_groups,](
            seen, table, sums, grad_nll, prior, state, groups.weight, maps, vectors, num_images, grid.num_positions, num_channels,
            size, EPS=groups.eps, REAL=_real(table.dtype), BLOCK_CHANNELS=_power_of_2(size),
        )  # fmt: skip
        run(maps, given, grad, None)


def _axis(tensor: Tensor) -> int | None:
    """Of a tile's positions: 0 where channels are adjacent in memory, 1 where positions are, None for what is not dense."""
    if channels_last(tensor):
        return 0
    if tensor.dim() < 2 or not tensor.is_contiguous():
        return None
    return 0 if tensor.dim() == 2 else 1


def _grid(tensor: Tensor) -> _Grid:
    num_images, num_channels = tensor.shape[:2]
    num_positions = positions_of(tensor)
    axis = _axis(tensor)
    assert axis is not None
    block_channels = min(_power_of_2(num_channels), _TILE_CHANNELS[axis])
    block_positions = min(_power_of_2(num_positions), _TILE // block_channels)
    num_tiles, num_channel_blocks = -(-num_positions // block_positions), -(-num_channels // block_channels)
    tiles_per_program = -(-num_tiles // max(1, _MOST_PROGRAMS // (num_channel_blocks * num_images)))
    return _Grid(
        axis, num_images, num_positions, num_tiles, tiles_per_program, -(-num_tiles // tiles_per_program), num_channel_blocks,
        block_positions, block_channels,
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
    from bln_train.norm.kernels import triton_kernels

    return triton_kernels


@functools.cache
def _group_kernels() -> ModuleType:
    from bln_train.norm.kernels import triton_groups

    return triton_groups


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
    from bln_train.norm.balance import BalanceRow, balance_images
    from bln_train.norm.kernels.epilogue import Row, cut_off

    shape = (3, 5)
    numbers = torch.arange(float(len(Row) * shape[1]), device=device)
    table = torch.sin(numbers).view(len(Row), shape[1])
    table[Row.SPREAD].abs_()
    y, residual, grad_out, weight = (torch.cos(n * numbers[:15] + n).view(shape) for n in range(1, 5))
    out, nll = y.clone(), torch.zeros((), device=device)
    sums = forward(out, residual, table, 1, 0.0, nll)
    z = torch.relu(y * table[Row.SCALE] + table[Row.SHIFT] + residual)
    likelihood = (table[Row.NLL_SQUARE] * (y * y).sum(0) + 3 * table[Row.NLL_IMAGE]).sum()
    vectors, grad_y, grad_nll = torch.zeros(4, 5, device=device), torch.empty_like(y), weight[0, 0]
    prior, state = table[:2].clone(), torch.sin(numbers[: 5 * len(BalanceRow)]).view(-1, 5)
    other = state.clone()
    backward(grad_out, out, None, residual, table, sums, grad_nll, 1, 0.0, prior, state, grad_y, None, vectors)
    g = grad_out * (z > 0)
    shift = table[Row.SHIFT]
    q = torch.where(z > 0, z - residual, shift + cut_off(residual + shift, table[Row.SPREAD]))
    along_xhat = (g * q) * table[Row.GAMMA_SCALE] + g * table[Row.GAMMA_SHIFT]
    seen, xhat = torch.stack((g, along_xhat), 1) / grad_nll, y * table[Row.INVERSE]
    shifts, slopes = balance_images(prior, other, seen, torch.stack((xhat, xhat * xhat), 1)).unbind(1)
    gives = (g - grad_nll * shifts) * table[Row.SCALE] - grad_nll * slopes * (table[Row.OFFSET] + table[Row.GAIN] * q)
    pairs = (
        (out, z),
        (sums, torch.stack((y, y * y), 1)),
        (state, other),
        (nll, likelihood),
        (grad_y, gives),
        (vectors[3], g.sum(0)),
    )
    close = all(
        torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for found, expected in (*pairs, *_try_groups(table))
    )
    return "" if close else "Triton's kernels compute something else than PyTorch on this device"


def _try_groups(table: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Results of the kernels for groups of channels, each beside PyTorch's."""
    from bln_train.norm.kernels import channel
    from bln_train.norm.kernels.epilogue import Row

    shape = 3, table.shape[1]
    numbers = torch.arange(float(shape[0] * shape[1]), device=table.device)
    y, residual, grad_out = (torch.cos(n * numbers + n).view(shape) for n in range(1, 4))
    groups = nn.GroupNorm(1, shape[1], device=table.device)
    groups.weight.copy_(y[0])
    groups.bias.copy_(y[1])
    out, weight = y.clone(), table[0, 1]
    sums = forward_groups(out, residual, table, groups, 1, 0.0, table.dtype, torch.zeros_like(weight))
    z = torch.relu(
        nn.functional.group_norm(y * table[Row.INVERSE], 1, groups.weight, groups.bias, groups.eps) + residual
    )
    found = []
    for is_ours in (True, False):
        given, vectors, state = y.clone(), torch.zeros(6, shape[1], device=table.device), table[2:5].clone()
        first = (grad_out, z, given, table, sums, weight, groups)
        if is_ours:
            backward_groups(*first, 1, 0.0, table[:2], state, None, vectors)
        else:
            channel.eager_backward(*first, "relu", 0.0, vectors, table[:2], state, may_overwrite=False)
        found.append((given, vectors, state))
    return [(out, z), (sums, torch.stack((y, y * y), 1)), *zip(*found, strict=True)]
