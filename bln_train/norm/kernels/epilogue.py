"""What surrounds a folded linear operation: norm, residual sum, activation and all their sums, forward and backward.

On the CPU each direction is one pass of a compiled kernel (kernels/epilogue.c) where tensors are float32 or float64, of the
parameters' precision, channels-last or (N, C), and their channels a multiple of the kernel's vectors. On CUDA it is one of a
Triton kernel (kernels/triton_kernels.py) where Triton works there and tensors have one memory order, low precision included.
Otherwise, and on every other device, PyTorch's operators, pass by pass. All compute the same up to rounding.

Legend as in norm/functional.py: N images, C channels, S positions of an image.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bln_train.norm.balance import balance_images, weight_of_an_image
from bln_train.norm.kernels import triton_launch
from bln_train.norm.kernels.compiled import TYPES, address, library
from bln_train.norm.kernels.layout import aligned, by_image, channels_last, dense, flat, in_order_of, positions_of

Activation = Literal["identity", "relu", "leaky_relu"]
_CODES = {"identity": 0, "relu": 1, "leaky_relu": 2}
_VECTOR_BYTES = 32  # of the kernels
_WORTH_THREADS = 32768  # entries; below, starting threads takes longer than they save (PyTorch's own bound)


class Row(IntEnum):
    """Rows of a layer's table of constants, (len(Row), C); y is what the linear operation gives, q as in `backward`."""

    SCALE = 0
    """v = scale * y + shift is what enters the residual sum."""
    SHIFT = 1
    OFFSET = 2
    """offset + gain * q is scale * xhat, or what stands in for it."""
    GAIN = 3
    GAMMA_SCALE = 4
    """sum of g * xhat = gamma_scale * sum of g * q + gamma_shift * sum of g."""
    GAMMA_SHIFT = 5
    NLL_SQUARE = 6
    """nll = sum over channels of nll_square * (sum of y^2) / S + nll_image * N."""
    NLL_IMAGE = 7
    MEAN_MOMENT = 8
    """Gradient of mean per unit of nll = mean_moment * (sum of y) / S."""
    RAW_MOMENT = 9
    """Gradient of raw_std per unit of nll = raw_moment * (sum of y^2) / S + raw_image * N."""
    RAW_IMAGE = 10
    SPREAD = 11
    """8/pi * gamma^2, for `cut_off`."""
    INVERSE = 12
    """xhat = inverse * y."""


def forward_(
    y: Tensor,
    residual: Tensor | None,
    table: Tensor,
    activation: Activation,
    slope: float,
    nll: Tensor,
    num_watched: int = 0,
    watched: Tensor | None = None,
) -> Tensor:
    """Write z = act(scale * y + shift + residual) into y.

    Args:
        y: (N, C, *spatial), dense; nobody else's.
        residual: of the same shape, in any memory order.
        table: (len(Row), C), dense, in whose dtype sums are taken.
        slope: of a leaky relu.
        nll: (), to which the likelihood of the N images is added.
        num_watched, watched: of the first images, the sums of y, y^2 and, for a relu, those of q as `backward` reads it off z,
            and of q * y, are added to watched, (4, C).

    Returns: each image's sums of y and y^2, (N, 2, C).
    """
    num_images, num_channels = y.shape[:2]
    num_positions = positions_of(y)
    if triton_launch.takes(y, table.dtype, residual):
        return triton_launch.forward(y, residual, table, code(activation), slope, nll, num_watched, watched)
    kernels = kernels_for(y, table.dtype)
    if kernels is not None:
        sums = torch.empty(num_images, 2, num_channels, dtype=y.dtype)
        _compiled_forward(kernels, y, residual, table, num_watched, activation, slope, sums, watched, nll)
        return sums
    rows, axis = by_image(y)
    # The norm needs no temporary of y's size; y is centred, so that nothing is lost in squares of a large mean.
    square = torch.linalg.vector_norm(rows, dim=axis, dtype=table.dtype).square_()
    sums = torch.stack((rows.sum(axis, dtype=table.dtype), square), 1)
    before = None
    if watched is not None:
        watched[:2] += sums[:num_watched].sum(0)
        before = y[:num_watched].to(table.dtype, copy=True) if activation == "relu" else None
    map_(y, residual, table, activation, slope)
    if watched is not None and before is not None:
        other = None if residual is None else residual[:num_watched]
        rows, axes = flat(_shown(y[:num_watched], other, table, activation, slope).to(table.dtype))
        watched[2] += rows.sum(axes)
        watched[3] += (rows * flat(before)[0]).sum(axes)
    per_image = torch.addcmul(
        num_images * table[Row.NLL_IMAGE], table[Row.NLL_SQUARE], sums[:, 1].sum(0), value=1 / num_positions
    )
    nll += per_image.sum()
    return sums


def sums_of(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of y and of y^2 over everything but channels, taken in dtype: dense (N, C, *spatial) to (2, C)."""
    if triton_launch.takes(y, dtype):
        return triton_launch.sums_of(y, dtype)
    kernels = kernels_for(y, dtype)
    if kernels is None:
        rows, axes = flat(y)
        # The norm needs no temporary of y's size; y is centred, so that nothing is lost in squares of a large mean.
        square = torch.linalg.vector_norm(rows, dim=axes, dtype=dtype).square_()
        return torch.stack((rows.sum(axes, dtype=dtype), square))
    sums = torch.empty(len(y), 2, y.shape[1], dtype=dtype)
    _compiled_forward(kernels, y, None, None, 0, "identity", 0.0, sums, None, None)
    return sums[0] if len(y) == 1 else sums.sum(0)


def map_(y: Tensor, residual: Tensor | None, table: Tensor, activation: Activation, slope: float) -> None:
    """`forward_` without its sums; of the table the rows SCALE and SHIFT are enough."""
    if triton_launch.takes(y, table.dtype, residual):
        triton_launch.map_(y, residual, table, code(activation), slope)
        return
    kernels = kernels_for(y, table.dtype)
    if kernels is not None:
        sums = torch.empty(len(y), 2, y.shape[1], dtype=y.dtype)
        _compiled_forward(kernels, y, residual, table, 0, activation, slope, sums, None, None)
        return
    rows, _ = flat(y)
    scale, shift = aligned(table[Row.SCALE], rows), aligned(table[Row.SHIFT], rows)
    if rows.dtype == scale.dtype:
        torch.addcmul(shift, rows, scale, out=rows)
    else:  # low precision under autocast: the map is computed in the parameters' precision
        rows.copy_(torch.addcmul(shift, rows, scale))
    activate_(y if residual is None else y.add_(residual), activation, slope)


def backward(
    grad_out: Tensor,
    z: Tensor | None,
    given: Tensor | None,
    residual: Tensor | None,
    table: Tensor,
    sums: Tensor,
    grad_nll: Tensor | None,
    activation: Activation,
    slope: float,
    vectors: Tensor,
    *,
    prior: Tensor | None,
    state: Tensor | None,
    wants_grad: bool,
    may_overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """The way back through `forward_`.

        g = grad_out * act'(z),   q = given, or what entered the activation (read off z) - residual

    Where a relu cut off what entered it, q is shift + cut_off(residual + shift).

    Args:
        grad_out: (N, C, *spatial), gradient of z.
        z: what `forward_` gave; None where neither activation nor q needs it.
        given: q, dense; None to read it off z, and then a residual is taken off.
        table: (len(Row), C).
        sums: (N, 2, C), of `forward_`.
        grad_nll: () gradient of the likelihood, which is the weight of one image in the loss; None for 0.
        vectors: (4, C), to which the gradients of mean, raw_std, gamma and beta are added, statistics as if they were one for
            each channel.
        prior, state: (2, C) and (len(BalanceRow), C), from which each image's correction (A, B) comes (norm/balance.py), and the
            state goes on; None for 0.
        wants_grad: whether anybody reads g; else the first result may be any tensor.
        may_overwrite: whether grad_out may be.

    Returns: g, the gradient of what enters the activation and of the residual; and
        scale * g - grad_nll * (scale * A + B * (offset + gain * q)), the gradient of y, in its dtype.
    """
    q = z if given is None else given
    order = grad_out if q is None else q
    kernels = kernels_for(order, table.dtype) if grad_out.dtype == order.dtype else None
    order = dense(order) if kernels is None else order
    given_grad, grad_out = grad_out, in_order_of(grad_out, order)
    may_overwrite = may_overwrite or grad_out is not given_grad
    del given_grad
    if grad_nll is None:
        prior = state = None
    on_device = triton_launch.takes(order, table.dtype, grad_out)
    if kernels is None and not on_device:
        return _eager_backward(
            grad_out, z, given, residual, table, sums, grad_nll, activation, slope, vectors, prior, state, may_overwrite
        )
    num_images, num_channels = order.shape[:2]
    keeps = wants_grad and activation == "identity"  # g is grad_out
    spare = grad_out if may_overwrite and not keeps else None
    grad = grad_y = None
    if wants_grad and not keeps:
        grad = torch.empty_like(grad_out) if spare is None else spare
    elif spare is not None:
        grad_y = spare
    grad_y = torch.empty_like(grad_out) if grad_y is None else grad_y
    z = z if z is None else in_order_of(z, order)
    given = order if given is None and activation == "identity" else given
    residual = residual if residual is None else in_order_of(residual, order)
    if on_device:
        triton_launch.backward(
            grad_out, z, given, residual, table, sums, grad_nll, code(activation), slope, prior, state, grad_y, grad, vectors
        )  # fmt: skip
        return grad_out if grad is None else grad, grad_y
    assert kernels is not None
    failed = kernels.backward(
        address(grad_out), address(z), address(given), address(residual), address(table), address(sums),
        address(grad_nll), num_images, positions_of(order), num_channels, code(activation), slope,
        address(prior), address(state), num_threads(order), address(grad_y), address(grad), address(vectors),
    )  # fmt: skip
    if failed:
        raise MemoryError("the backward pass of a folded layer ran out of memory")
    return grad_out if grad is None else grad, grad_y


def likelihood_backward(
    table: Tensor, sums: Tensor, grad_nll: Tensor, num_images: int, num_positions: int, vectors: Tensor
) -> None:
    """The part of `backward` that goes to mean and raw_std; arguments as there."""
    sums = sums[0] if num_images == 1 else sums.sum(0)
    per_raw = torch.addcmul(num_images * table[Row.RAW_IMAGE], table[Row.RAW_MOMENT], sums[1], value=1 / num_positions)
    per_mean = table[Row.MEAN_MOMENT] * sums[0] / num_positions
    vectors[:2] += torch.stack((per_mean, per_raw)) * grad_nll


def activate_(v: Tensor, activation: Activation, slope: float) -> Tensor:
    """The activation, in place."""
    if activation == "relu":
        return F.relu_(v)
    return F.leaky_relu_(v, slope) if activation == "leaky_relu" else v


def activation_backward(
    grad_out: Tensor, z: Tensor | None, activation: Activation, slope: float, *, may_overwrite: bool
) -> Tensor:
    """grad_out * act'(z), in grad_out itself where that may be; with the identity it is grad_out."""
    if activation == "identity":
        return grad_out
    grad = grad_out if may_overwrite else torch.empty_like(grad_out)
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad_out, z, 0, grad_input=grad)
    else:
        torch.ops.aten.leaky_relu_backward.grad_input(grad_out, z, slope, True, grad_input=grad)
    return grad


def _eager_backward(
    grad_out: Tensor,
    z: Tensor | None,
    given: Tensor | None,
    residual: Tensor | None,
    table: Tensor,
    sums: Tensor,
    grad_nll: Tensor | None,
    activation: Activation,
    slope: float,
    vectors: Tensor,
    prior: Tensor | None,
    state: Tensor | None,
    may_overwrite: bool,
) -> tuple[Tensor, Tensor]:
    grad = activation_backward(grad_out, z, activation, slope, may_overwrite=may_overwrite)
    q = given
    if q is not None and residual is not None:
        q = q - in_order_of(residual, q)
    elif q is None and z is not None:
        q = _shown(z, residual, table, activation, slope)
    rows, axis = by_image(grad)
    q_rows = rows if q is None else by_image(in_order_of(q, grad))[0]
    del q, residual, z, given, grad_out
    wide = rows.to(table.dtype)  # low precision would overflow in sums and products
    num_positions = positions_of(grad)
    if grad_nll is not None:
        likelihood_backward(table, sums, grad_nll, len(grad), num_positions, vectors)
    sum_g, product = wide.sum(axis), (wide * q_rows).sum(axis)
    along_xhat = torch.addcmul(product * table[Row.GAMMA_SCALE], sum_g, table[Row.GAMMA_SHIFT])
    vectors[2] += along_xhat.sum(0)
    vectors[3] += sum_g.sum(0)
    scale = table[Row.SCALE]
    out = wide * (scale if axis == 1 else scale.view(-1, 1))
    if prior is not None and state is not None and grad_nll is not None:
        inverse = table[Row.INVERSE]
        seen = torch.stack((sum_g, along_xhat), 1) / (num_positions * weight_of_an_image(grad_nll))
        moments = sums * torch.stack((inverse, inverse.square())) / num_positions
        along_one, along_xhat = (balance_images(prior, state, seen, moments) * -grad_nll).unbind(1)
        out.addcmul_(q_rows, (along_xhat * table[Row.GAIN]).unsqueeze(axis))
        out += (along_one * scale + along_xhat * table[Row.OFFSET]).unsqueeze(axis)
    return grad, out.to(grad.dtype).as_strided(grad.shape, grad.stride())


def _shown(z: Tensor, residual: Tensor | None, table: Tensor, activation: Activation, slope: float) -> Tensor:
    """q of `backward` where it is read off z, (N, C, *spatial) as z; not to be written to."""
    if activation != "relu":
        q = F.leaky_relu(z, 1 / slope) if activation == "leaky_relu" else z
        return q if residual is None else q - in_order_of(residual, z)
    shape = (-1, *([1] * (z.dim() - 2)))
    shift, spread = (table[row].view(shape).to(z.dtype) for row in (Row.SHIFT, Row.SPREAD))
    if residual is None:
        return torch.where(z <= 0, shift + cut_off(shift, spread), z)
    other = in_order_of(residual, z)
    hidden = cut_off(other + shift, spread).add_(shift)
    return torch.where(z <= 0, hidden, z - other)


def cut_off(shift: Tensor, spread: Tensor) -> Tensor:
    """About the mean of a normal x of variance pi/8 * spread where x + shift <= 0.

    -(b + sqrt(b^2 + 8/pi * s^2)) / 2 for -s * phi(b/s) / Phi(-b/s): exact at b = 0 and far out on both sides, and off by less
    than 0.23 s.
    """
    return (shift * shift).add_(spread).sqrt_().add_(shift).mul_(-0.5)


def _compiled_forward(
    kernels: ctypes.CDLL,
    y: Tensor,
    residual: Tensor | None,
    table: Tensor | None,
    num_watched: int,
    activation: Activation,
    slope: float,
    sums: Tensor,
    watched: Tensor | None,
    nll: Tensor | None,
) -> None:
    if residual is not None:
        residual = in_order_of(residual if residual.dtype == y.dtype else residual.to(y.dtype), y)
    num_images, num_channels = y.shape[:2]
    failed = kernels.forward(
        address(y), address(residual), address(table), num_images, positions_of(y), num_channels,
        num_watched, code(activation), slope, num_threads(y), address(sums), address(watched), address(nll),
    )  # fmt: skip
    if failed:
        raise MemoryError("the forward pass of a folded layer ran out of memory")


def kernels_for(order: Tensor, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels, where they can take such a tensor, which then is dense, and constants of dtype."""
    kind = TYPES.get(order.dtype)
    if kind is None or dtype != order.dtype or order.device.type != "cpu":
        return None
    if order.shape[1] * dtype.itemsize % _VECTOR_BYTES:
        return None
    in_rows = channels_last(order) or (order.dim() == 2 and order.is_contiguous())
    return library(kind) if in_rows else None


def code(activation: Activation) -> int:
    """The activation as the kernels know it."""
    return _CODES[activation]


def num_threads(tensor: Tensor) -> int:
    """Threads that a kernel over such a tensor should start."""
    return 1 if tensor.numel() < _WORTH_THREADS else torch.get_num_threads()
