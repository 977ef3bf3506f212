"""What the forwards of one effective batch leave in a batchless layer."""

from __future__ import annotations

from torch import Tensor


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
        """(2, C), see `watch`."""
        self.unit: Tensor | None = None

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
