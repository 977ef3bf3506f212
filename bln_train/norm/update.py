"""Updates of batchless layers from the gradients of an effective batch: correction, natural step, the probe's moments.

L layers of one kind are computed at once, (L, C). Their vectors are short, and a call costs more than its arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from bln_train.norm.accounts import Account
from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.functional import raw_from_std
from bln_train.norm.kernels.feedback import begin_feedback, regression
from bln_train.norm.replay import Run, addresses, at_once

T = TypeVar("T")


def by_kind(items: Iterable[T], kind: Callable[[T], Hashable]) -> list[list[T]]:
    """The items that share a kind, kinds in the order of their first item."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return list(groups.values())


def stack(vectors: Iterable[Tensor | None]) -> Tensor:
    """(C,) of each of L layers to (L, C)."""
    return torch.stack([vector.detach() for vector in vectors if vector is not None])


def finite_or(new: Tensor, old: Tensor) -> Tensor:
    """The new values, and the old ones where those are not finite: of a step that a gradient scaler will skip."""
    return torch.where(new.isfinite(), new, old)


class _Moments(NamedTuple):
    """What the gradients of the likelihood say of a layer's last effective batch."""

    first: Tensor
    second: Tensor
    nll: Tensor


class _Said(NamedTuple):
    """What an effective batch said of some layers; those that it said nothing of are missing."""

    nll: Tensor
    """(L,)"""
    probe: dict[_BatchlessNorm, tuple[Tensor, Tensor]]
    """Mean and variance of the probe's images."""
    moments: dict[_BatchlessNorm, _Moments]


def update_layers(layers: Sequence[_BatchlessNorm], num_images: int, run: Run = at_once) -> Tensor:
    """Take what the gradients of one effective batch say of some layers: correction and natural step.

    With m1, m2 the batch's means of xhat and xhat^2:  mean += rate*std*m1;  std *= sqrt(1 + rate*(m2 - 1)).
    Call it between the last backward and anything that changes gradients (clipping) or parameters.

    Args:
        num_images: images of the effective batch, the loss being their mean.

    Returns: (L,), each layer's nll per image, unweighted, averaged over channels; NaN where the statistics are frozen or the
        layer saw no image.
    """
    said = run(lambda: _update(layers, num_images), lambda: ("update", num_images, *map(_inputs, layers)))
    for layer, old in said.probe.items():
        layer.old_moments = old if may_follow(layer) else None
    for layer, found in said.moments.items():
        layer.first_moment, layer.second_moment = found.first, found.second
    for layer in layers:
        layer.drop_gradients()
        layer.account = Account()
    begin_feedback([layer.feedback for layer in layers if layer.feedback is not None], None)
    return said.nll.clone()  # a replay will write there again


def _inputs(layer: _BatchlessNorm) -> Hashable:
    """What the update of a layer depends on besides the values of tensors."""
    account, parameters = layer.account, (layer.mean, layer.raw_std, layer.weight, layer.bias)
    counts = (account.num_images, account.num_positions, account.num_watched)
    gradients = addresses([None if parameter is None else parameter.grad for parameter in parameters])
    moves = (layer.training, *(parameter is not None and parameter.requires_grad for parameter in parameters))
    return counts, moves, gradients, addresses([account.watched, account.unit])


@torch.no_grad()
def _update(layers: Sequence[_BatchlessNorm], num_images: int) -> _Said:
    said = _Said(torch.empty(0), {}, {})
    seen = [layer for layer in layers if layer.account.num_images and layer.training]
    for group in by_kind([layer for layer in seen if layer.account.watched is not None], _watched_kind):
        said.probe.update(_note_watched(group))
    for group in by_kind([layer for layer in seen if _learns_correction(layer)], _correction_kind):
        _learn_correction(group, num_images)
    for group in by_kind(
        [layer for layer in seen if any(_learns(layer))], lambda layer: (_kind(layer), _learns(layer))
    ):
        said.moments.update(_follow_gradients(group, num_images))
    missing = torch.full((), torch.nan, device=layers[0].mean.device, dtype=layers[0].mean.dtype)
    nll = [said.moments[layer].nll if layer in said.moments else missing for layer in layers]
    return said._replace(nll=torch.stack(nll))


def _kind(layer: _BatchlessNorm) -> Hashable:
    mean, rule = layer.mean, (layer.eps, layer.statistics_rate, layer.account.num_images)
    return mean.shape, mean.dtype, mean.device, rule


def _watched_kind(layer: _BatchlessNorm) -> Hashable:
    return _kind(layer), layer.account.num_watched, layer.account.unit is None


def may_follow(layer: _BatchlessNorm) -> bool:
    """Whether the layer may follow the probe, which moves mean and standard deviation together."""
    return layer.training and layer.mean.requires_grad and layer.raw_std.requires_grad


def _learns(layer: _BatchlessNorm) -> tuple[bool, bool]:
    """Whether there is a gradient of the mean, and of raw_std: frozen ones have none."""
    return _has_gradient(layer.mean), _has_gradient(layer.raw_std)


def _has_gradient(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad and parameter.grad is not None


def _correction_kind(layer: _BatchlessNorm) -> Hashable:
    return _kind(layer), layer.account.num_positions, layer.correction_rate, all(_learns(layer))


def _learns_correction(layer: _BatchlessNorm) -> bool:
    return layer.correction is not None and _has_gradient(layer.weight) and _has_gradient(layer.bias)


def _note_watched(layers: Sequence[_BatchlessNorm]) -> dict[_BatchlessNorm, tuple[Tensor, Tensor]]:
    """Turn the probe's sums into its mean and variance under the old weights."""
    first = layers[0]
    shift, square = (stack(layer.account.watched for layer in layers) / first.account.num_watched).unbind(1)
    unit = None if first.account.unit is None else stack(layer.account.unit for layer in layers)
    mean = stack(layer.mean for layer in layers)
    old_mean, old_variance = moments(mean, shift, square, unit)
    return dict(zip(layers, zip(old_mean.unbind(0), old_variance.unbind(0), strict=True), strict=True))


def moments(mean: Tensor, shift: Tensor, square: Tensor, unit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of x, (..., C), from the means of y = (x - mean) / unit and of y^2, (..., C)."""
    if unit is not None:
        shift, square = shift * unit, square * unit * unit
    return mean + shift, (square - shift * shift).clamp_(min=0)


def _learn_correction(layers: Sequence[_BatchlessNorm], num_images: int) -> None:
    first, account = layers[0], layers[0].account
    # Positions of the effective batch per use: a network may use the layer twice.
    positions = account.num_positions / account.num_images * (account.num_images / num_images)
    of_bias = stack(layer.bias.grad for layer in layers if layer.bias is not None)
    of_weight = stack(layer.weight.grad for layer in layers if layer.weight is not None)
    seen = (of_bias / positions, of_weight / positions)
    knows = all(_learns(first))  # frozen statistics have no gradient that says what the moments are
    m1, excess = _moments_of(layers, num_images) if knows else (torch.zeros_like(of_bias),) * 2
    found = regression(seen, (m1, excess + 1)).transpose(0, 1)
    corrections = [layer.correction for layer in layers if layer.correction is not None]
    found = torch.where(
        found.isfinite().all(1, keepdim=True), found, stack(corrections)
    )  # a step that a scaler will skip
    torch._foreach_lerp_(corrections, list(found.unbind(0)), first.correction_rate)


def _moments_of(layers: Sequence[_BatchlessNorm], num_images: int) -> tuple[Tensor, Tensor]:
    """m1 and m2 - 1 of an effective batch, (L, C), off the gradients of the likelihood; NaN for what is frozen."""
    first = layers[0]
    std = stack(layer.raw_std for layer in layers).exp()
    scale = -(first.account.num_images / num_images) / first.num_features
    unknown = torch.full_like(std, torch.nan)
    has_mean, has_std = _learns(first)
    m1 = stack(layer.mean.grad for layer in layers) * std / scale if has_mean else unknown
    return m1, stack(layer.raw_std.grad for layer in layers) / scale if has_std else unknown


def likelihood_moments(layer: _BatchlessNorm, num_images: int) -> tuple[Tensor, Tensor]:
    """Means of xhat and of xhat^2 of an effective batch, (C,) each, off the gradients of the likelihood."""
    m1, excess = _moments_of([layer], num_images)
    return m1[0], excess[0] + 1


def _follow_gradients(layers: Sequence[_BatchlessNorm], num_images: int) -> dict[_BatchlessNorm, _Moments]:
    """Read m1 and m2 off the gradients of the likelihood, and take the natural step."""
    first = layers[0]
    mean, raw = stack(layer.mean for layer in layers), stack(layer.raw_std for layer in layers)
    std = raw.exp()
    m1, excess = _moments_of(layers, num_images)
    rate = first.statistics_rate
    growth = (1 + rate * excess).clamp(min=0).sqrt()
    new_raw = raw_from_std(std * growth, first.eps)
    has_mean, has_std = _learns(first)
    if has_mean:
        new_mean = finite_or(torch.addcmul(mean, std, m1, value=rate), mean)
        torch._foreach_copy_([layer.mean for layer in layers], list(new_mean.unbind(0)))
    if has_std:
        torch._foreach_copy_([layer.raw_std for layer in layers], list(finite_or(new_raw, raw).unbind(0)))
    nll = excess.mean(1) / 2
    parts = zip(m1.unbind(0), (excess + 1).unbind(0), nll.unbind(0), strict=True)
    return dict(zip(layers, itertools.starmap(_Moments, parts), strict=True))
