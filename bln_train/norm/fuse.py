"""Fold a network's batchless norms into the convolutions before them, by tracing its forward with torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.epilogue import Activation
from bln_train.norm.fused import FoldedChain, FoldedConvNorm, why_not_foldable
from bln_train.norm.fused_function import Plan, Step
from bln_train.norm.trace import calls, module_before, trace

_LAYERS, _CHAINS = "folded_layers", "folded_chains"
_ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)
_RELUS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_)
_LEAKY_RELUS: tuple[Any, ...] = (F.leaky_relu, F.leaky_relu_)
# What keeps its input for backward, whatever we do; the activations unless they overwrite it.
_KEEPS_INPUT = (nn.modules.conv._ConvNd, nn.Linear, nn.MaxPool2d, nn.GroupNorm)
_KEEPS_INPUT_UNLESS_INPLACE = (nn.SiLU, nn.GELU, nn.Hardswish)


@dataclass(frozen=True)
class FuseReport:
    """Which norms `fuse` folded."""

    folded: tuple[str, ...]
    """Names of the norms that are now part of the operation before them."""
    kept: dict[str, str]
    """Names of the others, and why each stays as it is."""


def fuse(model: nn.Module) -> FuseReport:
    """Make training forwards of `model` run each conv + batchless norm (+ residual) (+ relu) as one `FoldedConvNorm`, in place.

    Parameters, buffers, state dict and the forward in eval mode stay what they are. A network that torch.fx cannot trace, or
    whose forward depends on data, is left alone. Replace layers (conversion, a new head) before, not after.

    Returns: what was folded and what was not, each with its reason.

    Raises:
        ValueError: the model is fused already.
    """
    if hasattr(model, _LAYERS):
        raise ValueError("the model is fused already; unfuse it first")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchlessNorm)}
    if not norms:
        return FuseReport((), {})
    try:
        graph, modules = trace(model, training=True)
    except ValueError as error:
        return FuseReport((), dict.fromkeys(norms, str(error)))

    layers = nn.ModuleList()
    setattr(model, _LAYERS, layers)
    seen: dict[str, str] = {}
    for node in calls(graph, modules, _BatchlessNorm):
        reason = _fold(graph, node, modules, layers)
        name = str(node.target)
        seen[name] = seen.get(name) or reason  # a norm used twice is folded if both uses are
    if not len(layers):
        delattr(model, _LAYERS)
        return FuseReport((), {name: _reason(name, norm, modules, seen) for name, norm in norms.items()})
    _note_what_is_kept(graph, modules, layers)
    setattr(model, _CHAINS, _chain(graph, layers))
    graph.lint()
    traced: Callable[..., Any] = type(fx.GraphModule(model, graph)).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Traced in training mode; what eval mode does is the original's business.
        return (traced if self.training else type(self).forward)(self, *args, **kwargs)

    model.forward = MethodType(forward, model)
    folded = tuple(name for name, norm in norms.items() if not _reason(name, norm, modules, seen))
    return FuseReport(folded, {n: _reason(n, norm, modules, seen) for n, norm in norms.items() if n not in folded})


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place; a model that is not fused stays as it is."""
    if hasattr(model, _LAYERS):
        delattr(model, _LAYERS)
        delattr(model, _CHAINS)
        del model.forward


def folded_layers(model: nn.Module) -> list[FoldedConvNorm]:
    """The folded operations of a fused model, in the order of execution; none of another model."""
    return list(getattr(model, _LAYERS, ()))


def _reason(name: str, norm: nn.Module, modules: dict[str, nn.Module], seen: dict[str, str]) -> str:
    names = [other for other, module in modules.items() if module is norm and other in seen]
    if not names:
        return "its forward does not reach it"
    return next((seen[other] for other in names if seen[other]), "")


def _fold(graph: fx.Graph, norm: fx.Node, modules: dict[str, nn.Module], layers: nn.ModuleList) -> str:
    """Replace the chain around a norm by one node; returns why not, "" if it was done."""
    found, layer = module_before(norm, modules), modules[str(norm.target)]
    if found is None:
        return "its input does not come from a convolution or linear layer"
    source, linear = found
    problem = why_not_foldable(linear, layer)
    if problem:
        return problem
    if len(source.users) > 1:
        return "the convolution's output is used elsewhere too"
    assert isinstance(layer, _BatchlessNorm)

    last, residual, passed, shortcut = norm, None, None, None
    groups, channel = _groups(norm, layer, modules)
    normed = last = norm if groups is None else groups
    add = _only_user(normed)
    if add is not None and _is_add(add):
        other = next((a for a in add.args if a is not normed), None)
        if isinstance(other, fx.Node):  # not x + x, which has one argument
            last, residual = add, other
            module = modules.get(str(other.target)) if other.op == "call_module" and len(other.users) == 1 else None
            start = other.args[0] if module is not None and hasattr(module, "adjoint") else None
            if isinstance(start, fx.Node):
                residual, passed, shortcut = start, other, module
    activation: Activation = "identity"
    slope = 0.0
    follower = _only_user(last)
    if follower is not None:
        activation, slope = _activation(follower, modules)
        last = follower if activation != "identity" else last

    name = f"{_LAYERS}.{len(layers)}"
    layers.append(FoldedConvNorm(linear, layer, channel=channel, activation=activation, slope=slope, shortcut=shortcut))
    with graph.inserting_after(last):
        node = graph.call_module(name, (source.args[0],) if residual is None else (source.args[0], residual))
    last.replace_all_uses_with(node)
    for old in (last, add, passed, groups, norm, source):
        if old is not None and not old.users and old in graph.nodes and old is not node:
            graph.erase_node(old)
    return ""


def _chain(graph: fx.Graph, layers: nn.ModuleList) -> nn.ModuleList:
    """Replace folded layers that follow each other by one node."""
    by_name = {f"{_LAYERS}.{n}": layer for n, layer in enumerate(layers)}
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        layer = by_name.get(str(node.target))
        if not isinstance(layer, FoldedConvNorm):
            runs.append([])
        elif isinstance(layer.linear, nn.Linear):  # what it does depends on its input's shape
            runs += ([node], [])
        else:
            runs[-1].append(node)
    chains = nn.ModuleList()
    for run in runs:
        if not run:
            continue
        inputs = list(dict.fromkeys(arg for node in run for arg in node.args if arg not in run))
        numbers: dict[Any, int] = {node: n for n, node in enumerate([*inputs, *run])}
        steps = tuple(
            Step(
                by_name[str(node.target)], numbers[node.args[0]], numbers[node.args[1]] if len(node.args) > 1 else None
            )
            for node in run
        )
        outputs = [node for node in run if any(user not in run for user in node.users)]
        chains.append(FoldedChain(Plan(steps, len(inputs), tuple(numbers[node] for node in outputs))))
        with graph.inserting_after(run[-1]):
            whole = graph.call_module(f"{_CHAINS}.{len(chains) - 1}", tuple(inputs))
        for n, node in enumerate(outputs):
            part = whole
            if len(outputs) > 1:
                with graph.inserting_after(whole):
                    part = graph.call_function(operator.getitem, (whole, n))
            for user in [user for user in node.users if user not in run and user is not part]:
                user.replace_input_with(node, part)
        for node in reversed(run):
            graph.erase_node(node)
    return chains


def _groups(
    norm: fx.Node, layer: _BatchlessNorm, modules: dict[str, nn.Module]
) -> tuple[fx.Node | None, nn.GroupNorm | None]:
    """The call of a GroupNorm that alone scales and shifts what a norm gives, and the module; None for none."""
    follower = _only_user(norm)
    if follower is None or follower.op != "call_module" or layer.affine:
        return None, None
    module = modules.get(str(follower.target))
    fits = isinstance(module, nn.GroupNorm) and module.affine and module.num_channels == layer.num_features
    return (follower, module) if fits and isinstance(module, nn.GroupNorm) else (None, None)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node: fx.Node) -> bool:
    called = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return called and len(node.args) == 2 and not node.kwargs


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Activation, float]:
    """What a node does to its one input, if it is an activation that can be folded."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.ReLU) or (node.op == "call_function" and node.target in _RELUS):
        return "relu", 0.0
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return "relu", 0.0
    slope: Any = None
    if isinstance(module, nn.LeakyReLU):
        slope = module.negative_slope
    elif node.op == "call_function" and node.target in _LEAKY_RELUS:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    if isinstance(slope, float) and 0 < slope < 1:
        return "leaky_relu", slope
    return "identity", 0.0


def _note_what_is_kept(graph: fx.Graph, modules: dict[str, nn.Module], layers: nn.ModuleList) -> None:
    """Tell each folded layer whether its output and its residual outlive the forward anyway."""
    by_name = {f"{_LAYERS}.{n}": layer for n, layer in enumerate(layers)}

    def kept(node: fx.Node) -> bool:
        own = by_name.get(str(node.target))
        if isinstance(own, FoldedConvNorm) and own.activation != "identity":
            return True  # its own backward needs it
        for user in node.users:
            if user.op != "call_module" or user.args[0] is not node:
                continue
            module = by_name.get(str(user.target), modules.get(str(user.target)))
            if isinstance(module, (FoldedConvNorm, *_KEEPS_INPUT)):
                return True
            if isinstance(module, _KEEPS_INPUT_UNLESS_INPLACE) and not getattr(module, "inplace", False):
                return True
        return False

    for node in graph.nodes:
        layer = by_name.get(str(node.target))
        if isinstance(layer, FoldedConvNorm):
            layer.output_is_kept = layer.activation != "identity" or kept(node)
            layer.residual_is_kept = len(node.args) < 2 or kept(node.args[1])
            # Another folded layer's output is its own, of nobody's view; with one user, nobody else's.
            layer.input_is_free = str(node.args[0].target) in by_name and len(node.args[0].users) == 1
