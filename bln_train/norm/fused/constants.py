"""Works out the constants of folded layers, those of one kind side by side; the maths is in fused/function.py."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bln_train.norm.functional import std_from_raw, std_slope
from bln_train.norm.fused.function import Constants
from bln_train.norm.kernels.epilogue import Row
from bln_train.norm.standardize import StandardizedConv2d, standardize_weight
from bln_train.norm.update import by_kind, stack

if TYPE_CHECKING:
    from bln_train.norm.fused.layer import FoldedConvNorm


def measure(layer: FoldedConvNorm) -> Constants:
    """Constants for one forward and backward, whose gradients are autograd's business."""
    linear = layer.linear
    weight = standardize_weight(linear.weight) if isinstance(linear, StandardizedConv2d) else linear.weight
    return _measure([layer], [weight], [None], must_recompute([layer]), gather=False)[0]


def measure_once(
    layers: Sequence[FoldedConvNorm],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    recompute: Sequence[bool],
) -> list[Constants]:
    """Constants for many forwards and backwards, whose gradients gather in them.

    Args:
        weights: of each layer, as it enters the linear operation.
        scales: of each layer's filters, (C,), where they are standardised and centred.
        recompute: see `must_recompute`.
    """
    found: dict[int, Constants] = {}
    for group in by_kind(range(len(layers)), lambda n: (_kind(layers[n]), scales[n] is None, recompute[n])):
        some = [layers[n] for n in group]
        own = [weights[n] for n in group]
        measured = _measure(some, own, [scales[n] for n in group], [recompute[n] for n in group], gather=True)
        found.update(zip(group, measured, strict=True))
    return [found[n] for n in range(len(layers))]


def _kind(layer: FoldedConvNorm) -> Hashable:
    norm = layer.norm
    form = (norm.parametrization, norm.eps, norm.nll_scale, norm.gauge, norm.weight is None, norm.correction is None)
    return (
        norm.mean.shape,
        norm.mean.dtype,
        norm.mean.device,
        norm.num_features,
        form,
        layer.linear.bias is None,
        layer.channel is None,
        _imputes(layer),
    )


def _imputes(layer: FoldedConvNorm) -> bool:
    return layer.activation == "relu" and layer.channel is None and layer.norm.imputation is not None


@torch.no_grad()
def _measure(
    layers: Sequence[FoldedConvNorm],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    recompute: Sequence[bool],
    *,
    gather: bool,
) -> list[Constants]:
    """Constants of layers of one kind, (L, C) at a time."""
    first = layers[0]
    norm, norms = first.norm, [layer.norm for layer in layers]
    size = (len(layers), norm.num_features)
    mean, raw = stack(n.mean for n in norms), stack(n.raw_std for n in norms)
    std = std_from_raw(raw, norm.parametrization, norm.eps)
    bias = (-mean if first.linear.bias is None else stack(layer.linear.bias for layer in layers) - mean).expand(size)
    inverse = std.reciprocal().expand(size)
    if scales[0] is not None:
        iw = stack(scales)
        bias, inverse = bias / iw, inverse * iw
    zero = torch.zeros(size, dtype=mean.dtype, device=mean.device)
    scale, shift = inverse, zero
    offset = gain = gamma_scale = gamma_shift = spread = zero
    if norm.weight is not None:
        gamma, shift = stack(n.weight for n in norms), stack(n.bias for n in norms)
        scale, spread = gamma * inverse, 8 / math.pi * gamma * gamma
        gamma_scale = inverse if recompute[0] else gamma.reciprocal()
        gamma_shift = zero if recompute[0] else -shift / gamma
    if norm.correction is not None:
        if recompute[0]:  # q is yc
            gain = scale * inverse
        else:  # xhat is taken for (q - beta - hidden) / (gamma * slope)
            hidden, slope = stack(n.imputation for n in norms).unbind(1) if _imputes(first) else (zero, 1 + zero)
            gain = inverse / slope
            offset = -gain * (shift + hidden)

    # As in norm/functional.py, with sums of yc in the place of sums of xhat.
    per_std = norm.nll_scale / std
    to_raw = per_std * std_slope(raw, std, norm.parametrization)
    square = inverse * inverse
    share = norm.nll_scale * mean.shape[1] / norm.num_features  # of the likelihood's weight that a channel stands for
    rows = {
        Row.SCALE: scale,
        Row.SHIFT: shift,
        Row.OFFSET: offset,
        Row.GAIN: gain,
        Row.GAMMA_SCALE: gamma_scale,
        Row.GAMMA_SHIFT: gamma_shift,
        Row.NLL_SQUARE: share / 2 * square,
        Row.NLL_IMAGE: share * (zero - 0.5 if norm.gauge else std.log()),
        Row.MEAN_MOMENT: -per_std * inverse,
        Row.RAW_MOMENT: -to_raw * square,
        Row.RAW_IMAGE: to_raw,
        Row.SPREAD: spread,
        Row.INVERSE: inverse,
    }
    tables = torch.stack([rows[row].expand(size) for row in Row], 1)
    num = 4 if first.channel is None else 6
    gradients = (
        torch.zeros(len(layers), num, norm.num_features, dtype=mean.dtype, device=mean.device) if gather else None
    )
    bias = bias.contiguous()
    return [
        Constants(
            weights[n], layers[n].linear.bias, bias[n], scales[n], tables[n], norm.correction is not None, recompute[n],
            None if gradients is None else gradients[n],
        )
        for n in range(len(layers))
    ]  # fmt: skip


@torch.no_grad()
def must_recompute(layers: Sequence[FoldedConvNorm]) -> list[bool]:
    """Of each layer whether xhat cannot be read off z - r, or only by keeping what nothing else keeps; waits for the device."""

    def hidden(layer: FoldedConvNorm) -> bool:
        norm = layer.norm
        if norm.weight is None or layer.channel is not None or not layer.residual_is_kept or not layer.output_is_kept:
            return True
        return layer.activation == "relu" and norm.correction is not None and norm.imputation is None

    def tiny(layers: Sequence[FoldedConvNorm]) -> Tensor:
        # xhat = (z - r - beta) / gamma: rounding of z grows by |beta / gamma|. One small gamma is enough.
        gamma = torch.cat([layer.norm.weight for layer in layers if layer.norm.weight is not None])
        beta = torch.cat([layer.norm.bias for layer in layers if layer.norm.bias is not None])
        return (gamma.abs() < torch.finfo(gamma.dtype).eps ** 0.5 * beta.abs().clamp(min=1)).any()

    shown = [layer for layer in layers if not hidden(layer)]
    found = dict.fromkeys(shown, False)
    if shown and bool(tiny(shown)):  # the step waits for the device once, not once for each layer
        found = {layer: bool(tiny([layer])) for layer in shown}
    return [found.get(layer, True) for layer in layers]
