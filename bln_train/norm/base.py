"""What a training loop and the converters need of a norm that learns its mean and standard deviation by a likelihood."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn

from bln_train.norm.accounts import Account


class LikelihoodNorm(nn.Module, ABC):
    """A norm whose mean and standard deviation are parameters, fitted by a likelihood that the loss gets.

        out = weight * (x - mean) / std + bias

    Each training forward leaves its likelihood in `account`, for `BatchlessStatistics.nll` to add to the loss. There are two:
    norm/batchless.py, which this package trains with, and paper/layer.py, the published one.

    Attributes:
        num_features: C, channels of the input (N, C, *spatial).
        mean, raw_std: parameters, (C,) or, shared by all channels, (1,). `std` is a function of `raw_std`.
        weight, bias: parameters, (C,), or None.
        affine: whether weight and bias learn.
        eps: the smallest standard deviation that data can set, in units of the input.
        gauge: whether the likelihood is reported shifted, so that it is 0 for inputs that follow the statistics.
        account: what the forwards of the effective batch under way left here.
        first_moment, second_moment: means of xhat and of xhat^2 over the last effective batch, of the shape of `mean`, or None.
    """

    _dims: tuple[int, ...] = ()
    """Numbers of axes that an input may have."""

    num_features: int
    affine: bool
    eps: float
    gauge: bool
    mean: nn.Parameter
    raw_std: nn.Parameter
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    account: Account
    first_moment: Tensor | None
    second_moment: Tensor | None

    @property
    @abstractmethod
    def std(self) -> Tensor:
        """Standard deviation, (C,) or (1,), in units of the input."""

    @abstractmethod
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation, (C,) or (1,) each; the standard deviation is floored at eps."""

    @abstractmethod
    def update(self, num_images: int) -> Tensor:
        """Take what the gradients of an effective batch of `num_images` say, and end the batch.

        Returns: () the layer's nll per image, unweighted, averaged over channels; NaN where it is not known.
        """

    @property
    def natural_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients `update` takes, and which no optimizer may move."""
        return []

    @property
    def is_shared(self) -> bool:
        """Whether all channels have one mean and one standard deviation."""
        return self.mean.numel() < self.num_features

    @property
    def largest_std(self) -> float:
        """The standard deviation that no parameter can reach."""
        return math.inf

    @property
    def weight_version(self) -> int:
        """A number that changes whenever an optimizer moves the layer's weight; see `Account`."""
        return (self.mean if self.weight is None else self.weight)._version

    def discard(self) -> None:
        """Forget a half-done effective batch."""
        self.account = Account()

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Scale and shift per channel, (C,) or (1,) each, that the layer applies outside training."""
        scale = self.std.detach().reciprocal()
        scale = scale if self.weight is None else self.weight * scale
        shift = -self.mean.detach() * scale
        return scale, shift if self.bias is None else self.bias + shift

    def _check_input(self, x: Tensor, *, trains: bool) -> None:
        fits = x.dim() in self._dims and x.shape[1] == self.num_features
        if not fits or (x.numel() == 0 and (trains or len(x))):
            dims = " or ".join(f"{d}-dimensional" for d in self._dims)
            raise ValueError(f"{type(self).__name__}({self.num_features}) takes {dims} input, not empty, with {self.num_features} "
                             f"channels on axis 1, got shape {tuple(x.shape)}")  # fmt: skip
