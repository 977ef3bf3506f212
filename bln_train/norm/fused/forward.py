"""The forward of a fused network."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.fused.foldable import what_is_around
from bln_train.norm.fused.layer import FoldedChain, FoldedConvNorm
from bln_train.norm.fused.rewrite import chain_layers, fold_norms
from bln_train.norm.fused.trace import inputs_of, trace


class _Built(NamedTuple):
    """What a forward was built from a network."""

    function: Callable[..., Any] | None
    """Takes the inputs that were traced; None where nothing is folded."""
    layers: tuple[FoldedConvNorm, ...]
    folded: tuple[str, ...]
    kept: dict[str, str]
    asking: tuple[nn.Module, ...]
    """Modules whose eval mode the traced forward may know nothing of."""
    signature: inspect.Signature = inspect.Signature()
    """Of the network's forward."""
    inputs: tuple[str, ...] = ()
    """Names of the arguments that were traced."""


class FusedForward:
    """A network's forward that runs folded layers in training mode and the network's own in eval mode.

    The network's own runs, too, where an argument with a default has another value, or one without is no tensor.

    Copies and pickles hold the network and no layer: they are built again, over the parts of the copy, when they are first used.

    Args:
        model: the network; it is not changed.
        skipped: norms that are not to be folded, and why.
        recompute: see `FoldedConvNorm`.
    """

    def __init__(self, model: nn.Module, skipped: Mapping[str, str] | None = None, *, recompute: bool = True) -> None:
        self.model, self.skipped, self.recompute = model, dict(skipped or {}), recompute
        self._own: _Built | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's."""
        model, built = self.model, self._built
        # Traced in training mode; what eval mode does is the original's business.
        if built.function is not None and model.training and all(module.training for module in built.asking):
            inputs = self._inputs(args, kwargs)
            if inputs is not None:
                return built.function(*inputs)
        return type(model).forward(model, *args, **kwargs)

    def _inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any] | None:
        """The traced inputs among a call's arguments; None where one is no tensor, or another argument is not its default."""
        signature, names = self._built.signature, self._built.inputs
        if kwargs or len(args) != len(names):
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return None  # the network says so itself
            if any(given[name] is not signature.parameters[name].default for name in given if name not in names):
                return None
            args = [given[name] for name in names]
        return args if all(isinstance(value, Tensor) for value in args) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_own": None}

    @property
    def layers(self) -> tuple[FoldedConvNorm, ...]:
        """The folded operations, in the order of execution."""
        return self._built.layers

    @property
    def folded(self) -> tuple[str, ...]:
        """Names of the norms in them."""
        return self._built.folded

    @property
    def kept(self) -> dict[str, str]:
        """Names of the others, and why each stays as it is."""
        return self._built.kept

    @property
    def _built(self) -> _Built:
        if self._own is None:
            self._own = _build(self.model, self.skipped)
            for layer in self._own.layers:
                layer.recompute = self.recompute
        return self._own


class _Scope:
    """What the traced forward knows as `self`: the network's attributes, as they are when it runs, and the chains."""

    def __init__(self, model: nn.Module, chains: Mapping[str, FoldedChain]) -> None:
        self._model = model
        vars(self).update(chains)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _build(model: nn.Module, skipped: Mapping[str, str]) -> _Built:
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchlessNorm)}
    try:
        graph, modules = trace(model, training=True)
        if any("_tensor_constant" in str(node.target) for node in graph.find_nodes(op="get_attr")):
            raise ValueError("its forward makes a tensor that depends on no input")
    except ValueError as error:
        return _Built(None, (), (), dict.fromkeys(norms, str(error)), ())
    asking = _containers(model, graph) if _depends_on_mode(model, graph) else ()
    layers, seen = fold_norms(graph, modules, skipped)
    kept = {name: why for name, norm in norms.items() if (why := _why_kept(name, norm, modules, seen))}
    chains = chain_layers(graph, layers)
    graph.lint()
    folded = tuple(name for name in norms if name not in kept)
    function = _function(graph, _Scope(model, chains)) if layers else None
    signature = inspect.signature(functools.partial(type(model).forward, model))
    return _Built(function, tuple(layers.values()), folded, kept, asking, signature, tuple(inputs_of(signature)))


def _function(graph: fx.Graph, scope: _Scope) -> Callable[..., Any]:
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<fused forward>", "exec"), names)
    function: Callable[..., Any] = names["forward"]
    return function.__get__(scope)


def _depends_on_mode(model: nn.Module, graph: fx.Graph) -> bool:
    """Whether the forward of some module with parts is another one in eval mode."""
    try:
        return str(trace(model, training=False)[0]) != str(graph)
    except ValueError:
        return True


def _containers(model: nn.Module, graph: fx.Graph) -> tuple[nn.Module, ...]:
    """Modules with parts that were traced through."""
    called = tuple(f"{node.target}." for node in graph.find_nodes(op="call_module"))
    return tuple(
        module
        for name, module in model.named_modules()
        if name and next(module.children(), None) is not None and not f"{name}.".startswith(called)
    )


def _why_kept(name: str, norm: nn.Module, modules: Mapping[str, nn.Module], seen: Mapping[str, str]) -> str:
    names = [other for other, module in modules.items() if module is norm and other in seen]
    if names:
        return next((seen[other] for other in names if seen[other]), "")
    parts = name.split(".")
    for number in range(1, len(parts)):
        around = what_is_around(modules[".".join(parts[:number])])
        if around:
            return f"it is part of '{'.'.join(parts[:number])}', which {around}"
    return "its forward does not reach it"
