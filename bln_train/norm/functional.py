"""The maths of Batchless Normalization (Berger & Uc Cetina, arXiv 2212.14729) and its autograd function.

Symbols and shapes are those of docs/method.md; a, (N, C, *spatial), is the input.

"Rows" are a view in memory order in which the channel axis broadcasts. A channels-last tensor has rows (N*S, C), whose
sums over axis 0 are the fastest on a CPU. Any other tensor has rows (N, C, S).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bln_train.norm.kernels.feedback import corrections, no_feedback, nonzero


def raw_from_std(std: Tensor, eps: float) -> Tensor:
    """The stored parameter, log std, of a standard deviation that is floored at eps."""
    return std.clamp(min=eps).log()


class Rows(NamedTuple):
    """A memory-order view of a tensor, and how to reduce and broadcast over it."""

    rows: Tensor
    reduced: tuple[int, ...]
    """Axes summed to get one value per channel."""
    broadcast: tuple[int, ...]
    """Shape that aligns a vector over channels with `rows`."""


def as_rows(a: Tensor) -> Rows:
    """View (N, C, *spatial) as rows; copies only what is neither contiguous nor channels-last."""
    channels_last = a.dim() > 2 and not a.is_contiguous() and a.movedim(1, -1).is_contiguous()
    return _rows_in_order(a, channels_last)


def sums_about(x: Tensor, mean: Tensor) -> Tensor:
    """Sums over images and positions of x - mean and of its square: (2, C), one image's temporaries at a time."""

    def sums(image: Tensor) -> Tensor:
        view = as_rows(image)
        centred = view.rows.to(mean.dtype) - mean.view(view.broadcast)
        return torch.stack((centred.sum(view.reduced), (centred * centred).sum(view.reduced)))

    return torch.stack([sums(image) for image in x.split(1)]).sum(0)


def _rows_in_order(a: Tensor, channels_last: bool) -> Rows:
    if a.dim() == 2:
        return Rows(a, (0,), (-1,))
    if channels_last:
        return Rows(a.movedim(1, -1).reshape(-1, a.shape[1]), (0,), (-1,))
    return Rows(a.reshape(a.shape[0], a.shape[1], -1), (0, 2), (-1, 1))


def _by_image(rows: Tensor, num_images: int) -> Tensor:
    """Rows with an axis of images: (N, S, C), or (N, C, S)."""
    return rows.view(num_images, -1, rows.shape[1]) if rows.dim() == 2 else rows


def _empty_rows(a: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """An uninitialised tensor of a's shape, in rows order whatever a's strides are, and its rows, which are a view."""
    n, c, *spatial = a.shape
    if not channels_last:
        out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        return out, out if a.dim() == 2 else out.view(n, c, -1)
    first, *middle, last = torch.empty((n, *spatial, c), device="meta").stride()
    out = torch.empty_strided(a.shape, (first, last, *middle), dtype=a.dtype, device=a.device)
    return out, out.movedim(1, -1).view(-1, c)


def _from_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """View rows as a tensor of shape (N, C, *spatial), in the memory order they came from."""
    if rows.dim() == 2 and len(shape) > 2:
        n, c, *spatial = shape
        return rows.view(n, *spatial, c).movedim(-1, 1)
    return rows.view(shape)


class NormOutput(NamedTuple):
    """What one training forward yields."""

    out: Tensor
    """(N, C, *spatial), gamma * xhat + beta."""
    nll: Tensor
    """() Gaussian negative log likelihood, summed over the N images, already times its weight."""
    sum_xhat: Tensor
    """(C,) sum of xhat over images and positions; carries no gradient."""
    sum_xhat_sq: Tensor
    """(C,) the same of xhat squared."""


class _BatchlessNormFunction(torch.autograd.Function):
    """a, statistics, affine -> NormOutput; see `batchless_norm`."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        mean: Tensor,
        raw_std: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        correction: Tensor | None,
        feedback: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        view = as_rows(a)
        shape = view.broadcast
        num_images = a.shape[0]
        num_positions = a.numel() // (num_images * a.shape[1])
        std = raw_std.exp()

        xhat = (view.rows - mean.view(shape)).mul_(std.reciprocal().view(shape))  # statistics' dtype under autocast
        sum_xhat, sum_xhat_sq = xhat.sum(view.reduced), (xhat * xhat).sum(view.reduced)
        # nll = sum over channels, images of [mean over positions of xhat^2 - 1] / 2C
        nll = sum_xhat_sq.sum() / (2 * num_positions * len(mean)) - 0.5 * num_images

        # Written through a view: the output itself must be no view, or nobody could apply a relu to it in place.
        channels_last = a.dim() > 2 and xhat.dim() == 2
        out, rows = _empty_rows(a, channels_last)
        if weight is None or bias is None:
            rows.copy_(xhat)
        elif rows.dtype == xhat.dtype:
            torch.addcmul(bias.view(shape), xhat, weight.view(shape), out=rows)
        else:
            rows.copy_(torch.addcmul(bias.view(shape), xhat, weight.view(shape)))
        ctx.save_for_backward(xhat.to(a.dtype), std, weight, sum_xhat, sum_xhat_sq)
        ctx.correction, ctx.feedback = correction, feedback  # as they are when backward comes, which moves the latter
        ctx.shape, ctx.channels_last = a.shape, channels_last
        ctx.num_images, ctx.num_positions = num_images, num_positions
        ctx.mark_non_differentiable(sum_xhat, sum_xhat_sq)
        ctx.set_materialize_grads(False)
        return out, nll, sum_xhat, sum_xhat_sq

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_nll: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        xhat, std, weight, sum_xhat, sum_xhat_sq = ctx.saved_tensors
        correction, feedback = ctx.correction, ctx.feedback
        needs_a, needs_mean, needs_raw, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        grad_a = grad_mean = grad_raw = grad_weight = grad_bias = None

        if grad_nll is not None and (needs_mean or needs_raw):  # the likelihood alone moves the statistics
            per_channel = grad_nll / len(std)
            grad_mean = -per_channel * sum_xhat / (std * ctx.num_positions)
            grad_raw = per_channel * (ctx.num_images - sum_xhat_sq / ctx.num_positions)

        if grad_out is None:
            return None, grad_mean, grad_raw, *[None] * 4
        grad_rows, reduced, shape = _rows_in_order(grad_out, ctx.channels_last)
        if needs_bias:
            grad_bias = grad_rows.sum(reduced, dtype=std.dtype)
        if needs_weight:
            grad_weight = (grad_rows.to(std.dtype) * xhat).sum(reduced)  # low precision would overflow in the product
        if needs_a:  # the task alone reaches the layers below
            gain = (weight / std if weight is not None else std.reciprocal()).view(shape)
            if correction is None or grad_nll is None:
                rows = grad_rows * gain
            else:
                # g - scale*(A + B*xhat). The likelihood enters the loss with the weight of one image, 1/N (times a loss
                # scale), so its incoming gradient is that weight: the correction needs no second way to learn it.
                num_positions = ctx.num_positions
                images, positions = (_by_image(r, ctx.num_images) for r in (grad_rows, xhat))
                axis = 1 if grad_rows.dim() == 2 else 2
                wide, of_x = images.to(std.dtype), positions.to(std.dtype)
                seen = torch.stack((wide.sum(axis), (wide * of_x).sum(axis)), 1) / (num_positions * nonzero(grad_nll))
                moments = torch.stack((of_x.mean(axis), (of_x * of_x).mean(axis)), 1)
                taken = corrections(
                    correction, no_feedback(correction) if feedback is None else feedback, seen, moments, grad_nll
                )
                offset, slope_xhat = (taken * (-grad_nll)).unsqueeze(axis + 1).unbind(1)
                rows = torch.addcmul(images * gain, torch.addcmul(offset, positions, slope_xhat), gain).view(
                    grad_rows.shape
                )
            grad_a = _from_rows(rows.to(grad_out.dtype), ctx.shape)
        return grad_a, grad_mean, grad_raw, grad_weight, grad_bias, *[None] * 2


def batchless_norm(
    a: Tensor,
    mean: Tensor,
    raw_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    correction: Tensor | None = None,
    feedback: Tensor | None = None,
) -> NormOutput:
    r"""Normalise by learned statistics, and give the likelihood that fits them.

        xhat = (a - sg(mean)) / sg(std)          sg: stop-gradient
        out  = weight * xhat + bias
        nll  = sum_n mean_{c,s} [ log std + ((sg(a) - mean) / std)^2 / 2 - sg(log std) - 1/2 ]

    So nll is 0 in expectation when a ~ N(mean, std^2).

    The gradient of `out` reaches a, weight and bias only; that of `nll` reaches mean and raw_std only. With a correction
    (A, B), a receives (weight / std) * (g - p * (A + B * xhat)), where g is the gradient of `out` and p that of `nll`,
    which is the weight of one image in the loss. Sums over micro-batches equal the whole batch's.

    Args:
        a: (N, C, *spatial), any memory format, floating point; under autocast it may be of lower precision than the
            statistics, in which sums are taken.
        mean, raw_std: (C,); std = exp(raw_std).
        weight, bias: (C,), both or neither.
        correction: (2, C), A and B per position, for a loss that weighs each image with 1.
        feedback: (len(StateRow), C), from which each image has an A and B of its own instead, backward by backward; see
            kernels/feedback.py, where `correction` is `running`.

    Source: arXiv 2212.14729, section 3; the correction follows Online Normalization (Chiley et al., arXiv 1905.05894).
    """
    return NormOutput(*_BatchlessNormFunction.apply(a, mean, raw_std, weight, bias, correction, feedback))
