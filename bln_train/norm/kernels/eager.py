"""The epilogue of a convolution by PyTorch's operators, pass by pass: the reference, for every device, dtype and memory order.

    xhat = inverse * y
    z    = relu(inner * y + shift + residual)                                            without groups
    z    = relu(outer * (xhat - m) * r + shift + residual),   r = 1 / sqrt(v + eps)      with groups of channels

m and v are the mean and variance of xhat over a group's channels and the positions of one image. Both are known from the sums that
the likelihood takes anyway. The way back, with g = grad_z * relu'(z), u = (xhat - m) * r, and (A, B) the image's correction:

    e1 = mean of outer * g,   e2 = mean of outer * g * u                                 over the group
    h  = outer * r * g - r * e1 - r * u * e2                                             without groups: g
    gradient of y = inner * (h - loss_weight * (A + B * xhat))

Legend as in table.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bln_train.norm.kernels.feedback import corrections, nonzero
from bln_train.norm.kernels.layout import by_image, is_same, positions_of
from bln_train.norm.kernels.table import Correction, Epilogue, Gradients, ProbeRow, Row


class Eager:
    """See `backend.Backend`, whose methods these are."""

    def forward(
        self, y: Tensor, z: Tensor, residual: Tensor | None, epilogue: Epilogue, nll: Tensor, probe: tuple[int, Tensor] | None
    ) -> Tensor:  # fmt: skip
        """See `Backend`."""
        sums = _sums(y, epilogue.table.dtype)
        _write(y, z, residual, epilogue, sums)
        if probe is not None:
            probe[1].add_(sums[: probe[0]].sum(0))
        table = epilogue.table
        square = sums[:, 1].sum(0) / positions_of(y)
        nll += torch.addcmul(len(y) * table[Row.NLL_IMAGE], table[Row.NLL_SQUARE], square).sum()
        return sums

    def map_(self, y: Tensor, residual: Tensor | None, epilogue: Epilogue) -> None:
        """See `Backend`."""
        _write(y, y, residual, epilogue, _sums(y, epilogue.table.dtype) if epilogue.group_size else None)

    def follow_(
        self, y: Tensor, residual: Tensor | None, probe: Tensor, unit: Tensor | None, eps: float, *, relu: bool
    ) -> Tensor:
        """See `Backend`."""
        found, scale_and_shift = followed(_sums(y, probe.dtype).sum(0), y.numel() // y.shape[1], probe, unit, eps)
        _map(y, y, residual, scale_and_shift.unsqueeze(0), relu=relu)
        return found

    def backward(
        self, grad_z: Tensor, z: Tensor | None, y: Tensor, sums: Tensor, epilogue: Epilogue, correction: Correction,
        gradients: Gradients,
    ) -> None:  # fmt: skip
        """See `Backend`."""
        table, vectors, num_positions = epilogue.table, gradients.vectors, positions_of(y)
        if correction.loss_weight is not None:
            likelihood_backward(table, sums, correction.loss_weight, num_positions, vectors)
        g = grad_z
        if epilogue.relu:
            spare = torch.empty_like(grad_z) if is_same(gradients.y, y) else gradients.y
            g = spare if gradients.inner is None else gradients.inner
            torch.ops.aten.threshold_backward.grad_input(grad_z, z, 0, grad_input=g)
        rows, axis = by_image(g)
        wide, y_rows = rows.to(table.dtype), by_image(y)[0]  # low precision would overflow in sums and products
        along = torch.stack((wide.sum(axis), (wide * y_rows).sum(axis)), 1)
        offset, gain, scale = (
            part.unsqueeze(axis) for part in _map_back(along, sums, num_positions, epilogue, correction, vectors)
        )
        out = by_image(gradients.y)[0]
        if out.dtype != table.dtype:
            out.copy_(torch.addcmul(torch.addcmul(offset, y_rows, gain), wide, scale))
        elif is_same(gradients.y, y):
            torch.addcmul(offset, out, gain, out=out).addcmul_(wide, scale)
        else:  # may be g itself
            torch.mul(wide, scale, out=out).addcmul_(y_rows, gain).add_(offset)


def likelihood_backward(table: Tensor, sums: Tensor, loss_weight: Tensor, num_positions: int, vectors: Tensor) -> None:
    """Add the likelihood's gradients of mean and raw_std to `vectors`; `sums` are those of `forward`, (N, 2, C)."""
    total = sums.sum(0)
    per_raw = torch.addcmul(len(sums) * table[Row.RAW_IMAGE], table[Row.RAW_MOMENT], total[1], value=1 / num_positions)
    per_mean = table[Row.MEAN_MOMENT] * total[0] / num_positions
    vectors[:2] += torch.stack((per_mean, per_raw)) * loss_weight


def followed(sums: Tensor, num: int, probe: Tensor, unit: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """What a layer's statistics become when they follow the probe, and the map that then normalises y; see norm/probe.py.

    Args:
        sums: (2, C), of y and of y^2 over `num` positions.
        probe: (len(ProbeRow), C).
        unit: (C,), of y in units of the layer's input, None for 1.
        eps: the smallest standard deviation.

    Returns: the change of the mean and the new standard deviation, (2, C); scale and shift of y, (2, C).
    """
    std, old_variance, drift, gamma, beta = probe[: len(ProbeRow)].unbind(0)
    shift, square = sums / num
    if unit is not None:
        shift, square = shift * unit, square * unit * unit
    variance = (square - shift * shift).clamp_(min=0)
    guard = (1e-4 + 1 / num) * std * std
    ratio = ((variance + guard) / (old_variance + guard)).sqrt()
    change, new_std = shift + drift, (std * ratio).clamp(min=eps)
    scale = gamma / new_std
    return torch.stack((change, new_std)), torch.stack((scale if unit is None else scale * unit, beta - scale * change))


def _sums(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Each image's sums of y and of y^2, (N, 2, C)."""
    rows, axis = by_image(y)
    # No temporary of y's size; y is centred, so that nothing is lost in squares of a large mean.
    square = torch.linalg.vector_norm(rows, dim=axis, dtype=dtype).square_()
    return torch.stack((rows.sum(axis, dtype=dtype), square), 1)


def _write(y: Tensor, z: Tensor, residual: Tensor | None, epilogue: Epilogue, sums: Tensor | None) -> None:
    """z becomes what the top says; `sums` are needed with groups alone."""
    maps = epilogue.table[Row.INNER : Row.SHIFT + 1].unsqueeze(0)
    if epilogue.group_size and sums is not None:
        groups = _moments(sums, positions_of(y), epilogue)
        scale = epilogue.table[Row.OUTER] * groups.scale
        shift = epilogue.table[Row.SHIFT] - scale * groups.mean
        maps = torch.stack((scale * epilogue.table[Row.INVERSE], shift), 1)
    _map(y, z, residual, maps, relu=epilogue.relu)


def _map(y: Tensor, z: Tensor, residual: Tensor | None, maps: Tensor, *, relu: bool) -> None:
    """z becomes relu(scale * y + shift + residual), with maps (N, 2, C) or (1, 2, C)."""
    rows, axis = by_image(y)
    scale, shift = (part.unsqueeze(axis) for part in maps.unbind(1))
    out = by_image(z)[0]
    if rows.dtype == scale.dtype:
        torch.addcmul(shift, rows, scale, out=out)
    else:  # low precision under autocast: the map is computed in the parameters' precision
        out.copy_(torch.addcmul(shift, rows, scale))
    if residual is not None:
        z.add_(residual)
    if relu:
        F.relu_(z)


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


def _moments(sums: Tensor, num_positions: int, epilogue: Epilogue) -> _Moments:
    """From each image's sums of y and y^2, (N, 2, C)."""
    inverse = epilogue.table[Row.INVERSE]
    total, square = inverse * sums[:, 0], inverse * inverse * sums[:, 1]
    mean, mean_square = (_of_group(part, num_positions, epilogue.group_size) for part in (total, square))
    variance = (mean_square - mean * mean).clamp(min=0)
    return _Moments(total, square, mean, (variance + epilogue.group_eps).rsqrt())


def _of_group(sums: Tensor, num_positions: int, group_size: int) -> Tensor:
    """Means over each group, for each of its channels: (N, C) sums over positions to (N, C)."""
    grouped = sums.view(len(sums), -1, group_size)
    means = grouped.mean(2, keepdim=True) / num_positions
    return means.expand_as(grouped).reshape(sums.shape)


def _map_back(
    along: Tensor, sums: Tensor, num_positions: int, epilogue: Epilogue, correction: Correction, vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Offset, gain and scale, (N, C) each, with which the gradient of y is scale * g + offset + gain * y.

    Args:
        along: (N, 2, C), each image's sums of g and of g * y.
        sums: (N, 2, C), of `forward`.
        vectors: gains the gradients of weights and biases; see `Gradients`.
    """
    table = epilogue.table
    inverse, inner = table[Row.INVERSE], table[Row.INNER]
    sum_h, along_h = along[:, 0], along[:, 1] * inverse
    of_x = sums * torch.stack((inverse, inverse * inverse))  # sums of xhat and of xhat^2
    scale, shift, slope = inner.expand_as(sum_h), torch.zeros_like(sum_h), torch.zeros_like(sum_h)
    if epilogue.group_size:
        groups = _moments(sums, num_positions, epilogue)
        outer = table[Row.OUTER]
        along_u = groups.scale * (along_h - groups.mean * sum_h)
        vectors[4] += along_u.sum(0)
        vectors[5] += sum_h.sum(0)
        e1, e2 = (_of_group(outer * part, num_positions, epilogue.group_size) for part in (sum_h, along_u))
        slope = groups.scale * groups.scale * e2  # h = outer * r * g - shift - slope * xhat
        shift = groups.scale * e1 - slope * groups.mean
        of_g = outer * groups.scale
        sum_h = of_g * sum_h - shift * num_positions - slope * groups.total
        along_h = of_g * along_h - shift * groups.total - slope * groups.square
        scale = inner * of_g
    vectors[2] += along_h.sum(0)
    vectors[3] += sum_h.sum(0)
    if correction.running is not None and correction.state is not None and correction.loss_weight is not None:
        weight = correction.loss_weight
        means = torch.stack((sum_h, along_h), 1) / (num_positions * nonzero(weight))
        along_one, along_xhat = corrections(
            correction.running, correction.state, means, of_x / num_positions, weight
        ).unbind(1)
        shift, slope = shift + weight * along_one, slope + weight * along_xhat
    return -inner * shift, -inner * inverse * slope, scale
