"""What `fuse` does to a network's torch.fx graph: folded layers in the place of calls, chains in the place of layers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.fused.foldable import is_plain, what_is_added, why_not_foldable
from bln_train.norm.fused.function import Plan, Step
from bln_train.norm.fused.layer import FoldedChain, FoldedConvNorm
from bln_train.norm.fused.trace import IN_PLACE, calls, module_before

_ADDS: tuple[Any, ...] = (operator.add, IN_PLACE["iadd"], torch.add)
_RELUS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_)
Layers = dict[fx.Node, FoldedConvNorm]
"""The folded layers, by the node that calls each."""


def fold_norms(
    graph: fx.Graph, modules: dict[str, nn.Module], skipped: Mapping[str, str]
) -> tuple[Layers, dict[str, str]]:
    """Replace what is around each norm in a graph by one node, where that is possible.

    Returns: the folded layers in the order of execution, and why each norm that the graph calls is not folded, "" if it is.
    """
    layers: Layers = {}
    seen: dict[str, str] = {}
    for node in calls(graph, modules, _BatchlessNorm):
        name = str(node.target)
        reason = skipped.get(name) or _fold(graph, node, modules, layers)
        seen[name] = seen.get(name) or reason  # a norm used twice is folded if both uses are
    layers = {node: layers[node] for node in graph.nodes if node in layers}
    _note_free_inputs(layers)
    return layers, seen


def _fold(graph: fx.Graph, norm: fx.Node, modules: dict[str, nn.Module], layers: Layers) -> str:
    """Replace the chain around a norm by one node; returns why not, "" if it was done."""
    found, layer = module_before(norm, modules), modules[str(norm.target)]
    if found is None:
        return "its input does not come from a convolution or linear layer"
    source, linear = found
    problem = why_not_foldable(linear, layer)
    if problem:
        return problem
    if not _takes_one(source) or not _takes_one(norm):
        return "it is called with more than its input, or the convolution is"
    if len(source.users) > 1:
        return "the convolution's output is used elsewhere too"
    if _is_overwritten_after(source, source.args[0], modules):
        return "the convolution's input is overwritten later"
    assert isinstance(layer, _BatchlessNorm)

    residual, passed, shortcut = None, None, None
    groups, module_of_groups = _groups(norm, layer, modules)
    normed = last = norm if groups is None else groups
    add = _only_user(normed)
    if add is None or not _is_add(add) or (add.args[0] is not normed and _overwrites(add, add.args[0], modules)):
        add = None  # an addend that is written into may have other names
    else:
        other = next((a for a in add.args if a is not normed), None)
        # Not x + x, which has one argument.
        if isinstance(other, fx.Node) and not _is_overwritten_after(add, other, modules):
            last, residual = add, other
            module = modules.get(str(other.target)) if other.op == "call_module" and len(other.users) == 1 else None
            start = other.args[0] if _is_shortcut(module) and _takes_one(other) else None
            if isinstance(start, fx.Node) and not _is_overwritten_after(other, start, modules):
                residual, passed, shortcut = start, other, module
    follower = _only_user(last)
    relu = follower is not None and follower.args[:1] == (last,) and _is_relu(follower, modules)
    last = follower if relu and follower is not None else last

    with graph.inserting_after(last):
        node = graph.call_module("folded", (source.args[0],) if residual is None else (source.args[0], residual))
    layers[node] = FoldedConvNorm(linear, layer, groups=module_of_groups, relu=relu, shortcut=shortcut)
    last.replace_all_uses_with(node)
    for old in (last, add, passed, groups, norm, source):
        if old is not None and not old.users and old in graph.nodes and old is not node:
            graph.erase_node(old)
    return ""


def chain_layers(graph: fx.Graph, layers: Layers) -> dict[str, FoldedChain]:
    """Replace folded layers that follow each other by one node; returns the chains by the names that the graph calls."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node not in layers:
            runs.append([])
        elif isinstance(layers[node].linear, nn.Linear):  # what it does depends on its input's shape
            runs += ([node], [])
        else:
            runs[-1].append(node)
    chains: dict[str, FoldedChain] = {}
    for run in runs:
        if not run:
            continue
        inputs = list(dict.fromkeys(arg for node in run for arg in node.args if arg not in run))
        numbers: dict[Any, int] = {node: n for n, node in enumerate([*inputs, *run])}
        steps = tuple(
            Step(layers[node], numbers[node.args[0]], numbers[node.args[1]] if len(node.args) > 1 else None)
            for node in run
        )
        outputs = [node for node in run if any(user not in run for user in node.users)]
        name = f"folded_chain_{len(chains)}"
        chains[name] = FoldedChain(Plan(steps, len(inputs), tuple(numbers[node] for node in outputs)))
        with graph.inserting_after(run[-1]):
            whole = graph.call_module(name, tuple(inputs))
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
    if follower is None or follower.op != "call_module" or layer.affine or not _takes_one(follower):
        return None, None
    module = modules.get(str(follower.target))
    if not isinstance(module, nn.GroupNorm) or not is_plain(module, nn.GroupNorm):
        return None, None
    return (follower, module) if module.affine and module.num_channels == layer.num_features else (None, None)


def _is_shortcut(module: nn.Module | None) -> bool:
    """Whether a module is linear, without parameters, and has its way back (models/layers.py)."""
    if module is None or not hasattr(module, "adjoint") or what_is_added(module):
        return False
    return next(module.parameters(), None) is None


def _takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def _is_overwritten_after(reader: fx.Node, value: Any, modules: dict[str, nn.Module]) -> bool:
    """Whether what a call reads is overwritten after it: a folded layer reads it later, and may keep it for backward."""
    order = {node: n for n, node in enumerate(reader.graph.nodes)}
    users = value.users if isinstance(value, fx.Node) else ()
    return any(order[user] > order[reader] and _overwrites(user, value, modules) for user in users)


def _overwrites(node: fx.Node, value: Any, modules: dict[str, nn.Module]) -> bool:
    """Whether a node writes into a value that it gets."""
    if node.args[:1] != (value,):
        return node.kwargs.get("out") is value
    if node.op == "call_module":
        return bool(getattr(modules.get(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_inplace = name.endswith("_") and not name.endswith("__")
    return is_inplace or bool(node.kwargs.get("inplace")) or node.target in IN_PLACE.values()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node: fx.Node) -> bool:
    called = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return called and len(node.args) == 2 and not node.kwargs


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a relu of its first argument."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if is_plain(module, nn.ReLU) or (node.op == "call_function" and node.target in _RELUS):
        return True
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _note_free_inputs(layers: Layers) -> None:
    """Tell each folded layer whether its input may be overwritten where no gradients are wanted.

    Another folded layer's output is its own, of nobody's view; with one use, nobody else's.
    """
    for node, layer in layers.items():
        before = node.args[0]
        if isinstance(before, fx.Node) and before in layers:
            layer.input_is_free = len(before.users) == 1 and node.args.count(before) == 1
