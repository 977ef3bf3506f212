"""What the forwards of one effective batch leave in batchless layers, and the same as numbers that several processes can add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Account:
    """What the forwards of one effective batch leave in a layer; a new one begins each. A copy of the layer gets an empty one.

    Args:
        num_to_watch: images of the probe.
        has_begun: whether the number of images is known, and their correction balanced.
    """

    def __init__(self, num_to_watch: int = 0, *, has_begun: bool = False) -> None:
        self.has_begun = has_begun
        self.nll: Tensor | None = None
        """() likelihood of the last forward's images, until the loss takes it."""
        self.num_images = self.num_positions = 0
        """Images, and positions of all of them."""
        self.num_uses = 0
        """In the last forward."""
        self.num_forwarded = 0
        """Images of forwards, whose second use of the layer does not count."""
        self.weight_version = 0
        """Of the layer's weight in the first of them: what changes a tensor in place raises it."""
        self.num_to_watch = num_to_watch
        """Images of the probe that are still to come."""
        self.is_open = num_to_watch > 0
        """Whether the next forward's first images are some of them."""
        self.num_watched = 0
        """Positions of those that came."""
        self.watched: Tensor | None = None
        """(4, C), see `watch`."""
        self.unit: Tensor | None = None
        self.shows_relu = False

    def __reduce__(self) -> tuple[type[Account], tuple[()]]:
        return Account, ()  # tensors of a graph cannot be copied, and a copy has no effective batch under way

    def add(self, num_images: int, num_positions: int) -> None:
        """Count a training forward's images, and the positions of each."""
        self.num_images += num_images
        self.num_forwarded += 0 if self.num_uses else num_images
        self.num_uses += 1
        self.num_positions += num_images * num_positions

    def take(self, nll: Tensor) -> None:
        """Keep a likelihood, (), for the loss."""
        self.nll = nll if self.nll is None else self.nll + nll


class HasAccount(Protocol):
    """A layer as this file sees it."""

    account: Account
    num_features: int
    mean: nn.Parameter


_NUM_COUNTS = 4


def counts_of(layers: Sequence[HasAccount]) -> list[int]:
    """Of each layer: images, positions of them, positions of the probe's images, and whether a relu follows."""
    accounts = [layer.account for layer in layers]
    return [n for a in accounts for n in (a.num_images, a.num_positions, a.num_watched, int(a.shows_relu))]


def watched_sums(layers: Sequence[HasAccount]) -> list[Tensor]:
    """Of each layer the sums over the probe's images, (4, C), in units of its input; zeros where it saw none of them.

    To be added up in place. A layer whose account watched in another unit is converted: only who saw an image knows the unit.
    """
    for layer in layers:
        account = layer.account
        if account.watched is None:
            account.watched = torch.zeros(4, layer.num_features, dtype=layer.mean.dtype, device=layer.mean.device)
        elif account.unit is not None:
            account.watched[0] *= account.unit
            account.watched[1] *= account.unit.square()
            account.watched[3] *= account.unit
        account.unit = None
    return [layer.account.watched for layer in layers if layer.account.watched is not None]


def set_counts(layers: Sequence[HasAccount], counts: Sequence[int]) -> None:
    """Put the sums of `counts_of` in the place of each layer's own counts."""
    for n, layer in enumerate(layers):
        account, own = layer.account, counts[n * _NUM_COUNTS : (n + 1) * _NUM_COUNTS]
        account.num_images, account.num_positions, account.num_watched = own[:3]
        account.shows_relu = own[3] > 0
        if not account.num_watched:
            account.watched = None
