"""The statistics follow the weights: each layer's mean and std move by what the step did to the probe's images.

    mean += mean_new - mean_old;  log std += log(std_new / std_old)

mean_old and std_old are moments of the probe's images in the training forward, under the old weights. mean_new and
std_new are their moments under the new weights, layer after layer. The images are the same on both sides, so their
sampling noise cancels. The changes of earlier layers have in part been normalised away before a layer is measured.

Following in full undoes at once what the step did to mean and scale, which a corrected gradient (kernels/feedback.py)
was meant to leave alone. Following by half is no better, by a quarter much worse (recipes/RESULTS.md).

std_new / std_old is taken after adding (1e-4 + 1/n) * std^2 to both variances, for n positions, because:

* Where images barely vary the ratio says nothing.
* Few values say little about a variance. A dense layer has two values from two images. Now and then these all but
  agree, and their ratio would multiply std by any number, step after step.

Arithmetic that needs no image is done before and after the probe's forward, on L layers of one kind at once, (L, C).
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
