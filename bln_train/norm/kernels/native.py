"""The epilogue by the kernels in C of epilogue.c, one call each way."""

from __future__ import annotations

import torch
from torch import Tensor

from bln_train.norm.kernels.layout import channels_last, in_order_of, positions_of
from bln_train.norm.kernels.library import TYPES, address, library
from bln_train.norm.kernels.table import Correction, Epilogue, Gradients

_VECTOR_BYTES = 32  # of the kernels
_WORTH_THREADS = 32768  # entries; below, starting threads takes longer than they save (PyTorch's own bound)


class Native:
    """See `backend.Backend`, whose methods these are."""

    def takes(self, y: Tensor, dtype: torch.dtype) -> bool:
        """Whether the kernels take a tensor, and constants of dtype."""
        kind = TYPES.get(y.dtype)
        if kind is None or dtype != y.dtype or y.device.type != "cpu" or y.shape[1] * dtype.itemsize % _VECTOR_BYTES:
            return False
        return (channels_last(y) or (y.dim() == 2 and y.is_contiguous())) and library(kind) is not None

    def forward(
        self, y: Tensor, z: Tensor, residual: Tensor | None, epilogue: Epilogue, nll: Tensor, probe: tuple[int, Tensor] | None
    ) -> Tensor:  # fmt: skip
        """See `Backend`."""
        sums = torch.empty(len(y), 2, y.shape[1], dtype=y.dtype)
        num_probe, of_probe = probe or (0, None)
        _forward(y, z, residual, epilogue, num_probe, (sums, of_probe, nll))
        return sums

    def map_(self, y: Tensor, residual: Tensor | None, epilogue: Epilogue) -> None:
        """See `Backend`."""
        _forward(y, y, residual, epilogue, 0, (None, None, None))

    def follow_(
        self, y: Tensor, residual: Tensor | None, probe: Tensor, unit: Tensor | None, eps: float, *, relu: bool
    ) -> Tensor:
        """See `Backend`."""
        found = torch.empty(2, y.shape[1], dtype=y.dtype)
        residual = _like(residual, y)
        failed = library(TYPES[y.dtype]).follow(
            address(y), address(residual), address(probe), address(unit), len(y), positions_of(y), y.shape[1], relu, eps,
            _num_threads(y), address(found),
        )  # fmt: skip
        _check(failed, "probe's forward")
        return found

    def backward(
        self, grad_z: Tensor, z: Tensor | None, y: Tensor, sums: Tensor, epilogue: Epilogue, correction: Correction,
        gradients: Gradients,
    ) -> None:  # fmt: skip
        """See `Backend`."""
        running, state = (correction.running, correction.state) if correction.corrects else (None, None)
        failed = library(TYPES[y.dtype]).backward(
            address(grad_z), address(z), address(y), address(epilogue.table), address(sums), address(correction.loss_weight),
            epilogue.group_size, epilogue.group_eps, len(y), positions_of(y), y.shape[1], epilogue.relu, address(running),
            address(state), _num_threads(y), address(gradients.y), address(gradients.inner), address(gradients.vectors),
        )  # fmt: skip
        _check(failed, "backward pass")


def _forward(
    y: Tensor, z: Tensor, residual: Tensor | None, epilogue: Epilogue, num_probe: int,
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """Run the kernel; results are sums, those of the probe, and nll."""
    residual = _like(residual, y)
    failed = library(TYPES[y.dtype]).forward(
        address(y), address(z), address(residual), address(epilogue.table), epilogue.group_size, epilogue.group_eps, len(y),
        positions_of(y), y.shape[1], num_probe, epilogue.relu, _num_threads(y), *map(address, results),
    )  # fmt: skip
    _check(failed, "forward pass")


def _like(residual: Tensor | None, y: Tensor) -> Tensor | None:
    """The residual in y's dtype and memory order; a copy only of what is not."""
    return None if residual is None else in_order_of(residual.to(y.dtype), y)


def _num_threads(tensor: Tensor) -> int:
    return 1 if tensor.numel() < _WORTH_THREADS else torch.get_num_threads()


def _check(failed: int, what: str) -> None:
    if failed:
        raise MemoryError(f"the {what} of a folded layer ran out of memory")
