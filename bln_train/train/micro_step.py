"""What a micro-step of train/step.py takes and adds to, and what may take it in its place."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from bln_train.norm.replay import Run


class MicroBatch(NamedTuple):
    """What is on the device at once."""

    images: Tensor
    """(n, 3, H, W) uint8"""
    labels: Tensor
    """(n,) int64"""
    seeds: Tensor
    """(n,) int64, the images' own seeds for every random draw."""


class Sums(NamedTuple):
    """What micro-steps add to besides gradients, and read; on the device."""

    loss: Tensor
    """() float64, sum of the task loss."""
    correct: Tensor
    """() int64, images classified right."""
    num_images: Tensor
    """() of the effective batch."""


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
