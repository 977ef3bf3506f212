"""Which layers may become part of a folded one: known types, to which nobody has added anything, of the shapes it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bln_train.norm.batchless import BatchlessNorm, BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d, _BatchlessNorm
from bln_train.norm.standardize import StandardizedConv2d

NUM_AXES: dict[type[nn.Module], int] = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, StandardizedConv2d: 4}
"""Of the input that a folded layer takes. Exactly these types: a subclass may do something else."""
_NORMS = (BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d, BatchlessNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def what_is_around(module: nn.Module) -> str:
    """What somebody has put around a module's forward, as the end of a sentence; "" for nothing."""
    if "forward" in vars(module):
        return "has a forward of its own"
    if is_parametrized(module):
        return "has parametrised weights"
    return "has hooks" if any(getattr(module, name) for name in _HOOKS) else ""


def what_is_added(module: nn.Module) -> str:
    """What somebody has added to a layer and a folded one would leave out, as the end of a sentence; "" for nothing."""
    around = what_is_around(module)
    if around:
        return around
    if any(isinstance(value, Tensor) for value in vars(module).values()):  # pruning
        return "computes its weights"
    hooks = (p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters(recurse=False))
    return "has weights with hooks" if any(hooks) else ""


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this type, and nobody has added anything."""
    return module is not None and type(module) is kind and not what_is_added(module)


def why_not_foldable(linear: nn.Module, norm: nn.Module) -> str:
    """Why `linear` and `norm` cannot be one operation; "" if they can."""
    if type(norm) not in _NORMS:
        known = isinstance(norm, _BatchlessNorm)
        return f"{type(norm).__name__} is {'a subclass' if known else 'not'} {'of ' if known else ''}a batchless norm"
    kind = next((kind for kind in NUM_AXES if isinstance(linear, kind)), None)
    added = what_is_added(linear) if kind is not None else ""
    if added:  # first: a parametrised layer is of a type made for it
        return f"the {_name(linear)} before it {added}"
    if kind is None:
        return f"its input comes from {type(linear).__name__}, not from a convolution or linear layer"
    if type(linear) not in NUM_AXES:
        return f"its input comes from {type(linear).__name__}, a {kind.__name__} that may do something else"
    if what_is_added(norm):
        return f"it {what_is_added(norm)}"
    return _why_they_do_not_fit(linear, norm)


def _name(linear: nn.Module) -> str:
    return "linear layer" if isinstance(linear, nn.Linear) else "convolution"


def _why_they_do_not_fit(linear: Any, norm: Any) -> str:
    if not isinstance(linear, nn.Linear) and (linear.padding_mode != "zeros" or isinstance(linear.padding, str)):
        return f"the convolution pads by '{linear.padding if isinstance(linear.padding, str) else linear.padding_mode}'"
    if linear.weight.shape[0] != norm.num_features:
        return f"the linear layer has {linear.weight.shape[0]} outputs, the norm {norm.num_features} channels"
    if NUM_AXES[type(linear)] not in norm._dims:
        return f"{type(norm).__name__} does not take what {type(linear).__name__} gives"
    if linear.weight.dtype != norm.mean.dtype:
        return f"the weights before it are {linear.weight.dtype}, its statistics {norm.mean.dtype}"
    return ""


def shape_after(linear: Any, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Shape of the output for an input of a shape, None where a folded layer does not take it."""
    if len(shape) != NUM_AXES[type(linear)] or 0 in shape:
        return None
    if isinstance(linear, nn.Linear):
        return (shape[0], linear.out_features) if shape[1] == linear.in_features else None
    if shape[1] != linear.in_channels:
        return None
    spatial = tuple(
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            shape[2:], linear.padding, linear.dilation, linear.kernel_size, linear.stride, strict=True
        )
    )
    return None if min(spatial) < 1 else (shape[0], linear.out_channels, *spatial)


def fits_residual(shape: tuple[int, ...], residual: Sequence[int]) -> bool:
    """Whether a residual of a shape can be added into an output of a shape."""
    try:
        return torch.broadcast_shapes(shape, tuple(residual)) == shape
    except RuntimeError:
        return False


def keeps_shape(linear: Any) -> bool:
    """Whether the output has the input's shape."""
    if isinstance(linear, nn.Linear):
        return bool(linear.in_features == linear.out_features)
    return linear.in_channels == linear.out_channels and all(
        stride == 1 and 2 * padding == dilation * (kernel - 1)
        for stride, padding, dilation, kernel in zip(
            linear.stride, linear.padding, linear.dilation, linear.kernel_size, strict=True
        )
    )
