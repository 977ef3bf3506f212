"""The published layer in plain autograd, for comparisons with the layer that this package trains with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bln_train.norm.accounts import Account
from bln_train.norm.base import LikelihoodNorm

Parametrization = Literal["log", "abs", "inv"]


def std_from_raw(raw: Tensor, parametrization: Parametrization, eps: float) -> Tensor:
    """Standard deviation from the stored parameter s: log exp(s), abs |s| + eps, inv 1 / (|s| + eps)."""
    if parametrization == "log":
        return raw.exp()
    # Not torch.abs, whose derivative is 0 at exactly 0: the parameter would stay there for good.
    size = torch.where(raw < 0, -raw, raw) + eps
    return size if parametrization == "abs" else size.reciprocal()


def raw_from_std(std: Tensor, parametrization: Parametrization, eps: float) -> Tensor:
    """Stored parameter s whose standard deviation is `std`; the inverse of `std_from_raw` for eps <= std (< 1 / eps)."""
    if parametrization == "log":
        return std.clamp(min=eps).log()
    size = std if parametrization == "abs" else std.reciprocal()
    return (size - eps).clamp(min=0)


def std_slope(raw: Tensor, std: Tensor, parametrization: Parametrization) -> Tensor:
    """Derivative of the standard deviation with respect to the stored parameter, of its shape; never 0."""
    if parametrization == "log":
        return std
    sign = torch.where(raw < 0, -1.0, 1.0).to(raw.dtype)
    return sign if parametrization == "abs" else -sign * std * std


class PaperNorm(LikelihoodNorm):
    """Batchless Normalization as published: an optimizer moves mean and standard deviation by the likelihood's gradient.

        xhat = (x - sg(mean)) / sg(std)                                     sg: stop-gradient
        out  = weight * xhat + bias
        nll  = nll_weight * sum over images of mean over channels, positions of
               log std + ((sg(x) - mean) / std)^2 / 2 - gauge
        gauge = sg(log std) + 1/2                                           0 where it is off

    The task's gradient reaches x, weight and bias alone; the likelihood's reaches mean and raw_std alone. No image sees another,
    so gradients of micro-batches add up to those of the batch. In eval mode the layer is the affine map above.

    Args:
        num_features: C, channels of the input (N, C, *spatial).
        parametrization: what `raw_std` stores, see `std_from_raw`.
        share: "channel" for statistics of shape (C,), "layer" for one pair of shape (1,).
        eps: part of `std_from_raw` for abs and inv, and the smallest standard deviation that data can set, in units of the input.
        affine: whether to learn weight and bias, (C,) each.
        init_mean, init_std: statistics before any data, in units of the input.
        nll_weight: factor of the likelihood in the loss.
        nll_reduction: over channels "mean", as published, or "sum".
        gauge: whether the reported likelihood is 0 in expectation for inputs that follow the statistics; changes no gradient.
        device, dtype: of parameters.

    Shapes: (N, C, *spatial) to the same, and to the same dtype; under autocast statistics and likelihood keep their own.

    Raises:
        ValueError: an argument is out of range, or an input of another shape.

    Source: Berger & Uc Cetina, arXiv 2212.14729, section 3.
    """

    def __init__(
        self,
        num_features: int,
        *,
        parametrization: Parametrization = "log",
        share: Literal["channel", "layer"] = "channel",
        eps: float = 1e-5,
        affine: bool = True,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        nll_weight: float = 1.0,
        nll_reduction: Literal["mean", "sum"] = "mean",
        gauge: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; a norm needs at least one channel")
        if not init_std > eps > 0:
            raise ValueError(f"need init_std > eps > 0, got init_std {init_std} and eps {eps}")
        if parametrization == "inv" and not init_std < 1 / eps:
            raise ValueError(f"inv keeps standard deviations below 1 / eps = {1 / eps:g}, got init_std {init_std}")
        self.num_features, self.parametrization, self.share, self.eps = num_features, parametrization, share, eps
        self.affine, self.nll_weight, self.nll_reduction, self.gauge = affine, nll_weight, nll_reduction, gauge

        entries = num_features if share == "channel" else 1
        self.mean = nn.Parameter(torch.full((entries,), init_mean, device=device, dtype=dtype))
        std = torch.full((entries,), init_std, device=device, dtype=dtype)
        self.raw_std = nn.Parameter(raw_from_std(std, parametrization, eps))
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if affine else None
        self.account = Account()
        self.first_moment = self.second_moment = None

    @property
    def std(self) -> Tensor:
        """Standard deviation, (C,) or (1,), in units of the input."""
        return std_from_raw(self.raw_std, self.parametrization, self.eps)

    @property
    def largest_std(self) -> float:
        """The standard deviation that no parameter can reach."""
        return 1 / self.eps if self.parametrization == "inv" else super().largest_std

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation, (C,) or (1,) each; the standard deviation is floored at eps."""
        self.mean.copy_(mean)
        self.raw_std.copy_(raw_from_std(std.clamp(min=self.eps), self.parametrization, self.eps))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (N, C, *spatial) to the same shape and dtype; see the class."""
        trains = self.training and torch.is_grad_enabled()
        self._check_input(x, trains=trains)
        shape = (-1, *([1] * (x.dim() - 2)))
        if not trains:
            scale, shift = self.affine_map()
            return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)
        xhat = (x - self.mean.detach().view(shape)) / self.std.detach().view(shape)
        self._check_forward()
        self.account.add(x.shape[0], x.numel() // (x.shape[0] * x.shape[1]))
        self.account.take(self._likelihood(xhat.detach()))
        if self.weight is None or self.bias is None:
            return xhat.to(x.dtype)
        return torch.addcmul(self.bias.view(shape), xhat, self.weight.view(shape)).to(x.dtype)

    def _likelihood(self, xhat: Tensor) -> Tensor:
        """The images' nll, (), from their xhat, (N, C, *spatial), which carries no gradient.

        (x - mean) / std = (xhat - offset) / growth, with an offset of 0 and a growth of 1 that carry the gradient. So the means of
        xhat and of xhat^2 are all that the likelihood needs of the images.
        """
        axes = [axis for axis in range(xhat.dim()) if axis != 1 or self.share == "layer"]
        first, second = xhat.mean(axes).view_as(self.mean), xhat.square().mean(axes).view_as(self.mean)
        std = self.std
        offset, growth = (self.mean - self.mean.detach()) / std.detach(), std / std.detach()
        square = (second - 2 * offset * first + offset.square()) / growth.square()
        log_std = std.log()
        gauge = log_std.detach() + 0.5 if self.gauge else 0.0
        return len(xhat) * self._nll_scale * (log_std + square / 2 - gauge).sum()

    @property
    def _nll_scale(self) -> float:
        """Weight in the loss of each entry's likelihood of one image."""
        num_channels = 1 if self.nll_reduction == "mean" else self.num_features
        return self.nll_weight * num_channels / self.mean.numel()

    @torch.no_grad()
    def end_batch(self, num_images: int) -> Tensor:
        """Read moments and likelihood of an effective batch off the gradients, which stay for the optimizer.

        d nll / d mean = -scale * m1 / std,   d nll / d std = scale * (1 - m2) / std,   m1, m2 the means of xhat and of xhat^2

        Args:
            num_images: images of the effective batch, the loss being their mean.

        Returns: () the layer's nll per image, unweighted, averaged over channels; NaN where the statistics are frozen or the
            layer saw no image.
        """
        account, self.account = self.account, Account()
        nll = torch.full((), torch.nan, device=self.mean.device, dtype=self.mean.dtype)
        of_mean, of_raw = self.mean.grad, self.raw_std.grad
        if not (self.training and account.num_images) or (of_mean is None and of_raw is None):
            return nll
        scale = self._nll_scale * (account.num_images / num_images)
        std = self.std
        unknown = torch.full_like(std, torch.nan)
        self.first_moment = unknown if of_mean is None else -of_mean * std / scale
        excess = (
            unknown if of_raw is None else -of_raw * std / (scale * std_slope(self.raw_std, std, self.parametrization))
        )  # m2 - 1
        self.second_moment = excess + 1
        nll = excess.mean() / 2
        return nll if self.gauge else nll + 0.5 + std.log().mean()

    def extra_repr(self) -> str:
        """Arguments, as torch.nn layers print theirs."""
        return (f"{self.num_features}, parametrization={self.parametrization}, share={self.share}, eps={self.eps:g}, "
                f"affine={self.affine}")  # fmt: skip


class PaperNorm1d(PaperNorm):
    """The published layer for (N, C) or (N, C, L) input; arguments and attributes of `PaperNorm`."""

    _dims = (2, 3)


class PaperNorm2d(PaperNorm):
    """The published layer for (N, C, H, W) input; arguments and attributes of `PaperNorm`."""

    _dims = (4,)
