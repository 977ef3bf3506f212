"""A network's forward as a torch.fx graph, and the convolution before each norm in it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from bln_train.norm.fused.foldable import is_plain, what_is_around
from bln_train.norm.fused.side_effects import Before


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    """An operator such as `a += b`, which gives a new value where `a` is a number; torch.fx would write it out as a statement."""
    operation = getattr(operator, name)

    def in_place(a: Any, b: Any) -> Any:
        return operation(a, b)

    in_place.__name__ = in_place.__qualname__ = name
    return in_place


IN_PLACE = {
    name: _in_place(name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
}
"""Operators that write into their first argument, as a graph has them, by their names in `operator`."""


class _Value(fx.Proxy):
    """Records operators that write into a value, which torch.fx takes for those that do not."""


for _name, _operation in IN_PLACE.items():
    setattr(
        _Value,
        f"__{_name}__",
        lambda self, other, called=_operation: self.tracer.create_proxy("call_function", called, (self, other), {}),
    )


class _Input(_Value):
    """An input, which a forward may ask whether it is a tensor."""

    __class__ = property(lambda self: Tensor)
    _is_param = False  # isinstance(input, nn.Parameter) asks


class _Tracer(fx.Tracer):
    """Stops at torch.nn's layers, at every module without children, ours among them, and where something is around a forward.

    Its inputs are the arguments without defaults.
    """

    proxy_buffer_attributes = True  # what is made of a buffer is made again in each forward

    def __init__(self) -> None:
        super().__init__()
        self.switches: set[str] = set()
        """What the forward switches around calls, which a graph does not know."""

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = inputs_of(inspect.signature(root_fn))[1:]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Input(node, self) if node.op == "placeholder" else _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Input else super().create_arg(a)  # else it is kept as a constant tensor

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            self.switches.add("gradients off")
        if _autocast_depth():
            self.switches.add("autocast on or off")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name) or next(m.children(), None) is None:
            return True
        return bool(what_is_around(m))


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode inside; afterwards each module's own."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def inputs_of(signature: inspect.Signature) -> list[str]:
    """Names of the parameters that have no default, those that take any number left out."""
    any_number = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in any_number
    ]


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    depth: int = torch.autocast_decrement_nesting()
    return depth


@contextmanager
def _nothing_switched() -> Iterator[None]:
    """Gradients on, and no autocast around, whatever is outside."""
    depth = _autocast_depth()
    with torch.enable_grad():
        for _ in range(depth):
            torch.autocast_decrement_nesting()
        try:
            yield
        finally:
            for _ in range(depth):
                torch.autocast_increment_nesting()


def trace(model: nn.Module, *, training: bool) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """Graph of the forward in one mode, whose calls end at layers and leave nn.Identity out, and the modules by all their names.

    Its inputs are the arguments that have no default, all of them tensors; the others have their defaults.

    Raises:
        ValueError: torch.fx cannot trace the forward, for example because it depends on data, or the graph would not be all that
            the forward does: it draws random numbers in Python, changes attributes or, in training, switches gradients or autocast.
    """
    tracer = _Tracer()
    with _mode(model, training), _nothing_switched():  # a forward may ask
        before = Before(model)
        try:
            graph = tracer.trace(model)
        except Exception as error:  # whatever a foreign forward raises when it meets a proxy
            before.restore()
            reason = str(error).splitlines()[0] if str(error) else ""
            raise ValueError(f"torch.fx cannot trace the network: {type(error).__name__}: {reason}") from error
        # torch.fx puts tensors that the forward makes among the network's attributes.
        changes = before.restore(expected=tracer.tensor_attrs.values())
    if changes:
        raise ValueError(f"its forward {changes}")
    if training and tracer.switches:
        raise ValueError(f"its forward switches {' and '.join(sorted(tracer.switches))} in places")
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in list(graph.nodes):
        if node.op == "call_module" and is_plain(modules.get(str(node.target)), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph, modules


def calls(graph: fx.Graph, modules: dict[str, nn.Module], kind: type | tuple[type, ...]) -> list[fx.Node]:
    """Calls of modules of a kind, in the order of execution."""
    return [
        node for node in graph.nodes if node.op == "call_module" and isinstance(modules.get(str(node.target)), kind)
    ]


def module_before(norm: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, nn.Module] | None:
    """The call whose output a norm takes, and its module; None where something other than a module gave it."""
    source = norm.args[0] if norm.args else None
    if not isinstance(source, fx.Node) or source.op != "call_module" or str(source.target) not in modules:
        return None  # of no module, or of a folded layer by now
    return source, modules[str(source.target)]
