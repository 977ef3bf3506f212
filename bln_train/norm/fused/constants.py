"""Works out the constants of folded layers, those of one kind side by side; the maths is in fused/function.py."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from bln_train.norm.fused.parts import Constants, Parts
from bln_train.norm.kernels.table import Epilogue, Row
from bln_train.norm.standardize import StandardizedConv2d, standardize_weight
from bln_train.norm.update import by_kind, stack


def measure(layer: Parts) -> Constants:
    """Constants for one forward and backward, whose gradients are autograd's business."""
    linear = layer.linear
    weight = standardize_weight(linear.weight) if isinstance(linear, StandardizedConv2d) else linear.weight
    return _measure([layer], [weight], [None], gather=False)[0]


def measure_once(
    layers: Sequence[Parts],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
) -> list[Constants]:
    """Constants for many forwards and backwards, whose gradients gather in them.

    Args:
        weights: of each layer, as it enters the linear operation.
        scales: of each layer's filters, (C,), where they are standardised and centred.
    """
    found: dict[int, Constants] = {}
    for group in by_kind(range(len(layers)), lambda n: (_kind(layers[n]), scales[n] is None)):
        some = [layers[n] for n in group]
        own = [weights[n] for n in group]
        measured = _measure(some, own, [scales[n] for n in group], gather=True)
        found.update(zip(group, measured, strict=True))
    return [found[n] for n in range(len(layers))]


def _kind(layer: Parts) -> Hashable:
    norm = layer.norm
    form = (norm.weight is None, norm.correction is None)
    return (
        norm.mean.shape,
        norm.mean.dtype,
        norm.mean.device,
        norm.num_features,
        form,
        layer.linear.bias is None,
        layer.groups is None,
    )


@torch.no_grad()
def _measure(
    layers: Sequence[Parts],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    *,
    gather: bool,
) -> list[Constants]:
    """Constants of layers of one kind, (L, C) at a time."""
    first = layers[0]
    norm, norms = first.norm, [layer.norm for layer in layers]
    size = (len(layers), norm.num_features)
    mean, raw = stack(n.mean for n in norms), stack(n.raw_std for n in norms)
    std = raw.exp()
    bias = (-mean if first.linear.bias is None else stack(layer.linear.bias for layer in layers) - mean).expand(size)
    inverse = std.reciprocal().expand(size)
    if scales[0] is not None:
        iw = stack(scales)
        bias, inverse = bias / iw, inverse * iw
    zero = torch.zeros(size, dtype=mean.dtype, device=mean.device)
    inner, shift, outer = inverse, zero, torch.ones_like(zero)
    if norm.weight is not None:
        inner, shift = stack(n.weight for n in norms) * inverse, stack(n.bias for n in norms)
    if first.groups is not None:
        groups = [layer.groups for layer in layers if layer.groups is not None]
        outer, shift = stack(g.weight for g in groups), stack(g.bias for g in groups)

    # As in norm/functional.py, with sums of y in the place of sums of xhat.
    square, share = inverse * inverse, 1 / norm.num_features
    rows = {
        Row.INNER: inner,
        Row.SHIFT: shift,
        Row.INVERSE: inverse,
        Row.OUTER: outer,
        Row.NLL_SQUARE: share / 2 * square,
        Row.NLL_IMAGE: zero - share / 2,
        Row.MEAN_MOMENT: -share * inverse / std,
        Row.RAW_MOMENT: -share * square,
        Row.RAW_IMAGE: zero + share,
    }
    tables = torch.stack([rows[row].expand(size) for row in Row], 1)
    num = 4 if first.groups is None else 6
    gradients = (
        torch.zeros(len(layers), num, norm.num_features, dtype=mean.dtype, device=mean.device) if gather else None
    )
    bias = bias.contiguous()
    return [
        Constants(
            weights[n],
            layer.linear.bias,
            bias[n],
            scales[n],
            _epilogue(layer, tables[n]),
            None if gradients is None else gradients[n],
        )
        for n, layer in enumerate(layers)
    ]


def _epilogue(layer: Parts, table: Tensor) -> Epilogue:
    groups = layer.groups
    if groups is None:
        return Epilogue(table, relu=layer.relu)
    return Epilogue(table, groups.num_channels // groups.num_groups, groups.eps, layer.relu)
