"""When a run's state is saved."""

from __future__ import annotations

import time

from bln_train.records import EpochRecord, Record, StepRecord

MAX_SECONDS = 300.0
"""Longest time between checkpoints; the step under way is finished first."""


class CheckpointPolicy:
    """Says when a checkpoint is due: at the end of each epoch, and after a step that completes a count of steps or a time.

    Args:
        every_steps: steps from one checkpoint to the next, None for no such rule.
    """

    def __init__(self, every_steps: int | None) -> None:
        self.every_steps = every_steps
        self._last_saved = time.monotonic()

    def is_due(self, record: Record) -> bool:
        """Whether to save the state that training has when `record` is out."""
        if isinstance(record, StepRecord):
            counted = self.every_steps is not None and record.step % self.every_steps == 0
            return counted or time.monotonic() - self._last_saved > MAX_SECONDS
        return isinstance(record, EpochRecord)

    def saved(self) -> None:
        """The time until the next checkpoint begins now."""
        self._last_saved = time.monotonic()
