"""What a forward changes besides its result: attributes of modules and random states."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

_State = tuple[Callable[[], Any], Callable[[Any], None]]
"""Reads a random state, and puts one back."""


class Before:
    """Attributes of a network's modules and the random states, as they are when this is made.

    Of an attribute that is a list, dict or set, what it holds belongs to it; of other objects their own attributes do not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = {module: dict(vars(module)) for module in model.modules()}
        values = [value for attributes in self._attributes.values() for value in attributes.values()]
        self._contents = [(value, _contents(value)) for value in values if isinstance(value, (dict, list, set))]
        self._random = [(get(), get, put) for get, put in _random_states()]

    def restore(self, *, expected: Collection[str] = ()) -> str:
        """Put everything back.

        Args:
            expected: attributes that may have changed.

        Returns: what had changed, as the end of a sentence; "" for nothing.
        """
        found = ""
        for state, get, put in self._random:
            if not _same(state, get()):
                put(state)
                found = "draws random numbers in Python"
        for value, contents in self._contents:
            if not _identical(contents, _contents(value)):
                _fill(value, contents)
                found = "changes attributes of modules"
        for module, attributes in self._attributes.items():
            own = vars(module)
            changed = [name for name in {**attributes, **own} if own.get(name, own) is not attributes.get(name, own)]
            if changed:
                own.clear()
                own.update(attributes)
            named = next((name for name in changed if name not in expected), None)
            found = found if named is None else f"changes the attribute '{named}' of {type(module).__name__}"
        return found


def _random_states() -> Iterator[_State]:
    yield torch.get_rng_state, torch.set_rng_state
    if torch.cuda.is_initialized():
        yield torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
    yield random.getstate, random.setstate
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        yield numpy_random.get_state, numpy_random.set_state


def _same(state: Any, other: Any) -> bool:
    if isinstance(state, (tuple, list)):
        return all(map(_same, state, other))
    return bool(torch.as_tensor(state == other).all())


def _contents(value: Any) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _identical(contents: list[Any], others: list[Any]) -> bool:
    return len(contents) == len(others) and all(a is b for a, b in zip(contents, others, strict=True))


def _fill(value: Any, contents: list[Any]) -> None:
    value.clear()
    if isinstance(value, dict):
        half = len(contents) // 2
        value.update(zip(contents[:half], contents[half:], strict=True))
    elif isinstance(value, list):
        value.extend(contents)
    else:
        value.update(contents)
