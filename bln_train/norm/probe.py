"""The statistics follow the weights: what a step did to the probe's images moves each layer's mean and standard deviation.

    mean += mean_new - mean_old;  log std += log(std_new / std_old)

*_old are moments of the images that the training forward saw under the old weights, *_new those under the new ones, layer after
layer. The images are the same on both sides, so their sampling noise cancels; what upstream layers changed has already been
normalised away in part. Following in full undoes at once what the step did to mean and scale, where a corrected gradient
(norm/balance.py) meant to do nothing; half of it is no better, a quarter much worse (recipes/RESULTS.md). The ratio is of
std^2 + (1e-4 + 1/n) * std_now^2 for n positions: where images barely vary it says nothing, and of few values, as the two that a
dense layer has of two images, it says little: now and then they all but agree, and their ratio would multiply the deviation by
any number, step after step.

Everything that needs no image is worked out before and after, layers of one kind side by side, (L, C) at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bln_train.norm.functional import raw_from_std, std_from_raw
from bln_train.norm.kernels.compiled import address
from bln_train.norm.kernels.epilogue import Activation, code, kernels_for, map_, num_threads, sums_of
from bln_train.norm.kernels.layout import in_order_of
from bln_train.norm.update import by_kind, finite_or, may_follow, moments, stack

if TYPE_CHECKING:
    from bln_train.norm.batchless import _BatchlessNorm


class FollowRow(IntEnum):
    """Rows of a following layer's table, (len(FollowRow), C), in units of the layer's input."""

    STD = 0
    """Before following."""
    OLD_VARIANCE = 1
    """Of the probe's images under the old weights."""
    DRIFT = 2
    """mean - mean_old."""
    GAMMA = 3
    BETA = 4


class Following:
    """One layer's part in the probe's forward after the step; good for the layer's first use in it.

    Args:
        table: (len(FollowRow), C), dense.
        eps: the smallest standard deviation.
        shared: whether all channels have one mean and one standard deviation.
    """

    def __init__(self, table: Tensor, *, eps: float, shared: bool) -> None:
        self.table, self.eps, self.shared = table, eps, shared
        self.found: Tensor | None = None
        """(2, C), the change of the mean and the new standard deviation."""
        self.num = 0
        """Positions of the images that were followed."""
        self.begins: Callable[[], object] = lambda: None
        """Called before the layer follows."""

    def normalize_(
        self, y: Tensor, residual: Tensor | None, unit: Tensor | None, activation: Activation, slope: float
    ) -> None:
        """Follow y's moments, and write act(gamma * (x - mean) / std + beta + residual) into it.

        Args:
            y: (N, C, *spatial), dense, (x - mean before) / unit for the layer's input x.
            residual: of the same shape.
            unit: (C,), None for 1.
            slope: of a leaky relu.
        """
        self.num = y.numel() // y.shape[1]
        kernels = kernels_for(y, self.table.dtype)
        if kernels is None:
            map_(y, residual, self.read(sums_of(y, self.table.dtype), y.numel() // y.shape[1], unit), activation, slope)
            return
        residual = None if residual is None else in_order_of(residual.to(y.dtype), y)
        num_images, num_channels = y.shape[:2]
        self.found = torch.empty(2, num_channels, dtype=y.dtype)
        failed = kernels.follow(
            address(y), address(residual), address(self.table), address(unit), num_images,
            y.numel() // (num_images * num_channels), num_channels, code(activation), slope, self.eps, self.shared,
            num_threads(y), address(self.found),
        )  # fmt: skip
        if failed:
            raise MemoryError("the probe's forward of a folded layer ran out of memory")

    def read(self, sums: Tensor, num: int, unit: Tensor | None) -> Tensor:
        """Follow moments given by the sums of y and y^2 over `num` positions, (2, C): scale and shift of y, (2, C)."""
        std, old_variance, drift, gamma, beta = self.table.unbind(0)
        self.num = num
        shift, square = sums / num
        mean, variance = moments(torch.zeros_like(shift), shift, square, unit, shared=self.shared)
        guard = (1e-4 + 1 / num) * std * std
        ratio = ((variance + guard) / (old_variance + guard)).sqrt()
        change, new_std = mean + drift, (std * ratio).clamp(min=self.eps)
        self.found = torch.stack((change, new_std))
        scale = gamma / new_std
        return torch.stack((scale if unit is None else scale * unit, beta - scale * change))


@torch.no_grad()
def prepare_following(layers: Sequence[_BatchlessNorm]) -> None:
    """Make the layers that saw the probe's images, and are not frozen, ready to follow them."""
    for group in by_kind([x for x in layers if x.old_moments is not None and may_follow(x)], _kind):
        first, size = group[0], (len(group), group[0].num_features)
        mean, raw = stack(layer.mean for layer in group), stack(layer.raw_std for layer in group)
        old_mean, old_variance = (
            stack(layer.old_moments[n] for layer in group if layer.old_moments is not None) for n in (0, 1)
        )
        gamma = beta = None
        if first.weight is not None:
            gamma, beta = stack(layer.weight for layer in group), stack(layer.bias for layer in group)
        rows = {
            FollowRow.STD: std_from_raw(raw, first.parametrization, first.eps),
            FollowRow.OLD_VARIANCE: old_variance,
            FollowRow.DRIFT: mean - old_mean,
            FollowRow.GAMMA: torch.ones_like(raw) if gamma is None else gamma,
            FollowRow.BETA: torch.zeros_like(raw) if beta is None else beta,
        }
        tables = torch.stack([rows[row].expand(size) for row in FollowRow], 1)
        for layer, table in zip(group, tables.unbind(0), strict=True):
            layer.following = Following(table, eps=layer.eps, shared=layer.share == "layer" and layer.num_features > 1)


@torch.no_grad()
def settle_following(layers: Sequence[_BatchlessNorm]) -> None:
    """Give the layers that followed their new statistics; ends the following of all."""
    found = {layer: layer.following.found for layer in layers if layer.following is not None}
    for group in by_kind([layer for layer, seen in found.items() if seen is not None], _kind):
        first = group[0]
        changes, stds = stack(found[layer] for layer in group)[..., : first.mean.numel()].unbind(1)
        raws = raw_from_std(stds, first.parametrization, first.eps)
        raws = finite_or(raws, stack(layer.raw_std for layer in group))
        torch._foreach_add_(
            [layer.mean for layer in group], list(finite_or(changes, torch.zeros_like(changes)).unbind(0))
        )
        torch._foreach_copy_([layer.raw_std for layer in group], list(raws.unbind(0)))
    for layer in layers:
        if layer.following is not None:
            if layer.following.found is not None:
                layer.old_moments = None
            layer.following = None


def _kind(layer: _BatchlessNorm) -> Hashable:
    mean = layer.mean
    form = layer.num_features, layer.parametrization, layer.eps, layer.weight is None
    return mean.shape, mean.dtype, mean.device, form
