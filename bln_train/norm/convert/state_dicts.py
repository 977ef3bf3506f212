"""BatchNorm to Batchless Normalization and back in state dicts, where layers are known by their keys alone.

    BatchNorm   P.running_mean, P.running_var, P.num_batches_tracked    and, where affine, P.weight, P.bias
    batchless   P.mean, P.raw_std, P.correction                         and the same

A converted state dict equals that of the converted network: raw_std is log std, corrections start at 0.

A network holds a batchless layer with groups of channels (BatchlessChannelNorm) as two layers, P.0 and P.1. A plain
file holds it as one layer P, with weight and bias of the groups and their number, P.num_groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bln_train.norm.convert.layers import variance_from_std

State = dict[str, Tensor]
_BATCHNORM = ("running_mean", "running_var")
_BATCHLESS = ("mean", "raw_std")
NUM_GROUPS = "num_groups"
_LEFT_BEHIND = ("num_batches_tracked", "correction")


class Change(NamedTuple):
    """A layer that was converted."""

    layer: str
    num_channels: int
    smallest_std: float
    largest_std: float


def batchnorm_layers(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers with a running mean or variance, in the order of the state dict."""
    return _layers(state, _BATCHNORM)


def batchless_layers(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the batchless layers, in the order of the state dict."""
    means = _layers(state, _BATCHLESS[:1])  # other modules too may have a `mean`
    return [name for name in _layers(state, _BATCHLESS[1:]) if name in means]


def state_to_batchless(state: Mapping[str, Tensor], eps: Mapping[str, float]) -> tuple[State, list[Change]]:
    """State dict with every BatchNorm batchless: mean = running_mean, raw_std = log sqrt(running_var + eps).

    Args:
        eps: of each of `batchnorm_layers`.

    Raises:
        ValueError: a line for every layer that is incomplete, of contradicting shapes, or without a standard deviation.
    """

    def convert(name: str) -> tuple[State, Tensor]:
        mean, variance = (state.get(f"{name}.{key}") for key in _BATCHNORM)
        _check(mean, variance, state.get(f"{name}.weight"), state.get(f"{name}.bias"))
        assert mean is not None
        assert variance is not None
        std = (variance.double() + eps[name]).sqrt()
        if not bool(std.isfinite().all() and (std > 0).all()):
            raise ValueError("its variance + eps is not positive and finite")
        new = {"mean": _keep(mean, mean.dtype), "raw_std": _keep(std.log(), variance.dtype)}
        if f"{name}.weight" in state:
            new["correction"] = torch.zeros(2, len(mean), dtype=new["mean"].dtype)
            if f"{name}.bias" not in state:  # torch's bias=False; a batchless layer has both or none
                new["bias"] = torch.zeros_like(state[f"{name}.weight"])
        return new, std

    return _convert(state, batchnorm_layers(state), convert)


def state_to_batch(
    state: Mapping[str, Tensor],
    eps: Mapping[str, float],
    *,
    std_from_raw: Callable[[Tensor], Tensor] = torch.exp,
) -> tuple[State, list[Change]]:
    """State dict with every batchless layer a BatchNorm: running_mean = mean, running_var = std^2 - eps.

    Args:
        eps: of the BatchNorm in place of each of `batchless_layers`.
        std_from_raw: the standard deviation that a `raw_std` in float64 stands for; the published layer has others.

    Raises:
        ValueError: a line for every layer that is incomplete, of contradicting shapes, or without a BatchNorm form.
    """

    def convert(name: str) -> tuple[State, Tensor]:
        mean, raw = (state[f"{name}.{key}"] for key in _BATCHLESS)
        weight = state.get(f"{name}.weight")
        if weight is not None and mean.shape == raw.shape == (1,):  # shared by the channels
            mean, raw = mean.expand(len(weight)), raw.expand(len(weight))
        _check(mean, raw, weight, state.get(f"{name}.bias"))
        std = std_from_raw(raw.double())
        if not bool(std.isfinite().all() and (std > 0).all()):
            raise ValueError("its standard deviation is not positive and finite")
        variance = variance_from_std(std, eps[name])
        new = {"running_mean": _keep(mean, mean.dtype), "running_var": _keep(variance, raw.dtype)}
        return new | {"num_batches_tracked": torch.tensor(0)}, std

    return _convert(state, batchless_layers(state), convert)


def groups_as_one_layer(state: Mapping[str, Tensor], num_groups: int) -> State:
    """State dict of a network whose batchless layers all have groups of channels behind them, each as one layer of a plain file.

    Raises:
        ValueError: a line for every layer without groups.
    """
    parts = {f"{layer}.": layer.removesuffix(".0") for layer in batchless_layers(state)}
    missing = [layer for layer in parts.values() if f"{layer}.1.weight" not in state or f"{layer}.1.bias" not in state]
    if missing:
        raise ValueError("\n".join(f"{layer}: it has no groups of channels" for layer in missing))
    parts |= {f"{layer}.1.": layer for layer in parts.values()}
    new: State = {}
    for key, tensor in state.items():
        begin, dot, own = key.rpartition(".")
        if begin + dot not in parts:
            new[key] = tensor
        elif not (begin.endswith(".0") and own in ("weight", "bias")):  # 1 and 0, which nothing changes
            layer = parts[begin + dot]
            new[f"{layer}.{own}"] = tensor
            new.setdefault(f"{layer}.{NUM_GROUPS}", torch.tensor(num_groups))
    return new


def layers_with_groups(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of groups of each batchless layer of a plain file that has some.

    Raises:
        ValueError: a line for every layer whose number is none.
    """
    numbers = {
        layer: state[f"{layer}.{NUM_GROUPS}"] for layer in batchless_layers(state) if f"{layer}.{NUM_GROUPS}" in state
    }
    problems = [
        f"{layer}: its {NUM_GROUPS} is no positive integer"
        for layer, number in numbers.items()
        if number.numel() != 1 or number.dtype != torch.int64 or number.item() < 1
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return {layer: int(number) for layer, number in numbers.items()}


def _layers(state: Mapping[str, Tensor], keys: Iterable[str]) -> list[str]:
    found = (name.rpartition(".") for name in state)
    return list(dict.fromkeys(layer for layer, dot, key in found if dot and key in keys))


def _check(mean: Tensor | None, spread: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError unless a layer's tensors are complete and of one shape, (C,)."""
    if mean is None or spread is None:
        raise ValueError("it has only one of mean and variance")
    if mean.dim() != 1 or not len(mean):
        raise ValueError(f"its statistics are of shape {tuple(mean.shape)}, not a number per channel")
    if any(tensor is not None and tensor.shape != mean.shape for tensor in (spread, weight, bias)):
        raise ValueError("its tensors differ in shape")
    if not (mean.is_floating_point() and spread.is_floating_point() and bool(mean.isfinite().all())):
        raise ValueError("its statistics are not finite")


def _keep(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the file's type; 16 bits would lose a digit of the logarithm, so float32 at least."""
    return tensor.detach().to(torch.promote_types(dtype, torch.float32), copy=True)


def _convert(
    state: Mapping[str, Tensor], layers: list[str], convert: Callable[[str], tuple[State, Tensor]]
) -> tuple[State, list[Change]]:
    """Replace the statistics of all layers where the first of them stands, or raise ValueError with every problem."""
    converted: dict[str, State] = {}
    changes, problems = list[Change](), list[str]()
    for name in layers:
        try:
            converted[name], std = convert(name)
            changes.append(Change(name, len(std), float(std.min()), float(std.max())))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    new: State = {}
    old_keys = (*_BATCHNORM, *_BATCHLESS, *_LEFT_BEHIND)
    for key, tensor in state.items():
        layer, _, own = key.rpartition(".")
        if layer in converted and own in old_keys:
            for fresh, value in converted[layer].items():
                new.setdefault(f"{layer}.{fresh}", value)
        else:
            new[key] = tensor
    return new, changes
