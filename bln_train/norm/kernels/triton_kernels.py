"""The kernels of kernels/epilogue.py in Triton's language; kernels/triton_launch.py calls them, and nothing else imports this.

A tile is of one image: positions along AXIS, which is 0 where channels are adjacent in memory and 1 where positions are. A program
walks some tiles of an image one after the other and keeps their sums in registers, so that partials, (N * programs of an image,
NUM_SUMS, C), are small; a second kernel adds those in their order. No atomics: the same shape on the same device gives the same
bits.

REAL is the precision of tables and sums, in which everything between load and store is computed; tensors may be of a lower one.
Offsets are 64-bit. What may be None says so.
"""

import triton
import triton.language as tl

from bln_train.norm import balance
from bln_train.norm.balance import BalanceRow
from bln_train.norm.kernels.epilogue import Row

SCALE = tl.constexpr(int(Row.SCALE))
SHIFT = tl.constexpr(int(Row.SHIFT))
OFFSET = tl.constexpr(int(Row.OFFSET))
GAIN = tl.constexpr(int(Row.GAIN))
GAMMA_SCALE = tl.constexpr(int(Row.GAMMA_SCALE))
GAMMA_SHIFT = tl.constexpr(int(Row.GAMMA_SHIFT))
NLL_SQUARE = tl.constexpr(int(Row.NLL_SQUARE))
NLL_IMAGE = tl.constexpr(int(Row.NLL_IMAGE))
MEAN_MOMENT = tl.constexpr(int(Row.MEAN_MOMENT))
RAW_MOMENT = tl.constexpr(int(Row.RAW_MOMENT))
RAW_IMAGE = tl.constexpr(int(Row.RAW_IMAGE))
SPREAD = tl.constexpr(int(Row.SPREAD))
INVERSE = tl.constexpr(int(Row.INVERSE))
LEFT_SHIFT = tl.constexpr(int(BalanceRow.LEFT_SHIFT))
LEFT_SLOPE = tl.constexpr(int(BalanceRow.LEFT_SLOPE))
TO_COME = tl.constexpr(int(BalanceRow.TO_COME))
HORIZON = tl.constexpr(balance.HORIZON)
LARGEST_SQUARE = tl.constexpr(balance.LARGEST_SQUARE)

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)

# Numbers that change with the micro-batch, and pointers into tables: no reason to compile again.
PLAIN = ["num_positions", "num_tiles", "tiles_per_program", "num_blocks", "num_watched"]
FEW = ["num_blocks", "num_images", "num_positions"]
TABLES = ["table", "partials", "sums", "watched", "nll", "grad_nll", "taken", "prior", "state", "vectors"]


@triton.jit
def _positions(tile, AXIS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr):
    """A tile's positions in its image, along AXIS."""
    return tl.expand_dims((tile * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)).to(tl.int64), 1 - AXIS)


@triton.jit
def _offsets(image, positions, channels, num_positions, num_channels, AXIS: tl.constexpr):
    """Where a tile's entries lie."""
    begin = image.to(tl.int64) * num_positions * num_channels
    if AXIS == 0:
        return begin + positions * num_channels + channels
    return begin + channels.to(tl.int64) * num_positions + positions


@triton.jit
def _load(pointer, offsets, there, REAL: tl.constexpr):
    return tl.load(pointer + offsets, mask=there, other=0).to(REAL)


@triton.jit
def _store(pointer, offsets, value, there):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def _row(table, row: tl.constexpr, channels, num_channels):
    return values(table, row, channels, channels < num_channels, num_channels)


@triton.jit
def values(pointer, row, channels, there, num_channels):
    """Some channels of a row, 0 for those that are not there."""
    return tl.load(pointer + row * num_channels + channels, mask=there, other=0)


@triton.jit
def add(vectors, row: tl.constexpr, more, channels, there, num_channels):
    """Add to some channels of a row."""
    places = vectors + row * num_channels + channels
    tl.store(places, tl.load(places, mask=there) + more, mask=there)


@triton.jit
def add_likelihood(
    vectors, table, grad_nll, all_y, all_square, num_images, num_positions, channels, there, num_channels
):  # fmt: skip
    """Add the gradients of mean and raw_std, from all images' sums of y and y^2."""
    weight = tl.load(grad_nll)
    of_mean = values(table, MEAN_MOMENT, channels, there, num_channels) * all_y / num_positions
    of_raw = values(table, RAW_MOMENT, channels, there, num_channels) * all_square / num_positions
    of_raw += values(table, RAW_IMAGE, channels, there, num_channels) * num_images
    add(vectors, 0, weight * of_mean, channels, there, num_channels)
    add(vectors, 1, weight * of_raw, channels, there, num_channels)


@triton.jit
def _store_partial(
    partials, number: tl.constexpr, values, channels, num_channels, AXIS: tl.constexpr, NUM_SUMS: tl.constexpr
):
    row = tl.program_id(0) * NUM_SUMS + number
    total = tl.expand_dims(tl.sum(values, AXIS), AXIS)
    tl.store(partials + row * num_channels + channels, total, mask=channels < num_channels)


@triton.jit
def _add_partials(
    partials, number: tl.constexpr, num_blocks, channels, num_channels, REAL: tl.constexpr, NUM_SUMS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One of the sums, over all programs, of some channels."""
    total = tl.zeros([BLOCK, BLOCK_CHANNELS], REAL)
    for first in range(0, num_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)[:, None]
        there = (blocks < num_blocks) & (channels < num_channels)[None, :]
        places = (blocks * NUM_SUMS + number) * num_channels + channels[None, :]
        total += tl.load(partials + places, mask=there, other=0)
    return tl.sum(total, 0)


@triton.jit
def correction_of(prior_shift, prior_slope, left_shift, left_slope, to_come, second):
    """(A, B) of the image that comes next, whose mean of xhat^2 is `second`, and by how much its regressors are scaled down."""
    rest, excess = tl.maximum(to_come, HORIZON), (1 + second) / LARGEST_SQUARE
    damping = 1 / tl.sqrt(tl.where(excess < 1, 1.0, excess))  # in this order a NaN stays one
    return damping * (prior_shift + left_shift / rest), damping * (prior_slope + left_slope / rest), damping


@triton.jit
def left_over(shift, slope, damping, along_one, along_xhat, first, second):
    """What the image adds to what is left, from its means of g, g * xhat, xhat and xhat^2."""
    return damping * (along_one - shift - slope * first), damping * (along_xhat - shift * first - slope * second)


@triton.jit
def _cut_off(shift, spread):
    return (tl.sqrt(shift * shift + spread) + shift) * -0.5


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def forward(
    y, residual, table, partials, num_positions, num_tiles, tiles_per_program, num_blocks, num_watched, num_channels,
    REAL: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, AXIS: tl.constexpr, NUM_SUMS: tl.constexpr,
    PER_IMAGE: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """y becomes act(scale * y + shift + residual); sums of y and y^2 and, where NUM_SUMS is 6, of the first `num_watched` images
    those and, for a relu, those of q, as backward reads it off, and of q * y.

    PER_IMAGE: table is (N, 2, C), each image's scale and shift. None: residual; table, then y stays; partials, where NUM_SUMS is 0.
    """
    channels = tl.expand_dims(tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), AXIS)
    is_channel = channels < num_channels
    zero = tl.zeros(
        [BLOCK_POSITIONS if AXIS == 0 else BLOCK_CHANNELS, BLOCK_CHANNELS if AXIS == 0 else BLOCK_POSITIONS], REAL
    )
    total, square = zero, zero
    seen_total, seen_square, shown, product = zero, zero, zero, zero
    image = tl.program_id(0) // num_blocks
    if PER_IMAGE:
        table += image.to(tl.int64) * 2 * num_channels
    if table is not None:
        scale, shift = _row(table, SCALE, channels, num_channels), _row(table, SHIFT, channels, num_channels)
        if NUM_SUMS == 6:  # a map's table ends after SHIFT
            spread = _row(table, SPREAD, channels, num_channels)
    begin = (tl.program_id(0) - image * num_blocks) * tiles_per_program
    for tile in range(begin, tl.minimum(begin + tiles_per_program, num_tiles)):
        positions = _positions(tile, AXIS, BLOCK_POSITIONS)
        there = (positions < num_positions) & is_channel
        offsets = _offsets(image, positions, channels, num_positions, num_channels, AXIS)
        v = _load(y, offsets, there, REAL)
        if NUM_SUMS:
            total += v
            square += v * v
        if NUM_SUMS == 6:
            is_seen = there & (image < num_watched)
            seen = tl.where(is_seen, v, zero)
            seen_total += seen
            seen_square += seen * seen
        if table is not None:
            v = v * scale + shift
            if residual is not None:
                other = _load(residual, offsets, there, REAL)
                v += other
            if ACTIVATION == RELU:
                v = tl.where(v < 0, zero, v)  # in this order a NaN stays one
            if ACTIVATION == LEAKY_RELU:
                v = tl.where(v < 0, v * SLOPE, v)
            _store(y, offsets, v, there)
            if NUM_SUMS == 6:
                v = v.to(y.dtype.element_ty).to(REAL)  # backward will see it rounded
                if residual is None:
                    other = zero
                q = v - other
                if ACTIVATION == RELU:
                    q = tl.where(v <= 0, shift + _cut_off(other + shift, spread), q)
                q = tl.where(is_seen, q, zero)
                shown += q
                product += q * seen
    if NUM_SUMS:
        _store_partial(partials, 0, total, channels, num_channels, AXIS, NUM_SUMS)
        _store_partial(partials, 1, square, channels, num_channels, AXIS, NUM_SUMS)
    if NUM_SUMS == 6:
        _store_partial(partials, 2, seen_total, channels, num_channels, AXIS, NUM_SUMS)
        _store_partial(partials, 3, seen_square, channels, num_channels, AXIS, NUM_SUMS)
        _store_partial(partials, 4, shown, channels, num_channels, AXIS, NUM_SUMS)
        _store_partial(partials, 5, product, channels, num_channels, AXIS, NUM_SUMS)


@triton.jit(do_not_specialize=FEW, do_not_specialize_on_alignment=TABLES)
def finish_forward(
    partials, table, sums, watched, nll, num_blocks, num_images, num_positions, num_channels, REAL: tl.constexpr,
    NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """sums, (2, C), become those of all programs, the others are added to watched, (4, C), and the likelihood to nll.

    One program for all channels, since the likelihood is over all of them. None: watched where NUM_SUMS is 2; table and nll.
    """
    likelihood = tl.zeros([BLOCK_CHANNELS], REAL)
    for first in range(0, num_channels, BLOCK_CHANNELS):
        channels = first + tl.arange(0, BLOCK_CHANNELS)
        is_channel = channels < num_channels
        for number in tl.static_range(NUM_SUMS):
            total = _add_partials(
                partials, number, num_blocks, channels, num_channels, REAL, NUM_SUMS, BLOCK, BLOCK_CHANNELS
            )
            if number < 2:
                tl.store(sums + number * num_channels + channels, total, mask=is_channel)
            else:
                places = watched + (number - 2) * num_channels + channels
                tl.store(places, tl.load(places, mask=is_channel) + total, mask=is_channel)
            if number == 1 and nll is not None:
                likelihood += _row(table, NLL_SQUARE, channels, num_channels) * total / num_positions
                likelihood += _row(table, NLL_IMAGE, channels, num_channels) * num_images
    if nll is not None:
        tl.store(nll, tl.load(nll) + tl.sum(likelihood, 0))


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def backward(
    grad_out, z, given, residual, table, sums, grad_nll, prior, state, taken, grad_y, grad, partials, num_positions, num_tiles,
    tiles_per_program, num_blocks, num_channels, REAL: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    AXIS: tl.constexpr, PER_IMAGE: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """With g = grad_out * act'(z):  grad_y = scale * g - grad_nll * (scale * A + B * (offset + gain * q)), grad = g, and sums of g
    and of g * q.

    q is `given` or, where that is None, read off z, less the residual; (A, B) is the image's row of `taken`, (N, 2, C), or that of
    the one image from prior, state and sums, (2, C), of its forward. grad or grad_y may be grad_out: each entry is read before
    it is written. None: z with the identity, which then needs `given`; given; residual; grad; grad_y, then nothing is written but
    sums; partials, then there are none; taken; state, then A and B are 0. PER_IMAGE: taken is (N, 3, C):
    grad_y = third row * g + first + second * q.
    """
    channels = tl.expand_dims(tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), AXIS)
    is_channel = channels < num_channels
    zero = tl.zeros(
        [BLOCK_POSITIONS if AXIS == 0 else BLOCK_CHANNELS, BLOCK_CHANNELS if AXIS == 0 else BLOCK_POSITIONS], REAL
    )
    total, product = zero, zero
    image = tl.program_id(0) // num_blocks
    scale = _row(table, SCALE, channels, num_channels)
    shift, spread = _row(table, SHIFT, channels, num_channels), _row(table, SPREAD, channels, num_channels)
    if PER_IMAGE:
        own = taken + image.to(tl.int64) * 3 * num_channels
        offset, gain = -_row(own, 0, channels, num_channels), -_row(own, 1, channels, num_channels)
        scale = _row(own, 2, channels, num_channels)
    elif state is not None and grad_y is not None:
        weight = tl.load(grad_nll)
        if taken is not None:
            own = taken + image.to(tl.int64) * 2 * num_channels
            along_one, along_xhat = _row(own, 0, channels, num_channels), _row(own, 1, channels, num_channels)
        else:
            inverse = _row(table, INVERSE, channels, num_channels)
            second = inverse * inverse * _row(sums, 1, channels, num_channels) / num_positions
            prior_shift, prior_slope = _row(prior, 0, channels, num_channels), _row(prior, 1, channels, num_channels)
            left_shift = _row(state, LEFT_SHIFT, channels, num_channels)
            left_slope = _row(state, LEFT_SLOPE, channels, num_channels)
            to_come = _row(state, TO_COME, channels, num_channels)
            along_one, along_xhat, _ = correction_of(prior_shift, prior_slope, left_shift, left_slope, to_come, second)
        along_one *= weight
        along_xhat *= weight
        offset = scale * along_one + _row(table, OFFSET, channels, num_channels) * along_xhat
        gain = _row(table, GAIN, channels, num_channels) * along_xhat
    begin = (tl.program_id(0) - image * num_blocks) * tiles_per_program
    for tile in range(begin, tl.minimum(begin + tiles_per_program, num_tiles)):
        positions = _positions(tile, AXIS, BLOCK_POSITIONS)
        there = (positions < num_positions) & is_channel
        offsets = _offsets(image, positions, channels, num_positions, num_channels, AXIS)
        g = _load(grad_out, offsets, there, REAL)
        if ACTIVATION != IDENTITY:
            out = _load(z, offsets, there, REAL)
        if ACTIVATION == RELU:
            g = tl.where(out <= 0, zero, g)
        if ACTIVATION == LEAKY_RELU:
            g = tl.where(out > 0, g, g * SLOPE)
        if given is not None:
            q = _load(given, offsets, there, REAL)
        elif ACTIVATION == LEAKY_RELU:
            q = tl.where(out > 0, out, out / SLOPE)
        else:
            q = out
        other = zero
        if residual is not None:
            other = _load(residual, offsets, there, REAL)
            q -= other
        if given is None and ACTIVATION == RELU:
            q = tl.where(out <= 0, shift + _cut_off(other + shift, spread), q)
        if partials is not None:
            total += g
            product += g * q
        if grad is not None:
            _store(grad, offsets, g, there)
        if grad_y is not None:
            g *= scale
            if PER_IMAGE or state is not None:
                g -= offset + q * gain
            _store(grad_y, offsets, g, there)
    if partials is not None:
        _store_partial(partials, 0, total, channels, num_channels, AXIS, 2)
        _store_partial(partials, 1, product, channels, num_channels, AXIS, 2)


@triton.jit(do_not_specialize=FEW, do_not_specialize_on_alignment=TABLES)
def finish_backward(
    partials, table, sums, grad_nll, prior, state, taken, vectors, num_blocks, num_images, num_positions, num_channels,
    REAL: tl.constexpr, IS_ONE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """vectors, (4, C), gain the gradients of mean, raw_std, gamma and beta; image after image `state` goes on (norm/balance.py).

    partials: those of the one image, where IS_ONE, else sums of each, (N, 2, C). sums: (N, 2, C), of the forward. None: grad_nll,
    which is then 0; prior and state; taken, (N, 2, C), to which each image's (A, B) are written.
    """
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channels < num_channels
    zero = tl.zeros([BLOCK_CHANNELS], REAL)
    all_g, all_product, all_y, all_square = zero, zero, zero, zero
    gamma_scale = _row(table, GAMMA_SCALE, channels, num_channels)
    gamma_shift = _row(table, GAMMA_SHIFT, channels, num_channels)
    if state is not None:
        weight = tl.load(grad_nll)
        counts = weight != 0
        unit = 1 / (tl.where(counts, weight, 1) * num_positions)
        inverse = _row(table, INVERSE, channels, num_channels) / num_positions
        inverse_square = inverse * _row(table, INVERSE, channels, num_channels)
        left_shift = _row(state, LEFT_SHIFT, channels, num_channels)
        left_slope = _row(state, LEFT_SLOPE, channels, num_channels)
        to_come = _row(state, TO_COME, channels, num_channels)
        prior_shift, prior_slope = _row(prior, 0, channels, num_channels), _row(prior, 1, channels, num_channels)
    for image in tl.range(0, num_images, num_stages=1 if IS_ONE else 4):
        if IS_ONE:
            g = _add_partials(partials, 0, num_blocks, channels, num_channels, REAL, 2, BLOCK, BLOCK_CHANNELS)
            product = _add_partials(partials, 1, num_blocks, channels, num_channels, REAL, 2, BLOCK, BLOCK_CHANNELS)
        else:
            g = _row(partials + image * 2 * num_channels, 0, channels, num_channels)
            product = _row(partials + image * 2 * num_channels, 1, channels, num_channels)
        y = _row(sums + image * 2 * num_channels, 0, channels, num_channels)
        square = _row(sums + image * 2 * num_channels, 1, channels, num_channels)
        all_g += g
        all_product += product
        all_y += y
        all_square += square
        if state is not None:
            first, second = inverse * y, inverse_square * square
            shift, slope, damping = correction_of(prior_shift, prior_slope, left_shift, left_slope, to_come, second)
            if taken is not None:
                tl.store(taken + image * 2 * num_channels + channels, shift, mask=is_channel)
                tl.store(taken + (image * 2 + 1) * num_channels + channels, slope, mask=is_channel)
            if counts:
                along_one, along_xhat = g * unit, (gamma_scale * product + gamma_shift * g) * unit
                more_shift, more_slope = left_over(shift, slope, damping, along_one, along_xhat, first, second)
                left_shift += more_shift
                left_slope += more_slope
                to_come -= 1
    if state is not None:
        tl.store(state + LEFT_SHIFT * num_channels + channels, left_shift, mask=is_channel)
        tl.store(state + LEFT_SLOPE * num_channels + channels, left_slope, mask=is_channel)
        tl.store(state + TO_COME * num_channels + channels, to_come, mask=is_channel)
    if grad_nll is not None:
        add_likelihood(
            vectors, table, grad_nll, all_y, all_square, num_images, num_positions, channels, is_channel, num_channels
        )
    add(vectors, 2, gamma_scale * all_product + gamma_shift * all_g, channels, is_channel, num_channels)
    add(vectors, 3, all_g, channels, is_channel, num_channels)
