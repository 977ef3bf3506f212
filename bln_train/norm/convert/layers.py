"""BatchNorm to Batchless Normalization and back, exactly: layers and whole networks; state dicts in `state_dicts.py`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.batchless import BatchlessNorm, BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d, _BatchlessNorm
from bln_train.norm.batchnorm_state import BATCHNORM_KEYS, holds_batchnorm
from bln_train.norm.dropout import keep_masks
from bln_train.norm.replace import replace

_TO_BATCHLESS: dict[type[_BatchNorm], type[_BatchlessNorm]] = {
    nn.BatchNorm1d: BatchlessNorm1d,
    nn.BatchNorm2d: BatchlessNorm2d,
    nn.BatchNorm3d: BatchlessNorm3d,
    nn.SyncBatchNorm: BatchlessNorm,
}
_TO_BATCH = {batchless._dims: batch for batch, batchless in _TO_BATCHLESS.items()}
# Classes whose forward is their own, and known: library and name. The frozen ones are no subclasses of BatchNorm.
_WITH_ACTIVATION = {("timm", "BatchNormAct2d"), ("timm", "SyncBatchNormAct"), ("timm", "FrozenBatchNormAct2d")}
_FROZEN = {("torchvision", "FrozenBatchNorm2d"), ("timm", "FrozenBatchNormAct2d")}
_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_LARGEST_EPS = 1e-3  # the batchless layers' default


class NormAct(nn.Sequential):
    """A norm, then a drop layer, then an activation: what timm's BatchNormAct2d does, in parts that torch.fx sees."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(OrderedDict(norm=norm, drop=drop, act=act))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Takes the state dict of what it replaced too, whose entries are the norm's."""
        if holds_batchnorm(state_dict, prefix):
            for key in BATCHNORM_KEYS:
                if prefix + key in state_dict:
                    state_dict[f"{prefix}norm.{key}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *others)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm: torch.nn's, a subclass, or torchvision's or timm's frozen one."""
    return isinstance(module, _BatchNorm) or _origin(module) in _FROZEN


def has_activation(norm: nn.Module) -> bool:
    """Whether a BatchNorm has a drop layer and an activation inside, as timm's have."""
    return _origin(norm) in _WITH_ACTIVATION


def _origin(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__.partition(".")[0], type(module).__name__


def why_not_convertible(norm: nn.Module) -> str:
    """Why a BatchNorm has no batchless counterpart with the same function in eval mode; "" if it has one."""
    if not (_origin(norm) in _FROZEN | _WITH_ACTIVATION or type(norm).forward in _PLAIN_FORWARDS):
        return "its forward is its own, and may do something else than normalise"
    mean: Any = norm.running_mean
    variance: Any = norm.running_var
    if mean is None or variance is None:
        return "it keeps no running statistics; they can be taken from data"
    if nn.parameter.is_lazy(mean):
        return "it has not seen any input yet"
    if not bool(mean.isfinite().all() and variance.isfinite().all() and (variance + norm.eps > 0).all()):
        return "its statistics are not finite, or a variance + eps is not positive"
    return ""


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that a BatchNorm normalises by in eval mode, (C,) each."""
    mean: Any = norm.running_mean
    variance: Any = norm.running_var
    return mean, (variance + norm.eps).sqrt()


def to_batchless(norm: nn.Module, **settings: Any) -> nn.Module:
    """Batchless layer that computes what `norm` computes in eval mode: mean = running_mean, std = sqrt(running_var + eps).

    A frozen norm's counterpart learns. One with an activation inside becomes a NormAct. SyncBatchNorm's counterpart takes any
    number of axes, and needs no synchronising: its gradients are summed like any other's.

    Args:
        norm: BatchNorm1d, 2d, 3d or SyncBatchNorm with running statistics, torchvision's FrozenBatchNorm2d, timm's BatchNormAct2d,
            SyncBatchNormAct or FrozenBatchNormAct2d.
        settings: further arguments of the batchless layer; `eps` defaults to at most the smallest standard deviation, and
            `correction_rate` to 0 where norm is not affine.

    Raises:
        ValueError: norm keeps no running statistics (initialise from data instead), is of another class, or has a standard
            deviation that a batchless layer with these settings has not.
    """
    problem = why_not_convertible(norm) if is_batchnorm(norm) else "it is no BatchNorm"
    if problem:
        raise ValueError(f"{type(norm).__name__} has no batchless counterpart: {problem}")
    mean, std = _statistics(norm)
    affine = norm.weight is not None
    if not affine:
        settings.setdefault("correction_rate", 0.0)
    settings.setdefault("eps", min(_LARGEST_EPS, float(std.min())))
    target = next((new for old, new in _TO_BATCHLESS.items() if isinstance(norm, old)), BatchlessNorm2d)
    layer = target(len(mean), affine=affine, device=mean.device, dtype=mean.dtype, **settings)
    layer.batchnorm_eps = float(norm.eps)  # type: ignore[arg-type]  # to mypy an attribute of a module is a tensor
    copy_batchnorm(norm, layer)
    layer.train(norm.training)
    return with_activation_of(norm, layer)


def with_activation_of(norm: nn.Module, layer: nn.Module) -> nn.Module:
    """`layer`, followed by what a BatchNorm has inside besides the norm."""
    if not has_activation(norm):
        return layer
    parts = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))
    return NormAct(layer, *parts).train(norm.training)


@torch.no_grad()
def copy_batchnorm(norm: nn.Module, layer: LikelihoodNorm) -> None:
    """Give an existing batchless layer the function of `norm`, which has running statistics; see `to_batchless`.

    Raises:
        ValueError: the layer shares its statistics over channels, or its eps excludes a trained standard deviation.
    """
    copy_batchnorm_statistics(norm, layer)
    _copy_affine(norm, layer)


def copy_batchnorm_statistics(norm: nn.Module, layer: LikelihoodNorm) -> None:
    """`copy_batchnorm` without weight and bias."""
    mean, std = _statistics(norm)
    if layer.is_shared:
        raise ValueError("norm.share: a trained BatchNorm has a mean and standard deviation per channel; use channel")
    smallest, largest = float(std.min()), float(std.max())
    if smallest < layer.eps * (1 - 1e-6):  # lower only by rounding is the layer's default
        raise ValueError(f"norm.eps is {layer.eps:g}, above a trained standard deviation, {smallest:.3g}; lower it")
    if largest >= layer.largest_std:
        raise ValueError(
            f"norm.eps is {layer.eps:g}, which bounds standard deviations by {layer.largest_std:g}; lower it"
        )
    layer.set_statistics(mean, std)


def to_batch(norm: LikelihoodNorm, *, eps: float = 1e-5, momentum: float | None = 0.1) -> _BatchNorm:
    """BatchNorm that computes in eval mode what `norm` computes: running_mean = mean, running_var = std^2 - eps.

    Raises:
        ValueError: a standard deviation below sqrt(eps), which no BatchNorm with that eps can express.
    """
    variance = variance_from_std(norm.std.detach(), eps)
    layer = _TO_BATCH[norm._dims](
        norm.num_features,
        eps=eps,
        momentum=momentum,
        affine=norm.affine,
        device=norm.mean.device,
        dtype=norm.mean.dtype,
    )
    assert layer.running_mean is not None
    assert layer.running_var is not None
    with torch.no_grad():
        layer.running_mean.copy_(norm.mean)  # (1,) where channels share it
        layer.running_var.copy_(variance)
    _copy_affine(norm, layer)
    return layer.train(norm.training)


def variance_from_std(std: Tensor, eps: float) -> Tensor:
    """Running variance with which a BatchNorm with that eps divides by `std`: std^2 - eps.

    Raises:
        ValueError: a standard deviation below sqrt(eps).
    """
    variance = std.square() - eps
    if bool((variance < -1e-4 * eps).any()):  # below it only by rounding is a variance of 0
        raise ValueError(
            f"a standard deviation of {float(std.min()):.3g}, below sqrt(eps) = {eps**0.5:.3g}, has no BatchNorm form; lower eps"
        )
    return variance.clamp(min=0)


def _copy_affine(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for name in ("weight", "bias"):
            old, new = getattr(source, name), getattr(target, name)
            if old is not None and new is not None:  # without `affine` a batchless layer's are 1 and 0
                new.copy_(old)
                if isinstance(old, nn.Parameter):  # not a frozen norm's buffer
                    new.requires_grad_(old.requires_grad)


def convert_batchnorm(model: nn.Module, **settings: Any) -> nn.Module:
    """Replace every BatchNorm inside `model` by its batchless counterpart, in place: the same function in eval mode.

        mean = running_mean,   std = sqrt(running_var + eps),   the same weight and bias

    A state dict with BatchNorm that is loaded later is converted in the same way. Dropout and stochastic depth become those of
    norm/dropout.py, see `keep_masks`.

    Args:
        model: torch.nn's BatchNorms and SyncBatchNorm, torchvision's and timm's frozen ones, and timm's with an activation.
        settings: further arguments of the new layers, see `BatchlessNorm` and `to_batchless`.

    Returns: the model, or the new layer where `model` itself is a BatchNorm. A layer used in two places stays one layer.

    Raises:
        ValueError: names every layer that cannot be converted; the model is unchanged then.
    """
    return keep_masks(_replace_all(model, is_batchnorm, lambda norm: to_batchless(norm, **settings)))


def convert_to_batchnorm(model: nn.Module, *, eps: float = 1e-5) -> nn.Module:
    """Replace every batchless layer inside `model` by a BatchNorm, in place: the same function in eval mode; see `to_batch`.

    Args:
        model: what is to be used where only BatchNorm is known.
        eps: of the new layers; no variance of the old ones may be below it.

    Returns: the model, or the new layer where `model` itself is a batchless one.

    Raises:
        ValueError: names every layer that cannot be converted; the model is unchanged then.
    """

    def convert(norm: nn.Module) -> nn.Module:
        assert isinstance(norm, LikelihoodNorm)
        return to_batch(norm, eps=eps)

    return _replace_all(model, lambda module: isinstance(module, LikelihoodNorm), convert)


def _replace_all(
    model: nn.Module, matches: Callable[[nn.Module], bool], convert: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Replace all modules that match, or none."""
    new: dict[nn.Module, nn.Module] = {}
    problems = []
    for name, module in model.named_modules():
        if matches(module):
            try:
                new[module] = convert(module)
            except ValueError as error:
                problems.append(f"{name}: {error}" if name else str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return replace(model, new.__contains__, new.__getitem__)


def replace_batchnorms(model: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace every BatchNorm inside `model` by `convert(norm)`, in place, or none; raises ValueError, naming the layers."""
    return _replace_all(model, is_batchnorm, convert)
