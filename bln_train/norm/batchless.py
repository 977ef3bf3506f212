"""Batchless Normalization as torch.nn layers."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from bln_train.norm.accounts import Account
from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.batchnorm_state import BATCHNORM_KEYS, holds_batchnorm
from bln_train.norm.following import Following
from bln_train.norm.functional import batchless_norm, raw_from_std, sums_about
from bln_train.norm.kernels.feedback import begin_feedback
from bln_train.norm.kernels.table import StateRow


class _BatchlessNorm(LikelihoodNorm):
    """Normalise each channel by a learned mean and standard deviation, for any number of images, down to one.

        out = weight * (x - mean) / std + bias

    Reduced axes: none in the output. `mean` and `std` are fitted by a Gaussian negative log likelihood over images and
    positions, which `training` forwards leave in the layer for `BatchlessStatistics.nll` to add to the loss. In eval mode
    the layer is the affine map above.

    Args:
        num_features: C, channels of the input (N, C, *spatial).
        eps: the smallest standard deviation that data can set, in units of the input.
        affine: learn weight and bias, each (C,). Without, a layer with a correction has both and they stay 1 and 0: the correction
            is read off their gradients.
        init_mean, init_std: statistics before any data, in units of the input. device, dtype: of parameters and buffers.
        statistics_rate: step of the natural update, in (0, 1].
        correction_rate: rate of the running means that correct the input gradient, in [0, 1]; 0 turns it off.

    Attributes:
        mean (C,), raw_std the same shape, weight (C,), bias (C,): parameters.
        correction (2, C): buffer, running means of the coefficients A and B of the output gradient's regression on 1 and xhat, per
            position and for a summed loss.
        feedback (3, C): buffer, not in the state dict: how the batch under way uses it (kernels/feedback.py).

    Raises:
        ValueError: an argument is out of range, or an input of another shape.

    Source: Berger & Uc Cetina, arXiv 2212.14729.
    """

    _version = 1
    gauge = True

    correction: Tensor | None
    feedback: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-3,
        affine: bool = True,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        statistics_rate: float = 0.1,
        correction_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; a norm needs at least one channel")
        if not init_std > eps > 0:
            raise ValueError(f"need init_std > eps > 0, got init_std {init_std} and eps {eps}")
        if not 0 < statistics_rate <= 1:
            raise ValueError(f"statistics_rate is {statistics_rate}; a natural step needs a rate in (0, 1]")
        if not 0 <= correction_rate <= 1:
            raise ValueError(f"correction_rate is {correction_rate}; it is the rate of a moving average, in [0, 1]")
        self.num_features, self.eps = num_features, eps
        self.affine, self.statistics_rate = affine, statistics_rate
        self.correction_rate = correction_rate

        self.mean = nn.Parameter(torch.full((num_features,), init_mean, device=device, dtype=dtype))
        std = torch.full((num_features,), init_std, device=device, dtype=dtype)
        self.raw_std = nn.Parameter(raw_from_std(std, eps))
        if affine or correction_rate:
            self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        correction = torch.zeros(2, num_features, device=device, dtype=dtype) if correction_rate else None
        self.register_buffer("correction", correction)
        state = torch.zeros(len(StateRow), num_features, device=device, dtype=dtype) if correction_rate else None
        self.register_buffer("feedback", state, persistent=False)
        self.is_reused = False
        """Whether a forward uses the layer more than once: then the order of its images is not that of the batch."""
        self.batchnorm_eps = 1e-5
        """eps of a BatchNorm whose state dict is loaded: torch.nn's, or that of the layer that this one replaced."""

        self.group_size = 0
        """Channels of a group that is normalised behind this layer (BatchlessChannelNorm), 0 for none."""
        self.account = Account()
        self._end_feedback()
        self.first_moment: Tensor | None = None
        self.second_moment: Tensor | None = None
        """(C,), of the last effective batch: means of xhat and of xhat^2."""
        self.following: Following | None = None
        """The layer's part in the probe's forward after a step."""
        self.old_moments: tuple[Tensor, Tensor] | None = None
        """Of the probe's images, under the weights before the step."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, unexpected_keys: Any, errors: Any
    ) -> None:  # fmt: skip
        """Takes the state dict of a BatchNorm too (norm/batchnorm_state.py)."""
        if holds_batchnorm(state_dict, prefix):
            problem = self._take_batchnorm(state_dict, prefix)
            if problem:
                errors.append(
                    f"'{prefix}' is a batchless layer: {problem}. Load into the BatchNorm, then convert_batchnorm."
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )  # fmt: skip

    @torch.no_grad()
    def _take_batchnorm(self, state: MutableMapping[str, Tensor], prefix: str) -> str:
        """Replace a BatchNorm's entries under `prefix` by those of this layer; returns why not, "" if it was done.

            mean = running_mean,   std = sqrt(running_var + self.batchnorm_eps),   the same weight and bias

        The correction begins anew, and the layer's eps is lowered to the smallest standard deviation.
        """
        mean, std = state[f"{prefix}running_mean"], (state[f"{prefix}running_var"] + self.batchnorm_eps).sqrt()
        if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            return "the BatchNorm's statistics are not finite, or a variance + eps is not positive"
        self.eps = min(self.eps, float(std.min()))
        for key in BATCHNORM_KEYS[2:]:
            state.pop(f"{prefix}{key}", None)
        found = {"mean": mean, "raw_std": raw_from_std(std, self.eps)}
        if self.weight is not None and not self.affine:
            found["weight"] = torch.ones_like(mean)
        if self.bias is not None and (not self.affine or f"{prefix}weight" in state):  # BatchNorm's bias=False
            found["bias"] = torch.zeros_like(mean)
        if self.correction is not None:
            found["correction"] = mean.new_zeros(2, len(mean))
        for key, value in found.items():
            state.setdefault(f"{prefix}{key}", value)
        return ""

    @property
    def std(self) -> Tensor:
        """Standard deviation, (C,), in units of the input."""
        return self.raw_std.exp()

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation, (C,) each; the standard deviation is floored at eps."""
        self.mean.copy_(mean)
        self.raw_std.copy_(raw_from_std(std, self.eps))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (N, C, *spatial) to the same shape and dtype; see the class."""
        trains = self.training and torch.is_grad_enabled()
        self._check_input(x, trains=trains)
        if trains:
            return self._train_forward(x)
        shape = (-1, *([1] * (x.dim() - 2)))
        following = self.take_following()
        if following is not None:
            scale, shift = following.read(sums_about(x, self.mean.detach()), x.numel() // x.shape[1]).unbind(0)
            shift = torch.addcmul(shift, self.mean, scale, value=-1)
        else:
            scale, shift = self.affine_map()
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)

    def watch(self, num_images: int, num_positions: int, unit: Tensor | None = None) -> tuple[int, Tensor]:
        """How many of a training forward's `num_images` belong to the probe, and where their sums are to be added, (2, C).

        The sums, over `num_positions` of each, are those of y = (x - mean) / unit and of y^2.
        """
        account, self.account.is_open = self.account, False  # the first use counts where a network uses the layer twice
        number = min(num_images, account.num_to_watch)
        account.num_to_watch -= number
        account.num_watched += number * num_positions
        account.unit = unit
        if account.watched is None:
            account.watched = torch.zeros(2, self.num_features, dtype=self.mean.dtype, device=self.mean.device)
        return number, account.watched

    def count(self, num_images: int, num_positions: int) -> None:
        """Note the `num_images` of a training forward, and the `num_positions` of each."""
        self._check_groups(num_positions)
        self._check_forward()
        self.account.add(num_images, num_positions)
        if self.account.has_begun and self.account.num_uses > 1 and not self.is_reused:
            self.is_reused = True
            self._end_feedback()

    def _end_feedback(self) -> None:
        """No batch is under way: each image's correction is the running one."""
        if self.feedback is not None:
            begin_feedback([self.feedback], None)

    def _check_input(self, x: Tensor, *, trains: bool) -> None:
        super()._check_input(x, trains=trains)
        if len(x):
            self._check_groups(x.numel() // (x.shape[0] * x.shape[1]))

    def _check_groups(self, num_positions: int) -> None:
        if self.group_size == num_positions == 1:
            raise ValueError(
                "the groups of channels behind this norm have one value each here, which normalisation makes a constant: "
                "take fewer groups, or larger images"
            )

    def _train_forward(self, x: Tensor) -> Tensor:
        result = batchless_norm(
            x,
            self.mean,
            self.raw_std,
            self.weight,
            self.bias,
            correction=self.correction,
            feedback=self.feedback,
        )
        num_images, num_positions = x.shape[0], x.numel() // (x.shape[0] * x.shape[1])
        if self.account.is_open:
            number, watched = self.watch(num_images, num_positions)
            watched += sums_about(x.detach()[:number], self.mean.detach())
        self.count(num_images, num_positions)
        self.account.take(result.nll)
        return result.out

    def discard(self) -> None:
        """Forget a half-done effective batch, natural gradients included."""
        super().discard()
        self._end_feedback()
        self.old_moments = None
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients of `natural_parameters`."""
        for parameter in self.natural_parameters:
            parameter.grad = None

    @property
    def natural_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients `update` takes, and which no optimizer may move."""
        natural = [self.mean, self.raw_std]
        if self.affine or self.weight is None or self.bias is None:
            return natural
        return [*natural, self.weight, self.bias]

    def take_following(self) -> Following | None:
        """Its part in the probe's forward, where this is its first use there."""
        if self.following is not None and self.following.found is not None:
            self.following.settle()
        elif self.following is not None:
            self.following.begins()
        return self.following

    def extra_repr(self) -> str:
        """Arguments, as torch.nn layers print theirs."""
        return (f"{self.num_features}, eps={self.eps:g}, statistics_rate={self.statistics_rate:g}, "
                f"affine={self.affine}, correction_rate={self.correction_rate:g}")  # fmt: skip


class BatchlessNorm1d(_BatchlessNorm):
    """Batchless Normalization of (N, C) or (N, C, L) input; arguments and attributes of `_BatchlessNorm`."""

    _dims = (2, 3)


class BatchlessNorm2d(_BatchlessNorm):
    """Batchless Normalization of (N, C, H, W) input; arguments and attributes of `_BatchlessNorm`."""

    _dims = (4,)


class BatchlessNorm3d(_BatchlessNorm):
    """Batchless Normalization of (N, C, D, H, W) input; arguments and attributes of `_BatchlessNorm`."""

    _dims = (5,)


class BatchlessNorm(_BatchlessNorm):
    """Batchless Normalization of (N, C, *spatial) input of any of these numbers of axes, as nn.SyncBatchNorm takes it."""

    _dims = (2, 3, 4, 5)
