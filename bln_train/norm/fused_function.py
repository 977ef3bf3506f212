"""The autograd function of convolution + batchless norm + residual sum + activation, which keeps its input and output only.

The statistics do not depend on the batch, so the norm is an affine map per channel, and the operation is

    yc = conv(x, w) + (b - mean) / iw        iw: scale of a standardised filter (norm/standardize.py), 1 for a plain one
    z  = act(gamma / std * iw * yc + beta + r)

written into the convolution's own output, with the two sums per channel that the statistics need taken on the way. Backward
needs x, which the layer before keeps as its z, and z. Its convolution takes

    gc = s * (g - p * (A + B * xhat))        g = gz * act'(z),  s = gamma / std * iw,  p: weight of one image in the loss

where (A, B) is the running correction. Where a gradient arrives, xhat is (z - r - beta) / gamma; where a relu cut it off
nothing shows it, and the correction wants it: `correction_mode` "exact" runs the convolution again, "imputed" takes what z
shows, h = z - r - beta, shifted and scaled to a mean of 0 and a covariance of 1 with xhat, both measured on the probe's
images (`imputation` of the norm). Times s no gamma is divided by; a layer with a gamma too small to read xhat from z, or
whose z or r nothing else keeps alive, runs its convolution again.

Legend: N images, C channels, other shapes as in norm/functional.py; "per channel" is (C,). Rows: (N*S, C) of a channels-last
or dense tensor, (N, C, S) of a contiguous one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Constants(NamedTuple):
    """What a layer's parameters say, per channel; valid until one of them changes."""

    weight: Tensor
    """The linear operation's weight, as it enters it."""
    bias: Tensor
    """Of the linear operation, so that its output is centred."""
    iw: Tensor | None
    """Scale of standardised filters, None where `weight` needs none."""
    inverse_square: Tensor
    """(iw / std)^2: xhat^2 = inverse_square * yc^2."""
    scale: Tensor
    """s."""
    shift: Tensor | None
    """beta."""
    correction: Tensor | None
    """(2, C): -s * (A + B * c) and -s * B * a, where xhat is taken for a * q + c; q is yc or z - r."""
    gamma_scale: Tensor | None
    """sum of g * xhat = gamma_scale * sum of g * q + gamma_shift * sum of g."""
    gamma_shift: Tensor | None
    mean_moment: Tensor
    """What a sum of yc, over the positions of an image, adds to the gradient of mean."""
    raw_moment: Tensor
    """The same of yc^2 and raw_std."""
    per_image: Tensor
    """(C,) or (1,): what one image adds to the gradient of raw_std besides."""
    recompute: bool
    """Whether q is yc, computed again, or read off z."""


class _FoldedFunction(torch.autograd.Function):
    """x, weight, conv bias, mean, raw_std, gamma, beta, residual, layer (FoldedConvNorm), constants -> z, nll."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        conv_bias: Tensor | None,
        mean: Tensor,
        raw_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        layer: Any,
        constants: Constants,
    ) -> tuple[Tensor, Tensor]:
        norm = layer.norm
        dtype = autocast_dtype(x) or x.dtype
        kept_x = x.to(dtype)
        y = dense(layer.apply_linear(kept_x, weight.to(dtype), constants.bias.to(dtype)))
        num_images, num_positions = y.shape[0], y.numel() // (y.shape[0] * y.shape[1])
        rows, axes = flat(y)
        wide = rows.to(constants.scale.dtype)
        sum_y, sum_square = wide.sum(axes), (wide * wide).sum(axes)
        del wide
        # nll = scale * sum over entries, images of [log std + mean over positions of xhat^2 / 2 - gauge]
        entries = norm.nll_scale * mean.numel()
        nll = torch.dot(sum_square, constants.inverse_square).mul_(entries / (2 * num_positions * norm.num_features))
        if norm.gauge:
            nll.sub_(0.5 * num_images * entries)
        else:
            nll.add_(norm.std.log().sum(), alpha=num_images * norm.nll_scale)

        affine_(rows, constants.scale, constants.shift)
        z = layer.activate_(y if residual is None else y.add_(residual))
        keeps_z = layer.activation != "identity" or not constants.recompute
        ctx.save_for_backward(
            kept_x, weight, z if keeps_z else None, None if constants.recompute else residual, sum_y, sum_square
        )
        ctx.layer, ctx.constants, ctx.x_dtype = layer, constants, x.dtype
        ctx.num_images, ctx.num_positions = num_images, num_positions
        ctx.set_materialize_grads(False)
        return z, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_nll: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, z, residual, sum_y, sum_square = ctx.saved_tensors
        layer, constants = ctx.layer, ctx.constants
        needs = dict(zip(("x", "weight", "conv_bias", "mean", "raw_std", "gamma", "beta", "residual"),
                         ctx.needs_input_grad, strict=False))  # fmt: skip
        grad_mean = grad_raw = grad_gamma = grad_beta = None

        if grad_nll is not None and (needs["mean"] or needs["raw_std"]):
            grad_mean, grad_raw = _likelihood_backward(ctx, sum_y, sum_square, grad_nll)
        if grad_out is None:
            return None, None, None, grad_mean, grad_raw, *[None] * 5

        grad = layer.activation_backward(grad_out, z)
        corrects = constants.correction is not None and grad_nll is not None
        if (corrects or needs["gamma"]) and constants.recompute:
            q = layer.apply_linear(x, weight.to(x.dtype), constants.bias.to(x.dtype))
        else:
            q = F.leaky_relu(z, 1 / layer.slope) if layer.activation == "leaky_relu" else z
        grad = dense(grad) if q is None else in_order_of(grad, dense(q))
        rows, axes = flat(grad)
        q_rows = rows if q is None else flat(dense(q))[0]
        if residual is not None:
            q_rows = q_rows - flat(in_order_of(residual, grad))[0]
        del q, residual, z

        wide = rows.to(constants.scale.dtype)  # low precision would overflow in sums and products
        if needs["beta"] or needs["gamma"]:
            grad_beta = wide.sum(axes)
        if needs["gamma"]:
            grad_gamma = (wide * q_rows).sum(axes).mul_(constants.gamma_scale)
            if constants.gamma_shift is not None and grad_beta is not None:
                grad_gamma.addcmul_(grad_beta, constants.gamma_shift)
        scale = aligned(constants.scale, rows)
        if corrects:
            offset, slope = (constants.correction * grad_nll).unbind(0)
            out = torch.addcmul(aligned(offset, rows), q_rows, aligned(slope, rows)).addcmul_(wide, scale)
        else:
            out = wide * scale
        grad_c = out.to(x.dtype).as_strided(grad.shape, grad.stride())
        grad_residual = grad if needs["residual"] else None
        del grad, rows, q_rows, wide, out
        grad_x, grad_weight, grad_conv_bias = layer.linear_backward(
            grad_c, x, weight.to(x.dtype), (needs["x"], needs["weight"], needs["conv_bias"])
        )
        if grad_conv_bias is not None and constants.iw is not None:
            grad_conv_bias = grad_conv_bias / constants.iw
        return (
            None if grad_x is None else grad_x.to(ctx.x_dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_conv_bias is None else grad_conv_bias.to(constants.scale.dtype),
            grad_mean,
            grad_raw,
            grad_gamma,
            grad_beta if needs["beta"] else None,
            grad_residual,
            None,
            None,
        )


def _likelihood_backward(ctx: Any, sum_y: Tensor, sum_square: Tensor, grad_nll: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of mean and raw_std: the likelihood alone moves the statistics."""
    constants = ctx.constants
    per_position = grad_nll / ctx.num_positions
    grad_mean = (sum_y * constants.mean_moment).mul_(per_position)
    grad_raw = (sum_square * constants.raw_moment).mul_(per_position)
    if ctx.layer.norm.share == "layer":
        grad_mean, grad_raw = grad_mean.mean(0, keepdim=True), grad_raw.mean(0, keepdim=True)
    return grad_mean, grad_raw.addcmul_(constants.per_image, grad_nll, value=ctx.num_images)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision in which autocast runs a convolution of x now, None outside autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.is_contiguous(memory_format=torch.channels_last)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, contiguous or channels-last; a copy only of what is neither."""
    return tensor if _channels_last(tensor) else tensor.contiguous()


def in_order_of(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor in the memory order of `model`; a copy only of what is in another."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def flat(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Rows of a dense tensor, a view, and their axes without channels. In one call: at micro-batch 1 calls are what costs."""
    if _channels_last(tensor):
        n, c, h, w = tensor.shape
        return tensor.as_strided((n * h * w, c), (c, 1)), (0,)
    return (tensor, (0,)) if tensor.dim() == 2 else (tensor.flatten(2), (0, 2))


def aligned(per_channel: Tensor, rows: Tensor) -> Tensor:
    """A vector per channel, shaped to broadcast over rows."""
    return per_channel if rows.dim() == 2 else per_channel.view(-1, 1)


def affine_(rows: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """rows * scale + shift per channel, in place."""
    scale = aligned(scale, rows)
    if shift is None:
        rows.mul_(scale)
    elif rows.dtype == scale.dtype:
        torch.addcmul(aligned(shift, rows), rows, scale, out=rows)
    else:  # low precision under autocast: the map is computed in the parameters' precision
        rows.copy_(torch.addcmul(aligned(shift, rows), rows, scale))
