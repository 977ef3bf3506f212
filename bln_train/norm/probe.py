"""The statistics follow the weights: what a step did to the probe's images moves each layer's mean and standard deviation.

    mean += mean_new - mean_old;  log std += log(std_new / std_old)

*_old are moments of the images that the training forward saw under the old weights, *_new those under the new ones, layer after
layer. The images are the same on both sides, so their sampling noise cancels; what upstream layers changed has already been
normalised away in part. Following in full undoes at once what the step did to mean and scale, where a corrected gradient
(kernels/feedback.py) meant to do nothing; half of it is no better, a quarter much worse (recipes/RESULTS.md). The ratio is of
std^2 + (1e-4 + 1/n) * std_now^2 for n positions: where images barely vary it says nothing, and of few values, as the two that a
dense layer has of two images, it says little: now and then they all but agree, and their ratio would multiply the deviation by
any number, step after step.

Everything that needs no image is worked out before and after, layers of one kind side by side, (L, C) at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import torch

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.following import Following
from bln_train.norm.functional import raw_from_std
from bln_train.norm.kernels.table import ProbeRow
from bln_train.norm.update import by_kind, finite_or, may_follow, stack


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
            ProbeRow.STD: raw.exp(),
            ProbeRow.OLD_VARIANCE: old_variance,
            ProbeRow.DRIFT: mean - old_mean,
            ProbeRow.GAMMA: torch.ones_like(raw) if gamma is None else gamma,
            ProbeRow.BETA: torch.zeros_like(raw) if beta is None else beta,
        }
        tables = torch.stack([rows[row].expand(size) for row in ProbeRow], 1)
        for layer, table in zip(group, tables.unbind(0), strict=True):
            layer.following = Following(table, eps=layer.eps)
            layer.following.settle = partial(settle_following, [layer])


@torch.no_grad()
def settle_following(layers: Sequence[_BatchlessNorm]) -> None:
    """Give the layers that followed their new statistics; ends the following of all."""
    found = {layer: layer.following.found for layer in layers if layer.following is not None}
    for group in by_kind([layer for layer, seen in found.items() if seen is not None], _kind):
        first = group[0]
        changes, stds = stack(found[layer] for layer in group).unbind(1)
        raws = raw_from_std(stds, first.eps)
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
    form = layer.eps, layer.weight is None
    return mean.shape, mean.dtype, mean.device, form
