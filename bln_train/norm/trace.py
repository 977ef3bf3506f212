"""A network's forward as a torch.fx graph, and the convolution before each norm in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from bln_train.norm.foldable import is_plain, what_is_around


class _Tracer(fx.Tracer):
    """Stops at torch.nn's layers, at every module without children, ours among them, and where something is around a forward."""

    proxy_buffer_attributes = True  # what is made of a buffer is made again in each forward

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


def trace(model: nn.Module, *, training: bool) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """Graph of the forward in one mode, whose calls end at layers and leave nn.Identity out, and the modules by all their names.

    Raises:
        ValueError: torch.fx cannot trace the forward, for example because it depends on data.
    """
    attributes = set(vars(model))
    with _mode(model, training):  # a forward may ask
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # whatever a foreign forward raises when it meets a proxy
            reason = str(error).splitlines()[0] if str(error) else ""
            raise ValueError(f"torch.fx cannot trace the network: {type(error).__name__}: {reason}") from error
        finally:
            for name in set(vars(model)) - attributes:  # tensors that the forward made, which torch.fx puts there
                delattr(model, name)
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
