"""A BatchNorm's state dict that is loaded into a batchless layer: taken as `convert.to_batchless` takes the BatchNorm."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bln_train.norm.functional import raw_from_std

if TYPE_CHECKING:
    from bln_train.norm.batchless import _BatchlessNorm

BATCHNORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def holds_batchnorm(state: MutableMapping[str, Tensor], prefix: str) -> bool:
    """Whether the entries under `prefix` are a BatchNorm's."""
    own = f"{prefix}running_mean" in state and f"{prefix}running_var" in state
    return own and f"{prefix}mean" not in state


@torch.no_grad()
def take_batchnorm(layer: _BatchlessNorm, state: MutableMapping[str, Tensor], prefix: str) -> str:
    """Replace a BatchNorm's entries under `prefix` by those of `layer`; returns why not, "" if it was done.

        mean = running_mean,   std = sqrt(running_var + layer.batchnorm_eps),   the same weight and bias

    Correction and imputation begin anew. Of parametrization `log` the layer's eps is lowered to the smallest standard deviation.
    """
    mean, std = state[f"{prefix}running_mean"], (state[f"{prefix}running_var"] + layer.batchnorm_eps).sqrt()
    if layer.share == "layer":
        return (
            "a BatchNorm has a mean and a standard deviation per channel, and this layer one for all: share='channel'"
        )
    if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        return "the BatchNorm's statistics are not finite, or a variance + eps is not positive"
    smallest, largest = float(std.min()), float(std.max())
    if layer.parametrization == "log":
        layer.eps = min(layer.eps, smallest)
    elif smallest < layer.eps or (layer.parametrization == "inv" and largest >= 1 / layer.eps):
        return f"the layer's eps, {layer.eps:g}, excludes the BatchNorm's standard deviations, {smallest:.3g} to {largest:.3g}"
    for key in BATCHNORM_KEYS[2:]:
        state.pop(f"{prefix}{key}", None)
    found = {"mean": mean, "raw_std": raw_from_std(std.clamp(min=layer.eps), layer.parametrization, layer.eps)}
    if layer.weight is not None and not layer.affine:
        found["weight"] = torch.ones_like(mean)
    if layer.bias is not None and (not layer.affine or f"{prefix}weight" in state):  # BatchNorm's bias=False
        found["bias"] = torch.zeros_like(mean)
    if layer.correction is not None:
        found["correction"] = mean.new_zeros(2, len(mean))
    if layer.imputation is not None:
        found["imputation"] = layer.first_imputation().to(mean)
    for key, value in found.items():
        state.setdefault(f"{prefix}{key}", value)
    return ""
