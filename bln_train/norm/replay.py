"""How work that is the same in every step is handed over, so that who takes it may record it once and replay it.

Such work is that of a device: it reads and writes tensors, at the addresses that its kind names, and asks none for its value.
Whatever it changes besides is changed again by its caller, from what it returned, since a replay runs no Python.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Run(Protocol):
    """Takes work."""

    def __call__(
        self,
        work: Callable[..., T],
        kind: Callable[[], tuple[Hashable, ...]],
        inputs: Sequence[Tensor] = (),
        *,
        twice: bool = False,
    ) -> T:
        """Do `work(*inputs)`, or what it did when it was recorded, and return its result, or that of then: the same tensors.

        Args:
            kind: what, besides the values of tensors, the work depends on; its first entry is a name.
            inputs: tensors from somewhere else each time; the work gets copies at one address.
            twice: doing the work twice in a row changes no more than once.
        """


def at_once(
    work: Callable[..., T],
    kind: Callable[[], tuple[Hashable, ...]],
    inputs: Sequence[Tensor] = (),
    *,
    twice: bool = False,
) -> T:
    """A `Run` that records nothing."""
    return work(*inputs)


def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Of tensors, 0 for None: for a kind."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
