"""One layer's part in the probe's forward after a step; norm/probe.py has what it is for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bln_train.norm.kernels.backend import backend_for
from bln_train.norm.kernels.eager import followed


class Following:
    """One layer's part in the probe's forward after the step; good for the layer's first use in it.

    Args:
        table: (len(ProbeRow), C), dense.
        eps: the smallest standard deviation.
    """

    def __init__(self, table: Tensor, *, eps: float) -> None:
        self.table, self.eps = table, eps
        self.found: Tensor | None = None
        """(2, C), the change of the mean and the new standard deviation."""
        self.num = 0
        """Positions of the images that were followed."""
        self.begins: Callable[[], object] = lambda: None
        """Called before the layer follows."""
        self.settle: Callable[[], object] = lambda: None
        """Called before a second use of the layer: gives it its new statistics."""

    def normalize_(self, y: Tensor, residual: Tensor | None, unit: Tensor | None, *, relu: bool) -> None:
        """Follow y's moments, and write relu(gamma * (x - mean) / std + beta + residual) into it.

        Args:
            y: (N, C, *spatial), dense, (x - mean before) / unit for the layer's input x.
            residual: of the same shape.
            unit: (C,), None for 1.
        """
        self.num = y.numel() // y.shape[1]
        backend = backend_for(y, self.table.dtype, residual)
        self.found = backend.follow_(y, residual, self.table, unit, self.eps, relu=relu)

    def read(self, sums: Tensor, num: int) -> Tensor:
        """Follow the moments given by the sums of y and y^2 over `num` positions, (2, C): scale and shift of y, (2, C)."""
        self.num = num
        self.found, scale_and_shift = followed(sums, num, self.table, None, self.eps)
        return scale_and_shift
