"""Which norms can be observed together: those whose inputs depend on no norm that is still to be settled."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bln_train.norm.calibrate.moments import on_input

Norms = frozenset[nn.Module]
Level = dict[nn.Module, frozenset[int]]
"""Its norms, and which of each one's uses in a forward count, from 0."""
_NONE: Norms = frozenset()


class _Dependencies(TorchDispatchMode):
    """Notes, operator by operator, on which norms each tensor storage depends.

    Storages, not tensors: so views and in-place operators are seen. A value that leaves the tensors (`item`, and with it
    control flow) makes everything after it depend on what it depended on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[int, Norms] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._escaped: Norms = _NONE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        needs = self.of(*tree_iter((args, kwargs)))
        out = func(*args, **kwargs)
        if needs:
            for leaf in tree_iter(out):
                if isinstance(leaf, Tensor):
                    self.add(leaf, needs)
                elif leaf is not None:
                    self._escaped |= needs
            for argument, value in _named(func, args, kwargs):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for leaf in tree_iter(value):
                        if isinstance(leaf, Tensor):
                            self.add(leaf, needs)
        return out

    def of(self, *values: Any) -> Norms:
        """What a computation on `values` depends on."""
        found = self._escaped
        for value in values:
            if isinstance(value, Tensor) and (key := _storage_key(value)) in self._of:
                found |= self._of[key]
        return found

    def add(self, tensor: Tensor, needs: Norms) -> None:
        """Note that a tensor depends on `needs`, besides what it did before."""
        key = _storage_key(tensor)
        if key is None:
            self._escaped |= needs
        elif key in self._of:
            self._of[key] |= needs
        else:

            def forget(_: Any, key: int = key) -> None:  # another storage may get its address
                del self._of[key], self._alive[key]

            self._of[key], self._alive[key] = needs, weakref.ref(tensor.untyped_storage(), forget)


def _storage_key(tensor: Tensor) -> int | None:
    """What tensors of one storage have in common while it lives; None where there is none, as of sparse ones."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[tuple[Any, Any]]:
    """Arguments of an operator's schema, and their values."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        yield argument, value
    for argument in func._schema.arguments:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


@torch.no_grad()
def find_levels(model: nn.Module, norms: Iterable[nn.Module], x: Tensor) -> list[Level]:
    """Run `model` once on x, as it is, and put norms in the order in which they can be settled.

    Norms of one level can be settled together once those of all earlier levels are.

    All uses of a norm count, so it is settled when all its inputs are. Where that goes in a circle (a norm whose output comes
    back into it), the first norm of the circle in execution order is settled from those of its uses whose inputs are, its
    first use at least.
    """
    uses: dict[nn.Module, list[Norms]] = {}  # in execution order
    dependencies = _Dependencies()

    def see(norm: nn.Module, x: Tensor) -> None:
        uses.setdefault(norm, []).append(dependencies.of(x))

    def mark(norm: nn.Module, _: Any, out: Tensor) -> None:
        dependencies.add(out, uses[norm][-1] | {norm})

    hooks = [norm.register_forward_hook(mark) for norm in norms]
    try:
        with on_input(norms, see), dependencies:
            model(x)
    finally:
        for handle in hooks:
            handle.remove()
    return _in_levels(uses)


def _in_levels(uses: dict[nn.Module, list[Norms]]) -> list[Level]:
    left, settled, levels = dict(uses), set[nn.Module](), list[Level]()
    while left:
        ready = {norm: frozenset(range(len(of))) for norm, of in left.items() if all(need <= settled for need in of)}
        if not ready:  # a circle
            norm, of = next(iter(left.items()))  # nothing that is not settled ran before it
            ready = {norm: frozenset(n for n, need in enumerate(of) if need <= settled)}
        for norm in ready:
            del left[norm]
        settled.update(ready)
        levels.append(ready)
    return levels
