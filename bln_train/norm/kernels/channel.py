"""Normalisation over groups of channels of each image, behind a folded batchless norm, in the norm's own memory.

    u = (xhat - m) * r,   r = 1 / sqrt(v + eps),   z = act(gamma * u + beta + residual)

m and v are the mean and variance of xhat over a group's channels and the positions of one image, so that all of it is an affine map
for each image and channel, known from the sums that the norm takes anyway. So is its way back, with g = grad_z * act'(z):

    e1 = mean of gamma * g,   e2 = mean of gamma * g * u         over the group
    h  = gamma * r * g - r * e1 - r * u * e2                     gradient of xhat

and h less the batchless norm's correction of it. Both need xhat alone, which is the convolution's output again: run once more, so
that nothing is kept but the layer's input and output.

On the CPU each direction is one call of a compiled kernel where tensors suit it (kernels/epilogue.py), on CUDA a few of Triton's,
elsewhere PyTorch's operators.

Legend as in norm/functional.py: N images, C channels, S positions of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bln_train.norm.balance import balance_images, weight_of_an_image
from bln_train.norm.kernels import epilogue, triton_launch
from bln_train.norm.kernels.compiled import address
from bln_train.norm.kernels.epilogue import Activation, Row, activate_, code, kernels_for, num_threads
from bln_train.norm.kernels.layout import by_image, group_size, in_order_of, positions_of


def forward_(
    y: Tensor,
    residual: Tensor | None,
    table: Tensor,
    groups: nn.GroupNorm,
    activation: Activation,
    slope: float,
    nll: Tensor,
    num_watched: int = 0,
    watched: Tensor | None = None,
) -> Tensor:
    """Write z into y; arguments and result as of kernels/epilogue.py's `forward_`, but

    Args:
        table: of a norm whose scale is 1 and whose shift is 0.
        groups: with a scale and a shift.
        watched: (4, C), of which the first two rows gain sums.
    """
    if triton_launch.takes(y, table.dtype, residual):
        return triton_launch.forward_groups(
            y, residual, table, groups, code(activation), slope, table.dtype, nll, num_watched, watched
        )
    if kernels_for(y, table.dtype) is not None:
        sums = torch.empty(len(y), 2, y.shape[1], dtype=y.dtype)
        _compiled_forward(y, residual, table, groups, activation, slope, sums, num_watched, watched, nll)
        return sums
    sums = epilogue.forward_(y, None, table, "identity", 0.0, nll, num_watched, watched)
    inverse = table[Row.INVERSE]
    _map(
        y,
        residual,
        _moments(sums * torch.stack((inverse, inverse * inverse)), positions_of(y), groups),
        groups,
        activation,
        slope,
    )
    return sums


def map_(
    xhat: Tensor,
    residual: Tensor | None,
    groups: nn.GroupNorm,
    activation: Activation,
    slope: float,
    dtype: torch.dtype,
) -> None:
    """Write z into xhat, with sums taken in dtype; the rest as in `forward_`."""
    if triton_launch.takes(xhat, dtype, residual):
        triton_launch.forward_groups(xhat, residual, None, groups, code(activation), slope, dtype, None)
        return
    if kernels_for(xhat, dtype) is not None:
        _compiled_forward(xhat, residual, None, groups, activation, slope, None, 0, None, None)
        return
    rows, axis = by_image(xhat)
    square = torch.linalg.vector_norm(rows, dim=axis, dtype=dtype).square_()
    sums = torch.stack((rows.sum(axis, dtype=dtype), square), 1)
    _map(xhat, residual, _moments(sums, positions_of(xhat), groups), groups, activation, slope)


def backward(
    grad_out: Tensor,
    z: Tensor | None,
    given: Tensor,
    table: Tensor,
    sums: Tensor,
    grad_nll: Tensor | None,
    groups: nn.GroupNorm,
    activation: Activation,
    slope: float,
    vectors: Tensor,
    *,
    prior: Tensor | None,
    state: Tensor | None,
    wants_grad: bool,
    may_overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """The way back through `forward_`; arguments and result as of kernels/epilogue.py's `backward`, but

    Args:
        z: None where the activation is the identity.
        given: y again, xhat being inverse * y; nobody else's, and overwritten.
        vectors: (6, C), to which also the gradients of the groups' scale and shift are added; rows 2 and 3 gain sums of h * xhat
            and of h, the gradients of a scale of 1 and a shift of 0 in front of the groups.
    """
    if grad_nll is None:
        prior = state = None
    grad_out_given, grad_out = grad_out, in_order_of(grad_out, given)
    may_overwrite = may_overwrite or grad_out is not grad_out_given
    del grad_out_given
    z = None if z is None or activation == "identity" else in_order_of(z, given)
    kernels = kernels_for(given, table.dtype) if grad_out.dtype == given.dtype else None
    on_device = triton_launch.takes(given, table.dtype, grad_out)
    if kernels is None and not on_device:
        return eager_backward(
            grad_out, z, given, table, sums, grad_nll, groups, activation, slope, vectors, prior, state,
            may_overwrite=may_overwrite,
        )  # fmt: skip
    grad = None
    if wants_grad and activation != "identity":
        grad = grad_out if may_overwrite else torch.empty_like(grad_out)
    if on_device:
        triton_launch.backward_groups(
            grad_out, z, given, table, sums, grad_nll, groups, code(activation), slope, prior, state, grad, vectors
        )
        return grad_out if grad is None else grad, given
    assert kernels is not None
    failed = kernels.backward_groups(
        address(grad_out), address(z), address(given), address(table), address(sums), address(grad_nll), address(groups.weight),
        group_size(groups), groups.eps, len(given), positions_of(given), given.shape[1], code(activation), slope, address(prior),
        address(state), num_threads(given), address(given), address(grad), address(vectors),
    )  # fmt: skip
    if failed:
        raise MemoryError("the backward pass of a folded layer ran out of memory")
    return grad_out if grad is None else grad, given


def _compiled_forward(
    y: Tensor,
    residual: Tensor | None,
    table: Tensor | None,
    groups: nn.GroupNorm,
    activation: Activation,
    slope: float,
    sums: Tensor | None,
    num_watched: int,
    watched: Tensor | None,
    nll: Tensor | None,
) -> None:
    if residual is not None:
        residual = in_order_of(residual if residual.dtype == y.dtype else residual.to(y.dtype), y)
    kernels = kernels_for(y, y.dtype)
    assert kernels is not None
    failed = kernels.forward_groups(
        address(y), address(residual), address(table), address(groups.weight), address(groups.bias), group_size(groups), groups.eps,
        len(y), positions_of(y), y.shape[1], num_watched, code(activation), slope, num_threads(y), address(sums),
        address(watched), address(nll),
    )  # fmt: skip
    if failed:
        raise MemoryError("the forward pass of a folded layer ran out of memory")


class _Moments(NamedTuple):
    """Of xhat, for each image and channel, (N, C) each."""

    total: Tensor
    """Sum of xhat over the channel's positions."""
    square: Tensor
    """Sum of xhat^2 there."""
    mean: Tensor
    """m, of the channel's group."""
    scale: Tensor
    """r, of the channel's group."""


def _moments(sums: Tensor, num_positions: int, groups: nn.GroupNorm) -> _Moments:
    """From sums of xhat and xhat^2, (N, 2, C)."""
    total, square = sums.unbind(1)
    mean, mean_square = (_of_group(part, num_positions, groups) for part in (total, square))
    variance = (mean_square - mean * mean).clamp(min=0)
    return _Moments(total, square, mean, (variance + groups.eps).rsqrt())


def _of_group(sums: Tensor, num_positions: int, groups: nn.GroupNorm) -> Tensor:
    """Means over each group, for each of its channels: (N, C) sums over positions to (N, C)."""
    grouped = sums.view(len(sums), groups.num_groups, -1)
    means = grouped.mean(2, keepdim=True) / num_positions
    return means.expand_as(grouped).reshape(sums.shape)


def _map(
    xhat: Tensor, residual: Tensor | None, seen: _Moments, groups: nn.GroupNorm, activation: Activation, slope: float
) -> None:
    rows, axis = by_image(xhat)
    scale = groups.weight.detach() * seen.scale
    shift = (groups.bias.detach() - scale * seen.mean).unsqueeze(axis)
    scale = scale.unsqueeze(axis)
    if rows.dtype == scale.dtype:
        torch.addcmul(shift, rows, scale, out=rows)
    else:  # low precision under autocast: the map is computed in the parameters' precision
        rows.copy_(torch.addcmul(shift, rows, scale))
    activate_(xhat if residual is None else xhat.add_(residual), activation, slope)


def eager_backward(
    grad_out: Tensor,
    z: Tensor | None,
    given: Tensor,
    table: Tensor,
    sums: Tensor,
    grad_nll: Tensor | None,
    groups: nn.GroupNorm,
    activation: Activation,
    slope: float,
    vectors: Tensor,
    prior: Tensor | None,
    state: Tensor | None,
    *,
    may_overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """`backward` by PyTorch's operators."""
    num_positions, inverse = positions_of(given), table[Row.INVERSE]
    if grad_nll is not None:
        epilogue.likelihood_backward(table, sums, grad_nll, len(given), num_positions, vectors)
    grad = epilogue.activation_backward(grad_out, z, activation, slope, may_overwrite=may_overwrite)
    rows, axis = by_image(grad)
    wide, out = rows.to(table.dtype), by_image(given)[0]  # low precision would overflow in sums and products
    sum_g, along_xhat = wide.sum(axis), (wide * out).sum(axis) * inverse

    seen = _moments(sums * torch.stack((inverse, inverse * inverse)), num_positions, groups)
    along_u = seen.scale * (along_xhat - seen.mean * sum_g)
    vectors[4] += along_u.sum(0)
    vectors[5] += sum_g.sum(0)
    gamma = groups.weight.detach()
    e1, e2 = (_of_group(gamma * part, num_positions, groups) for part in (sum_g, along_u))
    slope_h = seen.scale * seen.scale * e2  # h = scale * g - shift_h - slope_h * xhat
    shift_h, scale = seen.scale * e1 - slope_h * seen.mean, gamma * seen.scale
    sum_h = scale * sum_g - shift_h * num_positions - slope_h * seen.total
    along_h = scale * along_xhat - shift_h * seen.total - slope_h * seen.square
    vectors[2] += along_h.sum(0)
    vectors[3] += sum_h.sum(0)
    if prior is not None and state is not None and grad_nll is not None:
        means = torch.stack((sum_h, along_h), 1) / (num_positions * weight_of_an_image(grad_nll))
        taken = balance_images(prior, state, means, torch.stack((seen.total, seen.square), 1) / num_positions)
        along_one, along_slope = (taken * grad_nll).unbind(1)
        shift_h, slope_h = shift_h + along_one, slope_h + along_slope

    # The gradient of y = inverse * h = inverse * (scale * g - shift_h) - inverse^2 * slope_h * y
    offset, gain, factor = (
        part.unsqueeze(axis) for part in (-inverse * shift_h, -inverse * inverse * slope_h, inverse * scale)
    )
    if out.dtype == table.dtype:
        torch.addcmul(offset, out, gain, out=out)
        out.addcmul_(wide, factor)
    else:
        out.copy_(torch.addcmul(torch.addcmul(offset, out, gain), wide, factor))
    return grad, given
