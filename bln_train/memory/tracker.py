"""Tensor storages counted while they live, from operator to operator."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all live tensor storages from operator to operator, and remembers the largest count.

    What an operator allocates and frees inside itself (a convolution's scratch) is not a tensor and is not seen.

    Args:
        existing: tensors alive before; they count from the start.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.num_operators = 0
        self._live: dict[int, tuple[weakref.ref[Any], int, int]] = {}  # id: (storage, bytes, birth)
        self._died_since_peak: list[tuple[int, int, int]] = []  # (id, bytes, birth), alive at the peak or born after it
        self._births = self._births_at_peak = 0
        for tensor in existing:
            self._add(tensor)
        self._see_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_operators += 1  # now, not before: what died while it ran was gone when it was done
        for tensor in tensors_in(out):
            self._add(tensor)
        self._see_peak()
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tensor.device.type == "meta":  # a fake tensor names the device that it stands for
            return
        num_bytes, self._births = storage.nbytes(), self._births + 1

        def forget(_: Any, key: int = key) -> None:
            _, size, birth = self._live.pop(key)
            self.live_bytes -= size
            self._died_since_peak.append((key, size, birth))
            self._died(birth)

        self._live[key] = (weakref.ref(storage, forget), num_bytes, self._births)
        self.live_bytes += num_bytes
        self._born(num_bytes)

    def _born(self, num_bytes: int) -> None:
        """A storage is there; its serial number is the count of births."""

    def _died(self, serial: int) -> None:
        """A storage is gone."""

    def _see_peak(self) -> None:
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self._births_at_peak = self.live_bytes, self._births
            self._died_since_peak.clear()

    def births(self, tensors: Iterable[Tensor]) -> set[int]:
        """Serial numbers of the storages of these live tensors; they stay valid when the tensors are gone."""
        return {self._live[key][2] for t in tensors if (key := t.untyped_storage()._cdata) in self._live}

    def bytes_at_peak(self, births: set[int]) -> int:
        """Of the peak, the bytes of the storages with these serial numbers."""
        entries = [(size, birth) for _, size, birth in self._live.values()]
        entries += [(size, birth) for _, size, birth in self._died_since_peak]
        return sum(size for size, birth in entries if birth in births and birth <= self._births_at_peak)
