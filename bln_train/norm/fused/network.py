"""Fold a network's batchless norms into the convolutions before them, by tracing its forward with torch.fx."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.fused.check import why_different
from bln_train.norm.fused.foldable import what_is_around
from bln_train.norm.fused.forward import FusedForward
from bln_train.norm.fused.layer import FoldedConvNorm


@dataclass(frozen=True)
class FuseReport:
    """Which norms `fuse` folded."""

    folded: tuple[str, ...]
    """Names of the norms that are now part of the operation before them."""
    kept: dict[str, str]
    """Names of the others, and why each stays as it is."""


def fuse(model: nn.Module, *, check: Tensor | None = None, recompute: bool = True) -> FuseReport:
    """Make training forwards of `model` run each conv + batchless norm (+ residual) (+ relu) as one `FoldedConvNorm`, in place.

    Parameters, buffers, modules, state dict and the forward in eval mode stay what they are; a copy, and what is loaded from a
    pickle, is fused over its own parts. Only layers of known types are folded, to which nobody has added hooks, parametrisations or
    a forward. A network that torch.fx cannot trace, or whose forward depends on data, is left alone. So is one whose forward draws
    random numbers in Python, changes attributes of modules, or switches gradients or autocast in places. Traced is the forward of
    tensors, with the defaults of other arguments; called with others, the network runs unfused.

    Replace layers (conversion, a new head), add hooks, and set attributes that the forward asks for, before. After such a change
    call `unfuse`, then `fuse` again. What a forward asks of the type of an inner value, only `check` sees.

    Args:
        check: an example input, one image (1, C, *spatial) say, that goes forward and backward through both forms, in float64 and
            on the CPU, in copies: norms with which an output or gradient differs are not folded (fused/check.py).
        recompute: backward runs each folded convolution again, and training keeps what a network without norms keeps. Without it
            training keeps what BatchNorm keeps, and takes less time.

    Returns: what was folded and what was not, each with its reason.

    Raises:
        ValueError: the model is fused already.
    """
    if _forward_of(model) is not None:
        raise ValueError("the model is fused already; unfuse it first")
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchlessNorm)]
    around = what_is_around(model)
    if around == "has a forward of its own":
        return FuseReport((), dict.fromkeys(norms, f"the network {around}"))
    forward = FusedForward(model, recompute=recompute)
    if check is not None and forward.folded:
        forward = FusedForward(model, skipped=why_different(model, check), recompute=recompute)
    if forward.folded:
        model.forward = forward
    return FuseReport(tuple(forward.folded), forward.kept)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place; a model that is not fused stays as it is."""
    if _forward_of(model) is not None:
        del model.forward


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Change what `fuse` was told of `recompute`, between steps; a model that is not fused stays as it is."""
    forward = _forward_of(model)
    if forward is not None:
        forward.recompute = recompute
        for layer in forward.layers:
            layer.recompute = recompute


def folded_layers(model: nn.Module) -> list[FoldedConvNorm]:
    """The folded operations of a fused model, in the order of execution; none of another model."""
    forward = _forward_of(model)
    return [] if forward is None else list(forward.layers)


def _forward_of(model: nn.Module) -> FusedForward | None:
    forward = vars(model).get("forward")
    return forward if isinstance(forward, FusedForward) else None
