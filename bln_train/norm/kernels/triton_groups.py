"""The kernels of kernels/channel.py between its passes, in Triton's language; the passes are kernels/triton_kernels.py's.

A program has the channels of one group, in a power of 2 of lanes. What may be None says so.
"""

import triton
import triton.language as tl

from bln_train.norm.kernels.triton_kernels import (
    FEW,
    INVERSE,
    LEFT_SHIFT,
    LEFT_SLOPE,
    TABLES,
    TO_COME,
    add,
    add_likelihood,
    correction_of,
    left_over,
    values,
)

GROUPS = [*TABLES, "gamma", "beta", "maps"]


@triton.jit
def _group_moments(total, square, count, EPS: tl.constexpr):
    """Mean and 1 / deviation of a group, from its channels' sums of xhat and xhat^2."""
    mean = tl.sum(total, 0) / count
    variance = tl.sum(square, 0) / count - mean * mean
    variance = tl.where(variance < 0, 0, variance)  # in this order a NaN stays one
    return mean, 1 / tl.sqrt(variance + EPS)


@triton.jit(do_not_specialize=FEW, do_not_specialize_on_alignment=GROUPS)
def finish_groups(
    partials, table, gamma, beta, sums, maps, num_blocks, num_positions, num_channels, size, EPS: tl.constexpr,
    REAL: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """sums, (N, 2, C), become each image's of y and y^2, and maps, (N, 2, C), the scale and shift of y of kernels/channel.py.

    A program for each group, of `size` channels, and image. None: table, then xhat is y.
    """
    lanes = tl.arange(0, BLOCK_CHANNELS)
    channels, there = tl.program_id(0) * size + lanes, lanes < size
    image = tl.program_id(1)
    y, square = tl.zeros([BLOCK_CHANNELS], REAL), tl.zeros([BLOCK_CHANNELS], REAL)
    for first in range(0, num_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)[:, None]
        some = (blocks < num_blocks) & there[None, :]
        places = ((image * num_blocks + blocks) * NUM_SUMS) * num_channels + channels[None, :]
        y += tl.sum(tl.load(partials + places, mask=some, other=0), 0)
        square += tl.sum(tl.load(partials + places + num_channels, mask=some, other=0), 0)
    tl.store(sums + image * 2 * num_channels + channels, y, mask=there)
    tl.store(sums + (image * 2 + 1) * num_channels + channels, square, mask=there)
    factor = values(gamma, 0, channels, there, num_channels)
    if table is not None:
        inverse = values(table, INVERSE, channels, there, num_channels)
        y *= inverse
        square *= inverse * inverse
    mean, r = _group_moments(y, square, size * num_positions, EPS)
    shift = values(beta, 0, channels, there, num_channels) - factor * r * mean
    scale = factor * r
    if table is not None:
        scale *= inverse
    tl.store(maps + image * 2 * num_channels + channels, scale, mask=there)
    tl.store(maps + (image * 2 + 1) * num_channels + channels, shift, mask=there)


@triton.jit(do_not_specialize=FEW, do_not_specialize_on_alignment=GROUPS)
def finish_groups_backward(
    partials, table, sums, grad_nll, prior, state, gamma, maps, vectors, num_images, num_positions, num_channels, size,
    EPS: tl.constexpr, REAL: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """vectors, (6, C), and `state` gain what kernels/channel.py says, image after image; maps, (N, 3, C), become each one's offset,
    gain and scale, with which grad_y = scale * g + offset + gain * y.

    A program for each group. partials: (N, 2, C), sums of g and g * y. None: grad_nll, which is then 0; prior and state.
    """
    lanes = tl.arange(0, BLOCK_CHANNELS)
    channels, there = tl.program_id(0) * size + lanes, lanes < size
    zero = tl.zeros([BLOCK_CHANNELS], REAL)
    all_g, all_u, all_h, all_along, all_y, all_square = zero, zero, zero, zero, zero, zero
    inverse, factor = (
        values(table, INVERSE, channels, there, num_channels),
        values(gamma, 0, channels, there, num_channels),
    )
    count = size * num_positions
    if state is not None:
        weight = tl.load(grad_nll)
        counts = weight != 0
        unit = 1 / (tl.where(counts, weight, 1) * num_positions)
        left_shift = values(state, LEFT_SHIFT, channels, there, num_channels)
        left_slope = values(state, LEFT_SLOPE, channels, there, num_channels)
        to_come = values(state, TO_COME, channels, there, num_channels)
        prior_shift = values(prior, 0, channels, there, num_channels)
        prior_slope = values(prior, 1, channels, there, num_channels)
    for image in tl.range(0, num_images, num_stages=4):
        row = image * 2
        g = values(partials, row, channels, there, num_channels)
        along_xhat = values(partials, row + 1, channels, there, num_channels) * inverse
        y = values(sums, row, channels, there, num_channels)
        square = values(sums, row + 1, channels, there, num_channels)
        of_x, of_square = y * inverse, square * inverse * inverse
        mean, r = _group_moments(of_x, of_square, count, EPS)
        along_u = r * (along_xhat - mean * g)
        e1, e2 = tl.sum(factor * g, 0) / count, tl.sum(factor * along_u, 0) / count
        slope = r * r * e2 + zero
        shift = r * e1 - slope * mean
        scale = factor * r
        h = scale * g - shift * num_positions - slope * of_x
        along_h = scale * along_xhat - shift * of_x - slope * of_square
        all_g += g
        all_u += along_u
        all_h += h
        all_along += along_h
        all_y += y
        all_square += square
        if state is not None:
            first, second = of_x / num_positions, of_square / num_positions
            along_one, along_slope, damping = correction_of(
                prior_shift, prior_slope, left_shift, left_slope, to_come, second
            )
            shift += weight * along_one
            slope += weight * along_slope
            if counts:
                more_shift, more_slope = left_over(
                    along_one, along_slope, damping, h * unit, along_h * unit, first, second
                )
                left_shift += more_shift
                left_slope += more_slope
                to_come -= 1
        own = maps + image * 3 * num_channels + channels
        tl.store(own, -inverse * shift, mask=there)
        tl.store(own + num_channels, -inverse * inverse * slope, mask=there)
        tl.store(own + 2 * num_channels, inverse * scale, mask=there)
    if state is not None:
        tl.store(state + LEFT_SHIFT * num_channels + channels, left_shift, mask=there)
        tl.store(state + LEFT_SLOPE * num_channels + channels, left_slope, mask=there)
        tl.store(state + TO_COME * num_channels + channels, to_come, mask=there)
    if grad_nll is not None:
        add_likelihood(
            vectors, table, grad_nll, all_y, all_square, num_images, num_positions, channels, there, num_channels
        )
    add(vectors, 2, all_along, channels, there, num_channels)
    add(vectors, 3, all_h, channels, there, num_channels)
    add(vectors, 4, all_u, channels, there, num_channels)
    add(vectors, 5, all_g, channels, there, num_channels)
