"""The sums that a micro-step of train/step.py adds to, and the interface of what may take it in its place."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from bln_train.norm.replay import Run
from bln_train.train.batches import MicroBatch


class Sums(NamedTuple):
    """Sums over the images of an effective batch, on the device; micro-steps add to the first two."""

    loss: Tensor
    """() float64, task losses."""
    correct: Tensor
    """() int64, images classified correctly."""
    num_images: Tensor
    """() images of the whole effective batch."""


class Graphs(Protocol):
    """What takes micro-steps in the place of AccumulationStep.micro_step; see train/cuda_graphs.py."""

    @property
    def run(self) -> Run:
        """What takes the work between micro-steps; see norm/replay.py."""

    def begin(self, sums: Sums) -> Sums:
        """Before the first micro-step of an optimizer step: the sums that micro-steps are to be given."""

    def __call__(self, batch: MicroBatch, sums: Sums) -> None:
        """As AccumulationStep.micro_step."""

    def end(self, sums: Sums) -> Sums:
        """After the last: the sums, for the caller to keep."""

    def forget(self) -> None:
        """Let go of what is kept from step to step."""

    def take_notices(self) -> tuple[str, ...]:
        """What the user should know, once."""
