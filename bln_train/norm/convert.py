"""BatchNorm to Batchless Normalization and back, exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bln_train.norm.batchless import BatchlessNorm1d, BatchlessNorm2d, _BatchlessNorm

_TO_BATCHLESS: dict[type[_BatchNorm], type[_BatchlessNorm]] = {
    nn.BatchNorm1d: BatchlessNorm1d,
    nn.BatchNorm2d: BatchlessNorm2d,
}
_TO_BATCH = {batchless: batch for batch, batchless in _TO_BATCHLESS.items()}


def to_batchless(norm: _BatchNorm, **settings: Any) -> _BatchlessNorm:
    """Batchless layer that computes what `norm` computes in eval mode: mean = running_mean, std = sqrt(running_var + eps).

    Args:
        norm: BatchNorm1d or 2d with running statistics.
        settings: further arguments of the batchless layer; `correction_rate` defaults to 0 where norm is not affine.

    Raises:
        ValueError: norm keeps no running statistics (initialise from data instead), or is of another class.
    """
    target = next((new for old, new in _TO_BATCHLESS.items() if isinstance(norm, old)), None)
    if target is None:
        raise ValueError(f"{type(norm).__name__} has no batchless counterpart; BatchNorm1d and BatchNorm2d have")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            "the BatchNorm keeps no running statistics: build a batchless layer and initialise it from data"
        )
    if not norm.affine:
        settings.setdefault("correction_rate", 0.0)
    reference = norm.running_mean
    layer = target(norm.num_features, affine=norm.affine, device=reference.device, dtype=reference.dtype, **settings)
    copy_batchnorm(norm, layer)
    return layer.train(norm.training)


def copy_batchnorm(norm: _BatchNorm, layer: _BatchlessNorm) -> None:
    """Give an existing batchless layer the function of `norm`, which has running statistics; see `to_batchless`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    layer.set_statistics(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    _copy_affine(norm, layer)


def to_batch(norm: _BatchlessNorm, *, eps: float = 1e-5, momentum: float | None = 0.1) -> _BatchNorm:
    """BatchNorm that computes in eval mode what `norm` computes: running_mean = mean, running_var = std^2 - eps.

    Raises:
        ValueError: a standard deviation below sqrt(eps), which no BatchNorm with that eps can express.
    """
    variance = norm.std.detach().square() - eps
    if bool((variance < -1e-4 * eps).any()):  # below it only by rounding is a variance of 0
        raise ValueError(f"a standard deviation below sqrt(eps) = {eps**0.5:.3g} has no BatchNorm form; lower eps")
    layer = _TO_BATCH[type(norm)](
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
        layer.running_mean.copy_(norm.mean)
        layer.running_var.copy_(variance.clamp(min=0))
    _copy_affine(norm, layer)
    return layer.train(norm.training)


def _copy_affine(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for name in ("weight", "bias"):
            old, new = getattr(source, name), getattr(target, name)
            if old is not None:
                new.copy_(old)
                new.requires_grad_(old.requires_grad)


def convert_batchnorm(model: nn.Module, **settings: Any) -> nn.Module:
    """Replace every BatchNorm1d and BatchNorm2d inside `model` by its batchless counterpart, in place; see `to_batchless`.

    Returns: the model, or the new layer where `model` itself is a BatchNorm. A layer used in two places stays one layer.
    """
    return replace_modules(model, _BatchNorm, lambda norm: to_batchless(norm, **settings))


def convert_to_batchnorm(model: nn.Module, *, eps: float = 1e-5) -> nn.Module:
    """Replace every batchless layer inside `model` by a BatchNorm, in place; see `to_batch`."""
    return replace_modules(model, _BatchlessNorm, lambda norm: to_batch(norm, eps=eps))


def replace_modules(model: nn.Module, kind: type[nn.Module], convert: Any) -> nn.Module:
    """Replace every module of a kind inside `model` by `convert(module)`, in place; one used in two places stays one."""
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = module if not isinstance(module, kind) else convert(module)
            for name, child in list(module._modules.items()) if done[module] is module else []:
                if child is not None:
                    setattr(module, name, visit(child))
        return done[module]

    return visit(model)
