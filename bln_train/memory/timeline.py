"""Live bytes through one optimizer step, by what a storage is for (`KINDS`).

The first micro-step, which allocates the gradients, and the last are kept operator by operator. The micro-steps between
are alike. Each is folded into one point, its largest count, so the record does not grow with the effective batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bln_train.memory.tracker import StorageTracker
from bln_train.records import TimelineRecord

_POINTS_OF_PHASE = 40
KINDS = ("parameter", "gradient", "optimizer", "other", "activation")
"""What a storage is for; the last are all that a step creates and frees again."""


class Timeline(NamedTuple):
    """Live bytes through a step; see `records.TimelineRecord`."""

    phases: list[str]
    num_points: list[int]
    num_micro_steps: int
    live: dict[str, list[int]]
    """Bytes at each point by kind."""

    def record(self, effective_batch_size: int, micro_batch_size: int) -> TimelineRecord:
        """For the log."""
        return TimelineRecord(
            effective_batch_size=effective_batch_size,
            micro_batch_size=micro_batch_size,
            num_micro_steps=self.num_micro_steps,
            phases=self.phases,
            num_points=self.num_points,
            **{f"{kind}_bytes": values for kind, values in self.live.items()},
        )


class TimelineTracker(StorageTracker):
    """A `StorageTracker` that writes down when each storage came and went, counted in operators, and the step's phases.

    Args:
        existing: tensors alive before.
        device: its kind is what is tracked: beside a GPU's tensors, the host's are no part of the step's memory.
    """

    def __init__(self, existing: Iterable[Tensor], device: torch.device) -> None:
        self._device_type = device.type
        self._alive: dict[int, tuple[int, int]] = {}  # serial number: (bytes, operator after which it was there)
        self._gone: list[tuple[int, int, int, int]] = []  # (serial number, bytes, first operator, last operator)
        self._phases = [("forward", 0)]  # name, and the operator after which it began
        self._second = 0  # the operator after which the second micro-step began
        self._peak_between = self._peak_of_micro_step = 0
        self.num_micro_steps = 0
        super().__init__(existing)

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type == self._device_type:
            super()._add(tensor)

    def _born(self, num_bytes: int) -> None:
        self._alive[self._births] = num_bytes, self.num_operators

    def _died(self, serial: int) -> None:
        num_bytes, first = self._alive.pop(serial)
        self._gone.append((serial, num_bytes, first, self.num_operators))

    def _see_peak(self) -> None:
        super()._see_peak()
        self._peak_of_micro_step = max(self._peak_of_micro_step, self.live_bytes)

    def enter(self, phase: str) -> None:
        """From the next operator on, the step is in this phase; each `forward` begins a micro-step."""
        if phase == "forward":
            self.num_micro_steps += 1
            if self.num_micro_steps == 1:
                return  # it began with the step
            if self.num_micro_steps == 2:
                self._second = self.num_operators
            else:
                self._fold_micro_step()
            self._peak_of_micro_step = 0
        self._phases.append((phase, self.num_operators))

    def _fold_micro_step(self) -> None:
        """Let the micro-step that ended join those before it, all of them as if one operator had been run."""
        self._peak_between = max(self._peak_between, self._peak_of_micro_step)
        point = self.num_operators = self._second + 1
        self._gone = [(*entry[:3], min(entry[3], point)) for entry in self._gone if entry[2] <= self._second]
        self._alive = {serial: (size, min(first, point)) for serial, (size, first) in self._alive.items()}
        self._phases = [(name, begin) for name, begin in self._phases if begin < self._second]
        self._phases.append(("between", self._second))

    def timeline(self, births: dict[str, set[int]]) -> Timeline:
        """What was written down, in few points: of many operators the one with most bytes alive.

        Args:
            births: serial numbers of storages by kind; of several kinds the first counts, and the rest are activations.
        """
        entries = [(s, size, first, self.num_operators) for s, (size, first) in self._alive.items()] + self._gone
        change = {kind: torch.zeros(self.num_operators + 2, dtype=torch.int64) for kind in KINDS}
        for serial, size, first, last in entries:
            kind = next((kind for kind, members in births.items() if serial in members), "activation")
            change[kind][first] += size
            change[kind][last + 1] -= size
        live = torch.stack([change[kind].cumsum(0)[:-1] for kind in KINDS])
        if self._peak_between:
            live[-1, self._second + 1] = self._peak_between - live[:-1, self._second + 1].sum()
        names, sizes, points = [], [], []
        ends = [begin for _, begin in self._phases[1:]] + [self.num_operators]
        for (name, begin), end in zip(self._phases, ends, strict=True):
            operators = torch.arange(begin + (begin > 0), end + 1)
            if len(operators):
                parts = operators.tensor_split(min(_POINTS_OF_PHASE, len(operators)))
                points += [int(part[live[:, part].sum(0).argmax()]) for part in parts]
                names.append(name)
                sizes.append(len(parts))
        counts = dict(zip(KINDS, live[:, points].tolist(), strict=True))
        return Timeline(names, sizes, self.num_micro_steps, counts)


class TrackedStep:
    """One training step under a `TimelineTracker`: slower, and the same to the last bit.

    Args:
        model, optimizer, gradients: whose tensors the bytes are split into; `gradients` lists those alive when it is called.
        device: where the network is.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradients: Callable[[], list[Tensor]],
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.gradients = model, optimizer, gradients
        existing = [*model.parameters(), *model.buffers(), *self._optimizer_state(), *gradients()]
        self.tracker = TimelineTracker(existing, device)
        self.births: dict[str, set[int]] = {}
        """Serial numbers of storages by kind, once the step is done; activations are the rest."""
        self.timeline: Timeline | None = None
        """Once the step is done."""

    def _optimizer_state(self) -> list[Tensor]:
        return [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]

    @contextmanager
    def run(self) -> Iterator[Callable[[], None]]:
        """Wrap the step; call what it yields when all gradients exist, before they are dropped."""
        tracker, gradients = self.tracker, set[int]()

        def gradients_ready() -> None:
            gradients.update(tracker.births(self.gradients()))
            tracker.enter("optimizer")

        with _noted_phases(self.model, tracker), tracker:
            yield gradients_ready
        optimizer = tracker.births(self._optimizer_state())
        self.births = {
            "parameter": tracker.births(self.model.parameters()),
            "gradient": gradients - optimizer,  # a gradient may be the momentum
            "optimizer": optimizer,
            "other": tracker.births(self.model.buffers()),
        }
        with torch._C._DisableTorchDispatch():  # these are no tensors of training, whoever else counts
            self.timeline = tracker.timeline(
                self.births
            )  # now: the tracker sees storages go for as long as it is there


@contextmanager
def _noted_phases(model: nn.Module, tracker: TimelineTracker) -> Iterator[None]:
    """Tell the tracker when a forward, a backward and the probe begin."""

    def before(*_: Any) -> None:
        tracker.enter("forward" if torch.is_grad_enabled() else "probe")

    def after(_: nn.Module, __: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(lambda gradient: tracker.enter("backward"))

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
