"""The epilogue by the kernels of triton_kernels.py: CUDA tensors, where Triton works on their device.

Triton comes with PyTorch's CUDA builds for Linux. It compiles a kernel when it is first called, into ~/.triton/cache, and builds
its launcher with the system's C compiler. Nothing here waits for the device, so that all of it can be recorded in a CUDA graph.

Memory: results, and partial sums of at most `PARTIAL_BYTES`, or a few vectors of C, which are free again when a method returns.
No other temporary, and no copy: but for those sums never more than PyTorch's operators take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bln_train.norm.kernels.eager import followed
from bln_train.norm.kernels.layout import channels_last, positions_of
from bln_train.norm.kernels.table import Correction, Epilogue, Gradients, Row

_WHAT_SUMS = {torch.float16: torch.float32, torch.bfloat16: torch.float32} | {
    k: k for k in (torch.float32, torch.float64)
}

# Guesses, none of them measured. A tile has as many entries as keep a thread's loads and four sums in registers; a row of it
# is one line of the cache in float32.
_TILE = 1024
_TILE_CHANNELS = {0: 32, 1: 8}  # at most, by the axis of positions
_MOST_PROGRAMS = 512
_FINISH_TILE = 4096
_FINISH_CHANNELS = 512
_FINISH_WARPS = 16
_MOST_SUMS = 4
PARTIAL_BYTES = _MOST_SUMS * _MOST_PROGRAMS * max(_TILE_CHANNELS.values()) * torch.float64.itemsize
"""The most that partial sums take, unless `_MOST_SUMS` values for each image and channel are more."""


class _Grid(NamedTuple):
    """How programs share a tensor; see triton_kernels.py."""

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

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What every pass over a tensor is told."""
        return self.num_positions, self.num_tiles, self.tiles_per_program, self.num_blocks


def takes_tensor(y: Tensor, dtype: torch.dtype, *others: Tensor | None) -> bool:
    """Whether the kernels can take a tensor, constants of dtype, and other tensors of its shape, in its memory order."""
    if _WHAT_SUMS.get(y.dtype) != dtype or _axis(y) is None or not y.numel():
        return False
    return all(other is None or (_axis(other) == _axis(y) and _WHAT_SUMS.get(other.dtype) == dtype) for other in others)


_Finish = tuple[Tensor | None, Tensor | None, tuple[int, Tensor] | None]
_Write = tuple[Tensor | None, Tensor | None, Tensor | None, bool]


@functools.cache
def _compiled() -> ModuleType:
    from bln_train.norm.kernels import triton_kernels  # imports Triton

    return triton_kernels


class Triton:
    """See `backend.Backend`, whose methods these are.

    Args:
        kernels: gives them when they are first needed.

    Attributes:
        device_types: of tensors that the kernels run on; a test adds the CPU, on which Triton's interpreter runs.
    """

    def __init__(self, kernels: Callable[[], Any] = _compiled) -> None:
        self.kernels = kernels
        self.device_types: tuple[str, ...] = ("cuda",)

    def forward(
        self, y: Tensor, z: Tensor, residual: Tensor | None, epilogue: Epilogue, nll: Tensor, probe: tuple[int, Tensor] | None
    ) -> Tensor:  # fmt: skip
        """See `Backend`."""
        if epilogue.group_size:
            partials, _ = self._sums(y, epilogue.table.dtype, (epilogue.table, nll, probe))
            return self._normalize_groups(y, z, residual, epilogue, partials)
        table = epilogue.table
        partials, total = self._sums(
            y, table.dtype, (table, nll, probe), (z, residual, table[Row.INNER :], epilogue.relu)
        )
        return total.unsqueeze(0) if len(y) == 1 else _of_images(partials, len(y))

    def map_(self, y: Tensor, residual: Tensor | None, epilogue: Epilogue) -> None:
        """See `Backend`."""
        if epilogue.group_size:
            partials, _ = self._sums(y, epilogue.table.dtype)
            self._normalize_groups(y, y, residual, epilogue, partials)
        else:
            self._map(y, y, residual, epilogue.table[Row.INNER :], relu=epilogue.relu)

    def follow_(
        self, y: Tensor, residual: Tensor | None, probe: Tensor, unit: Tensor | None, eps: float, *, relu: bool
    ) -> Tensor:
        """See `Backend`."""
        _, total = self._sums(y, probe.dtype)
        found, scale_and_shift = followed(total, y.numel() // y.shape[1], probe, unit, eps)
        self._map(y, y, residual, scale_and_shift, relu=relu)
        return found

    def backward(
        self, grad_z: Tensor, z: Tensor | None, y: Tensor, sums: Tensor, epilogue: Epilogue, correction: Correction,
        gradients: Gradients,
    ) -> None:  # fmt: skip
        """See `Backend`."""
        grid, table, (num_images, num_channels) = _grid(y), epilogue.table, y.shape[:2]
        running, state = (correction.running, correction.state) if correction.corrects else (None, None)
        weight, is_one, size = correction.loss_weight, num_images == 1, epilogue.group_size
        # The map of one image without groups is known before its sums; else the sums come first, in a pass of their own.
        once = not size and (is_one or state is None)
        partials = torch.empty(grid.programs[0], 2, num_channels, dtype=table.dtype, device=y.device)
        maps = None if once else torch.empty(num_images, 3, num_channels, dtype=table.dtype, device=y.device)
        kernels = self.kernels()

        def run(maps: Tensor | None, grad_y: Tensor | None, grad: Tensor | None, partials: Tensor | None) -> None:
            kernels.backward[grid.programs](
                grad_z, z, y, table, sums, weight, running, state, maps, grad_y, grad, partials, *grid.sizes, num_channels,
                **_constants(grid), REAL=kernels.real(table.dtype), RELU=epilogue.relu,
            )  # fmt: skip

        with torch.cuda.device_of(y):
            run(None, gradients.y if once else None, gradients.inner if once else None, partials)
            seen = partials if is_one else _of_images(partials, num_images)
            size = size or min(_power_of_2(num_channels), _TILE_CHANNELS[0])
            lanes = _power_of_2(size)
            kernels.finish_backward[-(-num_channels // size),](
                seen, table, sums, weight, running, state, maps, gradients.vectors, grid.programs[0], num_images,
                grid.num_positions, num_channels, size, EPS=epilogue.group_eps, HAS_GROUPS=epilogue.group_size > 0,
                IS_ONE=is_one, REAL=kernels.real(table.dtype), BLOCK=max(1, _FINISH_TILE // lanes), BLOCK_CHANNELS=lanes,
                num_warps=_FINISH_WARPS,
            )  # fmt: skip
            if not once:
                run(maps, gradients.y, gradients.inner, None)

    def _sums(
        self, y: Tensor, real: torch.dtype, finish: _Finish = (None, None, None), write: _Write = (None, None, None, False)
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Partial sums, and those of all images, (2, C).

        Args:
            finish: table, nll and probe, as `forward` has them.
            write: z, residual, maps and relu of a map on the way, or nothing.
        """
        grid, (num_images, num_channels) = _grid(y), y.shape[:2]
        table, nll, probe = finish
        num_probe, of_probe = probe or (0, None)
        z, residual, maps, relu = write
        num_sums = 2 if of_probe is None else _MOST_SUMS
        partials = torch.empty(grid.programs[0], num_sums, num_channels, dtype=real, device=y.device)
        total = torch.empty(2, num_channels, dtype=real, device=y.device)
        lanes = min(_power_of_2(num_channels), _FINISH_CHANNELS)
        kernels = self.kernels()
        with torch.cuda.device_of(y):
            kernels.forward[grid.programs](
                y, z, residual, maps, partials, *grid.sizes, num_probe, num_channels, **_constants(grid), RELU=relu,
                REAL=kernels.real(real), NUM_SUMS=num_sums, PER_IMAGE=False,
            )  # fmt: skip
            kernels.finish_forward[1,](
                partials, table, total, of_probe, nll, grid.programs[0], num_images, grid.num_positions, num_channels,
                REAL=kernels.real(real), NUM_SUMS=num_sums, BLOCK=_FINISH_TILE // lanes, BLOCK_CHANNELS=lanes,
                num_warps=_FINISH_WARPS,
            )  # fmt: skip
        return partials, total

    def _normalize_groups(
        self, y: Tensor, z: Tensor, residual: Tensor | None, epilogue: Epilogue, partials: Tensor
    ) -> Tensor:
        """Write the epilogue with groups of channels into z, from partial sums; each image's sums of y and y^2, (N, 2, C)."""
        grid, size, (num_images, num_channels) = _grid(y), epilogue.group_size, y.shape[:2]
        sums = torch.empty(num_images, 2, num_channels, dtype=epilogue.table.dtype, device=y.device)
        maps, lanes = torch.empty_like(sums), _power_of_2(size)
        some = min(_power_of_2(grid.num_blocks), _FINISH_TILE // lanes)  # sums loaded at once
        kernels = self.kernels()
        with torch.cuda.device_of(y):
            kernels.finish_groups[num_channels // size, num_images](
                partials, epilogue.table, sums, maps, grid.num_blocks, grid.num_positions, num_channels, size,
                EPS=epilogue.group_eps, REAL=kernels.real(sums.dtype), NUM_SUMS=partials.shape[1], BLOCK=max(1, some),
                BLOCK_CHANNELS=lanes,
            )  # fmt: skip
        self._map(y, z, residual, maps, relu=epilogue.relu)
        return sums

    def _map(self, y: Tensor, z: Tensor, residual: Tensor | None, maps: Tensor, *, relu: bool) -> None:
        """z becomes relu(scale * y + shift + residual), with maps (2, C) or (N, 2, C)."""
        grid, kernels = _grid(y), self.kernels()
        with torch.cuda.device_of(y):
            kernels.forward[grid.programs](
                y, z, residual, maps, None, *grid.sizes, 0, y.shape[1], **_constants(grid), RELU=relu, NUM_SUMS=0,
                REAL=kernels.real(maps.dtype), PER_IMAGE=maps.dim() == 3,
            )  # fmt: skip


def _of_images(partials: Tensor, num_images: int) -> Tensor:
    """The first two sums of each image, (N, 2, C)."""
    if partials.shape[:2] == (num_images, 2):
        return partials
    return partials.view(num_images, -1, *partials.shape[1:])[:, :, :2].sum(1)


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


def _constants(grid: _Grid) -> dict[str, int]:
    return {
        "AXIS": grid.axis,
        "BLOCK_POSITIONS": grid.block_positions,
        "BLOCK_CHANNELS": grid.block_channels,
    }


def _power_of_2(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()
