"""Scaled weight standardisation: what keeps weights from drifting in scale under norms that follow with a lag."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bln_train.norm.kernels.library import TYPES, address, library


class _StandardizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float) -> Tensor:
        axes = tuple(range(1, weight.dim()))
        fan_in = weight[0].numel()
        centred = weight - weight.mean(axes, keepdim=True)
        inverse = ((centred * centred).sum(axes, keepdim=True) + eps).rsqrt()
        out = centred * inverse
        ctx.save_for_backward(weight, inverse)
        assert fan_in > 1, "a filter of one weight has no variance"
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, inverse = ctx.saved_tensors
        axes = tuple(range(1, weight.dim()))
        out = (weight - weight.mean(axes, keepdim=True)).mul_(inverse)
        grad = grad - grad.mean(axes, keepdim=True)
        return (grad - out * (grad * out).sum(axes, keepdim=True)) * inverse, None


def standardize_weight(weight: Tensor, eps: float = 1e-4) -> Tensor:
    r"""Centre each output channel's filter and scale its sum of squares to 1, so that unit-variance input gives unit variance.

        what = (w - mean(w)) / sqrt(fan_in * var(w) + eps)

    Args:
        weight: (C_out, C_in / groups, *kernel), with more than one weight per filter.
        eps: added under the root, in units of fan_in * var.

    Source: Qiao et al., arXiv 1903.10520; scaled form Brock et al., arXiv 2101.08692. Saves the weight itself for backward,
    which is alive anyway, and one number per output channel.
    """
    return _StandardizeWeight.apply(weight, eps)


@torch.no_grad()
def filter_scale(weight: Tensor, eps: float = 1e-4) -> Tensor:
    """Scale of each filter of mean 0 that `standardize_weight` applies: 1 / sqrt(sum of squares + eps), (C_out, 1, ...)."""
    kernels = _kernels(weight)
    if kernels is not None:
        scale = torch.empty((weight.shape[0], *[1] * (weight.dim() - 1)), dtype=weight.dtype)
        kernels.filter_scale(address(weight), weight.shape[0], weight[0].numel(), eps, address(scale))
        return scale
    return _filter_norm(weight).square_().add_(eps).rsqrt_()


def _kernels(weight: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, where they can take a weight: each filter in one piece of memory."""
    kind = TYPES.get(weight.dtype)
    if kind is None or weight.device.type != "cpu" or weight.stride(0) != weight[0].numel():
        return None
    dense = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    return library(kind) if dense else None


def _filter_norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)  # no temporary of its size


@torch.no_grad()
def centre_filters(weight: Tensor) -> None:
    """Take each filter's mean out of it, in place; of one that has none but for rounding no bit changes."""
    kernels = _kernels(weight)
    if kernels is not None:
        epsilon = torch.finfo(weight.dtype).eps
        kernels.centre_filters(address(weight), weight.shape[0], weight[0].numel(), epsilon)
        torch.autograd.graph.increment_version(weight)
        return
    axes = tuple(range(1, weight.dim()))
    mean = weight.mean(axes, keepdim=True)
    rounding = torch.finfo(weight.dtype).eps * _filter_norm(weight) / weight[0].numel() ** 0.5
    weight.sub_(torch.where(mean.abs() > rounding, mean, 0.0))


class RawGradient:
    """A gradient at centred filters w with a scale iw held constant, to be made that of the unstandardised weight at the end.

        grad - mean(grad) - iw^2 * w * <grad, w>,  over each filter

    The map is linear, so it may be applied once to a sum over micro-batches; what `weight.grad` holds at the beginning, say a
    momentum that gradients gather in, is left out of it.

    Args:
        weight: (C_out, ...); its filters are centred in place, which changes nothing that they compute.

    Attributes:
        scale: iw, (C_out, 1, ...).
    """

    def __init__(self, weight: Tensor) -> None:
        centre_filters(weight)
        self.weight, self.scale = weight, filter_scale(weight)
        self.before = self._moments()

    def _moments(self) -> Tensor | None:
        """Of what `weight.grad` holds each filter's mean, and its sum with the weight: (2, C_out, 1, ...)."""
        weight, grad = self.weight, self.weight.grad
        if grad is None:
            return None
        kernels = _kernels(weight) if grad.stride() == weight.stride() else None
        if kernels is not None:
            moments = torch.empty(2, *self.scale.shape, dtype=weight.dtype)
            kernels.filter_moments(address(weight), address(grad), weight.shape[0], weight[0].numel(), address(moments))
            return moments
        axes = tuple(range(1, weight.dim()))
        return torch.stack((grad.mean(axes, keepdim=True), (grad * weight.detach()).sum(axes, keepdim=True)))

    @torch.no_grad()
    def project(self) -> None:
        """Apply the map to what came in since."""
        weight, grad = self.weight, self.weight.grad
        after = self._moments()
        if grad is None or after is None:
            return
        before = torch.zeros_like(after) if self.before is None else self.before
        kernels = _kernels(weight) if grad.stride() == weight.stride() else None
        if kernels is not None:
            kernels.project_filters(
                address(weight), address(grad), address(self.scale), address(before), address(after),
                weight.shape[0], weight[0].numel(),
            )  # fmt: skip
            torch.autograd.graph.increment_version(grad)
            return
        mean, along = (after - before).unbind(0)
        grad.sub_(mean).addcmul_(weight, self.scale.square() * along, value=-1)


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weight passes through `standardize_weight`; arguments, shapes and state dict of nn.Conv2d.

    Source: Qiao et al., arXiv 1903.10520; scaled form Brock et al., arXiv 2101.08692.
    """

    shared_weight: Tensor | None = None
    """Inside `standardize_once`: the standardised weight that every forward uses."""
    constant_scale: Tensor | None = None
    """Inside `fold_once`, (C_out, 1, ...): the scale of the centred filters, which gradients take for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, (N, C_in, H, W), to (N, C_out, H', W')."""
        if self.constant_scale is not None:
            return self._conv_forward(x, self.weight * self.constant_scale, self.bias)
        weight = standardize_weight(self.weight) if self.shared_weight is None else self.shared_weight
        return self._conv_forward(x, weight, self.bias)


def conv_like(conv: nn.Conv2d, kind: type[nn.Conv2d], weight: nn.Parameter) -> nn.Conv2d:
    """A convolution of a kind with the arguments and the bias of another one, and a weight of its shape."""
    new = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]  # torch's tuples have no length
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device="meta",
    )
    new.weight, new.bias = weight, conv.bias
    return new


@contextmanager
def standardize_once(convs: list[StandardizedConv2d]) -> Iterator[None]:
    """Standardise the weight of each of `convs` once for all forwards and backwards inside, not once for each micro-batch.

    Gradients gather at the standardised weight and go through the standardisation together at the end. That is linear, so
    the sum is the same; and a convolution saves its standardised weight for backward anyway, so the peak is too.
    """
    standardized = []
    try:
        for conv in convs:
            weight = standardize_weight(conv.weight)
            conv.shared_weight = weight.detach().requires_grad_(conv.weight.requires_grad)
            standardized.append(weight)
        yield
        for conv in convs:
            weight, shared = standardized.pop(0), conv.shared_weight
            conv.shared_weight = None
            if shared is not None and shared.grad is not None:
                torch.autograd.backward(weight, shared.grad)
    finally:
        for conv in convs:
            conv.shared_weight = None
