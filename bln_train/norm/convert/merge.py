"""Merge a network's norms into the convolutions before them, for inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.fused.network import unfuse
from bln_train.norm.fused.trace import calls, module_before, trace
from bln_train.norm.replace import replace_modules
from bln_train.norm.standardize import StandardizedConv2d, conv_like, standardize_weight

_AFFINE_IN_EVAL = (LikelihoodNorm, _BatchNorm)
_NORMS = (*_AFFINE_IN_EVAL, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
# Exactly these: a subclass may do something else with its weight.
_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_MAP_IS_LINEAR = "its input does not come from a convolution or linear layer"


@dataclass(frozen=True)
class MergeReport:
    """What `merge_norms` made of each norm, by its name."""

    merged: tuple[str, ...]
    """Norms that are part of the weights before them now."""
    maps: dict[str, str]
    """Norms that became a `ChannelMap`, and why they could not be merged."""
    kept: dict[str, str]
    """Norms that are still norms, and why."""


class ChannelMap(nn.Module):
    """What a norm with fixed statistics is in eval mode.

        out = weight * x + bias

    Args:
        weight, bias: (C,) each.

    Shapes: (N, C, *spatial) to the same.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = _fixed(weight), _fixed(bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        shape = (-1, *([1] * (x.dim() - 2)))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))

    def extra_repr(self) -> str:
        """Arguments, as torch.nn layers print theirs."""
        return f"{len(self.weight)}"


class _AfterLinear(nn.Module):
    """In place of a norm merged into a linear layer: passes (N, C) on; of (N, L, C) the norm's channels were another axis."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"a norm was merged into the linear layer before it, which then takes (N, features), not "
                             f"{x.dim()} dimensions")  # fmt: skip
        return x


def merge_norms(model: nn.Module) -> MergeReport:
    """Make norms inside `model` part of its convolutions and linear layers, in place; the model is for inference after that.

        weight' = scale * weight,   bias' = scale * bias + shift,    norm(y) = scale * y + shift  in eval mode

    Batchless norms and BatchNorms with running statistics whose input is the output of a convolution or linear layer, and of
    nothing else's, are merged and become nn.Identity; the others become a `ChannelMap`. A standardised convolution becomes a plain
    one that holds the standardised weight. Names of modules stay. A network that torch.fx cannot trace gets maps only. The
    model is left in eval mode, not fused, its merged weights without gradients. What is merged depends on the network
    alone, not on the values in it.

    Args:
        model: of any precision; in float64 nothing is lost, a merge in float32 rounds each weight once more.

    Returns: what was merged and what was not, each with its reason.
    """
    unfuse(model)
    model.eval()
    replace_modules(model, StandardizedConv2d, lambda c: conv_like(c, nn.Conv2d, _fixed(standardize_weight(c.weight))))
    norms = {name: module for name, module in model.named_modules() if name and isinstance(module, _NORMS)}
    kept = {name: why for name, norm in norms.items() if (why := _why_kept(norm))}
    pairs, reasons = _pairs(model, {norm for name, norm in norms.items() if name not in kept})
    replacements: dict[nn.Module, nn.Module] = {}
    for norm, linears in pairs.items():
        for linear in linears:
            _absorb(linear, *_affine_map(norm))
        replacements[norm] = _AfterLinear() if any(isinstance(m, nn.Linear) for m in linears) else nn.Identity()
    maps = {name: reasons[norm] for name, norm in norms.items() if norm in reasons}
    for name in maps:
        replacements[norms[name]] = ChannelMap(*_affine_map(norms[name]))
    for kind in _AFFINE_IN_EVAL:
        replace_modules(model, kind, lambda norm: replacements.get(norm, norm))
    model.eval()  # the new modules too
    return MergeReport(tuple(name for name, norm in norms.items() if norm in pairs), maps, kept)


def _why_kept(norm: nn.Module) -> str:
    if not isinstance(norm, _AFFINE_IN_EVAL):
        return "its statistics are those of each image"
    if isinstance(norm, _BatchNorm) and norm.running_mean is None:
        return "it keeps no running statistics, so its output depends on the batch"
    return ""


def _pairs(model: nn.Module, norms: set[nn.Module]) -> tuple[dict[nn.Module, list[nn.Module]], dict[nn.Module, str]]:
    """For each norm the layers it can be merged into, all or none of those that it follows; and for the others why not."""
    try:
        graph, modules = trace(model, training=False)
    except ValueError as error:
        return {}, dict.fromkeys(norms, str(error))
    uses: dict[nn.Module, list[fx.Node]] = {}
    for call in calls(graph, modules, _LINEAR):
        uses.setdefault(modules[str(call.target)], []).append(call)
    for read in graph.find_nodes(op="get_attr"):  # a forward that takes a layer's weight itself
        uses.setdefault(modules.get(str(read.target).rpartition(".")[0], model), []).append(read)
    pairs: dict[nn.Module, list[nn.Module]] = {}
    reasons = dict.fromkeys(norms, "its forward does not reach it")
    for call in calls(graph, modules, _AFFINE_IN_EVAL):
        norm, found = modules[str(call.target)], module_before(call, modules)
        if norm not in norms:
            continue
        linear = found[1] if found else None
        reason = _MAP_IS_LINEAR if linear is None else _why_not_merged(linear, norm, uses, modules)
        if norm not in pairs:
            pairs[norm], reasons[norm] = [], ""
        if linear is not None and linear not in pairs[norm]:
            pairs[norm].append(linear)
        reasons[norm] = reasons[norm] or reason
    reasons = {norm: reason for norm, reason in reasons.items() if reason}
    return {norm: linears for norm, linears in pairs.items() if norm not in reasons}, reasons


def _why_not_merged(
    linear: nn.Module, norm: nn.Module, uses: dict[nn.Module, list[fx.Node]], modules: dict[str, nn.Module]
) -> str:
    if type(linear) not in _LINEAR:
        return f"its input comes from {type(linear).__name__}, not from a convolution or linear layer"
    assert isinstance(linear, _LINEAR)
    if linear._forward_hooks or linear._forward_pre_hooks:
        return f"hooks belong to the {type(linear).__name__} before it"
    if len(linear.weight) != norm.num_features:
        return f"the {type(linear).__name__} before it has {len(linear.weight)} outputs, the norm {norm.num_features} channels"
    for call in uses[linear]:
        if any(modules.get(str(user.target)) is not norm for user in call.users):
            return f"the {type(linear).__name__} before it is used elsewhere too"
    return ""


@torch.no_grad()
def _affine_map(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in eval mode, (C,) each."""
    if isinstance(norm, LikelihoodNorm):
        scale, shift = norm.affine_map()
    else:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else norm.weight * scale
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else norm.bias + shift
    return scale.expand(norm.num_features), shift.expand(norm.num_features)


@torch.no_grad()
def _absorb(linear: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Apply a map to the output of a layer by changing its weight and bias."""
    assert isinstance(linear, _LINEAR)
    weight, bias = linear.weight, linear.bias
    linear.weight = _fixed(weight * scale.view(-1, *([1] * (weight.dim() - 1))))
    linear.bias = _fixed(shift if bias is None else torch.addcmul(shift, bias, scale))


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
