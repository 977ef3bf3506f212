"""What a training loop and the converters need of a norm that learns its mean and standard deviation by a likelihood."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from bln_train.norm.accounts import Account

USE_PROCESSES = (
    "train with `torchrun -m bln_train run`, or with Trainer, which share statistics, correction and probe themselves"
)


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

    def end_batch(self, num_images: int) -> Tensor:
        """End an effective batch of `num_images` whose statistics an optimizer moves; norm/update.py ends those of the others.

        Args:
            num_images: of the batch.

        Returns: () the layer's nll per image, unweighted, averaged over channels; NaN where it is not known.

        Raises:
            NotImplementedError: the layer's statistics are moved by norm/update.py.
        """
        raise NotImplementedError

    @property
    def natural_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients norm/update.py takes, and which no optimizer may move."""
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

    def _check_forward(self) -> None:
        """Check a training forward before it is counted.

        Raises:
            RuntimeError: weights moved since a forward whose likelihood no loss took, or DistributedDataParallel runs the network.
        """
        account = self.account
        if not account.num_images:
            if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
                raise RuntimeError(f"DistributedDataParallel cannot share batchless statistics: {USE_PROCESSES}")
            account.weight_version = self.weight_version
        elif account.nll is not None and account.weight_version != self.weight_version and self.mean.requires_grad:
            raise RuntimeError(
                "weights moved since a training forward whose likelihood no loss took: batchless statistics would never move "
                "again. An ordinary training loop lacks the calls of BatchlessStatistics: begin(N), nll() in the loss, update(N), "
                "follow(...). To keep them on purpose put the norms into eval()"
            )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(f"nn.DataParallel cannot share the statistics of {type(self).__name__}: {USE_PROCESSES}")
