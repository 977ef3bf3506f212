"""Measured peak memory of training steps, split by what it is for."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bln_train.records import MemoryRecord
from bln_train.runtime import device_name


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
        self.live_bytes = self.peak_bytes = 0
        self._live: dict[int, tuple[weakref.ref[Any], int, int]] = {}  # id: (storage, bytes, birth)
        self._died_since_peak: list[tuple[int, int, int]] = []  # (id, bytes, birth), alive at the peak or born after it
        self._births = self._births_at_peak = 0
        for tensor in existing:
            self._add(tensor)
        self._see_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
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


class PeakMeter:
    """Measures the peak memory of training steps, evaluation left out.

    On CUDA the allocator counts, at no cost, between `start` and `stop`. On the CPU the first `NUM_NOTED` steps run under a
    `StorageTracker` (the second already has the optimizer's state); they are slower, and the same to the last bit.

    Args:
        model, optimizer, gradients: whose tensors the peak is split into; `gradients` lists those alive when it is called.
    """

    NUM_NOTED = 2

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradients: Callable[[], list[Tensor]],
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.gradients, self.device = model, optimizer, gradients, device
        self._steps_left = self.NUM_NOTED
        self._running = False
        self._peak: int | None = None
        self._reserved: int | None = None
        self._parts: dict[str, int] = {}

    @property
    def tracks_next_step(self) -> bool:
        """Whether the next step runs slowed down by tracking."""
        return self.device.type == "cpu" and self._steps_left > 0

    def start(self) -> None:
        """Begin a stretch of training steps: on CUDA, forget the peak of whatever ran before (an evaluation, say)."""
        self._running = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # or what an evaluation reserved would count as reserved by training
            torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> None:
        """End a stretch of training steps."""
        self._read()
        self._running = False

    def restart(self) -> None:
        """Forget what was measured: from now on steps take another amount."""
        self._steps_left, self._peak, self._reserved, self._parts = self.NUM_NOTED, None, None, {}
        if self._running:
            self.start()

    def _read(self) -> None:
        if self.device.type == "cuda" and self._running:
            self._peak = max(self._peak or 0, torch.cuda.max_memory_allocated(self.device))
            self._reserved = max(self._reserved or 0, torch.cuda.max_memory_reserved(self.device))

    @contextmanager
    def step(self) -> Iterator[Callable[[], None]]:
        """Wrap one training step; call what it yields when all gradients exist, before they are dropped."""
        if self._steps_left == 0:
            yield _nothing
            return
        self._steps_left -= 1
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device) - storage_bytes(
                [*self.model.parameters(), *self.gradients(), *self._optimizer_state()]
            )
            yield self._note_cuda
            self._parts["other_bytes"] = before
        else:
            existing = [*self.model.parameters(), *self.model.buffers(), *self._optimizer_state(), *self.gradients()]
            tracker = StorageTracker(existing)
            gradients: set[int] = set()
            with tracker:
                yield lambda: gradients.update(tracker.births(self.gradients()))
            self._note_tracked(tracker, gradients)

    def _optimizer_state(self) -> list[Tensor]:
        return [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]

    def _note_tracked(self, tracker: StorageTracker, gradients: set[int]) -> None:
        if self._peak is not None and tracker.peak_bytes <= self._peak:
            return
        self._peak = tracker.peak_bytes
        optimizer = tracker.births(self._optimizer_state())
        self._parts = {
            "parameter_bytes": tracker.bytes_at_peak(tracker.births(self.model.parameters())),
            "gradient_bytes": tracker.bytes_at_peak(gradients - optimizer),  # a gradient may be the momentum
            "optimizer_bytes": tracker.bytes_at_peak(optimizer),
            "other_bytes": tracker.bytes_at_peak(tracker.births(self.model.buffers())),
        }

    def _note_cuda(self) -> None:
        state = self._optimizer_state()
        optimizer_bytes = storage_bytes(state)
        self._parts = {
            "parameter_bytes": storage_bytes(self.model.parameters()),
            "gradient_bytes": storage_bytes([*self.gradients(), *state]) - optimizer_bytes,  # it may be the momentum
            "optimizer_bytes": optimizer_bytes,
        }

    def record(self, effective_batch_size: int, micro_batch_size: int) -> MemoryRecord:
        """What was measured so far; None where nothing was."""
        cuda = self.device.type == "cuda"
        in_use = None
        if cuda:
            self._read()
            free, total = torch.cuda.mem_get_info(self.device)
            in_use = total - free
        measured = self._peak is not None and bool(self._parts)
        return MemoryRecord(
            device=device_name(self.device),
            method="allocator" if cuda else "tracked tensors",
            effective_batch_size=effective_batch_size,
            micro_batch_size=micro_batch_size,
            peak_bytes=self._peak,
            reserved_bytes=self._reserved,
            device_bytes=in_use,
            process_bytes=None if cuda else process_peak_bytes(),
            parameter_bytes=self._parts.get("parameter_bytes"),
            gradient_bytes=self._parts.get("gradient_bytes"),
            optimizer_bytes=self._parts.get("optimizer_bytes"),
            activation_bytes=max(0, (self._peak or 0) - sum(self._parts.values())) if measured else None,
            other_bytes=self._parts.get("other_bytes"),
        )


def _nothing() -> None:
    pass


def process_peak_bytes() -> int | None:
    """Peak resident memory of this process in bytes, None where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
