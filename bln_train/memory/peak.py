"""Measured peak memory of training steps, split by what it is for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bln_train.memory.timeline import Timeline, TrackedStep
from bln_train.memory.tracker import storage_bytes
from bln_train.records import MemoryRecord, TimelineRecord
from bln_train.system.machine import device_name


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
        self._timeline: Timeline | None = None

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
        self._timeline = None
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
            tracked = TrackedStep(self.model, self.optimizer, self.gradients, self.device)
            with tracked.run() as gradients_ready:
                yield gradients_ready
            self._note_tracked(tracked)

    def _optimizer_state(self) -> list[Tensor]:
        return [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]

    def _note_tracked(self, step: TrackedStep) -> None:
        tracker = step.tracker
        if self._peak is not None and tracker.peak_bytes < self._peak:
            return
        self._peak, self._timeline = tracker.peak_bytes, step.timeline
        self._parts = {f"{kind}_bytes": tracker.bytes_at_peak(births) for kind, births in step.births.items()}

    def _note_cuda(self) -> None:
        state = self._optimizer_state()
        optimizer_bytes = storage_bytes(state)
        self._parts = {
            "parameter_bytes": storage_bytes(self.model.parameters()),
            "gradient_bytes": storage_bytes([*self.gradients(), *state]) - optimizer_bytes,  # it may be the momentum
            "optimizer_bytes": optimizer_bytes,
        }

    def timeline(self, effective_batch_size: int, micro_batch_size: int) -> TimelineRecord | None:
        """Live bytes through the step with the peak; None where no step was tracked."""
        return None if self._timeline is None else self._timeline.record(effective_batch_size, micro_batch_size)

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
