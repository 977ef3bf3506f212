"""The images of one optimizer step, and the micro-batches in which they go to the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bln_train.data.datasets import ImageSet
from bln_train.system.rng import instance_seeds
from bln_train.train.distributed import part_of

_BLOCK_IMAGES = 128
SENT_BYTES = 2**18
"""The most bytes of images that go to a device at once, unless one micro-batch has more."""


class MicroBatch(NamedTuple):
    """The images that one forward and backward takes, on the device."""

    images: Tensor
    """(n, 3, H, W) uint8"""
    labels: Tensor
    """(n,) int64"""
    seeds: Tensor
    """(n,) int64, the images' own seeds for every random draw."""


@dataclass(frozen=True)
class EffectiveBatch:
    """The images whose mean gradient an optimizer step follows, with the seed and epoch of their random draws."""

    images: ImageSet
    """The data set."""
    index: Tensor
    """(N,) int64 on the CPU, places in the data set, N >= 1."""
    seed: int
    epoch: int

    def __len__(self) -> int:
        """N."""
        return len(self.index)

    def part(self, number: int, count: int) -> EffectiveBatch:
        """Part `number` of `count` contiguous parts."""
        return replace(self, index=part_of(self.index, number, count))

    def micro_batches(self, size: int, device: torch.device) -> Iterator[MicroBatch]:
        """Cut the batch into micro-batches of `size` images, the last of which may be smaller."""
        # Labels and seeds of many micro-batches in one call, but not of all: memory is flat in the effective batch.
        image_bytes = self.images.images.shape[1:].numel()  # no view: it would count as a tensor of training
        most = _BLOCK_IMAGES if device.type == "cpu" else min(_BLOCK_IMAGES, SENT_BYTES // image_bytes)
        for block in self.index.split(max(1, most // size) * size):
            labels = self.images.labels[block].to(device)
            seeds = instance_seeds(self.seed, self.epoch, block).to(device)
            # To another device a block of images goes at once: each transfer costs as much as a small image's forward.
            pixels = None if device.type == "cpu" else _sent(self.images.images[block], device)
            for start in range(0, len(block), size):
                part = slice(start, start + size)
                own = self.images.images[block[part]] if pixels is None else pixels[part]
                yield MicroBatch(own, labels[part], seeds[part])

    def first(self, num_images: int, device: torch.device) -> MicroBatch:
        """The first `num_images`, together."""
        index = self.index[:num_images]
        return MicroBatch(
            _sent(self.images.images[index], device),
            self.images.labels[index].to(device),
            instance_seeds(self.seed, self.epoch, index).to(device),
        )


def _sent(pixels: Tensor, device: torch.device) -> Tensor:
    """The pixels on the device; from pinned memory, so that the host goes on meanwhile."""
    return pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels.to(device)
