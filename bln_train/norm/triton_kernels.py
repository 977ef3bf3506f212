"""The kernels of norm/epilogue.py in Triton's language; norm/triton_launch.py calls them, and nothing else imports this.

A tensor is parts of `length` positions each: one part of N * S positions where channels are adjacent in memory (AXIS, that of a
tile's positions, is 0), N parts of S where positions are (AXIS is 1). A program walks some tiles one after the other and keeps
their sums in registers, so that partials, (programs along positions, NUM_SUMS, C), are small; a second kernel adds those in their
order. No atomics: the same shape on the same device gives the same bits.

REAL is the precision of tables and sums, in which everything between load and store is computed; tensors may be of a lower one.
Offsets are 64-bit. What may be None says so.
"""

import triton
import triton.language as tl

from bln_train.norm.epilogue import Row

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

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)

# Numbers that change with the micro-batch, and pointers into tables: no reason to compile again.
_PLAIN = ["length", "tiles_per_part", "num_tiles", "tiles_per_program", "watched_rows"]
_FEW = ["num_blocks", "num_images", "num_positions"]
_TABLES = ["table", "partials", "sums", "watched", "nll", "grad_nll", "vectors"]


@triton.jit
def _positions(tile, tiles_per_part, AXIS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr):
    """The part that a tile is of, and its positions there, along AXIS."""
    part = tile // tiles_per_part
    first = (tile - part * tiles_per_part).to(tl.int64) * BLOCK_POSITIONS
    return part.to(tl.int64), tl.expand_dims(first + tl.arange(0, BLOCK_POSITIONS), 1 - AXIS)


@triton.jit
def _offsets(part, positions, channels, length, num_channels, AXIS: tl.constexpr):
    """Where a tile's entries lie."""
    if AXIS == 0:  # there is one part
        return positions * num_channels + channels
    return part * num_channels * length + channels.to(tl.int64) * length + positions


@triton.jit
def _load(pointer, offsets, there, REAL: tl.constexpr):
    return tl.load(pointer + offsets, mask=there, other=0).to(REAL)


@triton.jit
def _store(pointer, offsets, value, there):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def _row(table, row: tl.constexpr, channels, num_channels):
    return tl.load(table + row * num_channels + channels, mask=channels < num_channels, other=0)


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
def _cut_off(shift, spread):
    return (tl.sqrt(shift * shift + spread) + shift) * -0.5


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_TABLES)
def forward(
    y, residual, table, partials, length, tiles_per_part, num_tiles, tiles_per_program, watched_rows, num_channels,
    REAL: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, AXIS: tl.constexpr, NUM_SUMS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """y becomes act(scale * y + shift + residual); sums of y and y^2 and, where NUM_SUMS is 6, of the first `watched_rows` rows
    those and, for a relu, those of q, as backward reads it off, and of q * y.

    None: residual; table, then y stays; partials, where NUM_SUMS is 0.
    """
    channels = tl.expand_dims(tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), AXIS)
    is_channel = channels < num_channels
    zero = tl.zeros(
        [BLOCK_POSITIONS if AXIS == 0 else BLOCK_CHANNELS, BLOCK_CHANNELS if AXIS == 0 else BLOCK_POSITIONS], REAL
    )
    total, square = zero, zero
    seen_total, seen_square, shown, product = zero, zero, zero, zero
    if table is not None:
        scale, shift = _row(table, SCALE, channels, num_channels), _row(table, SHIFT, channels, num_channels)
        if NUM_SUMS == 6:  # a map's table ends after SHIFT
            spread = _row(table, SPREAD, channels, num_channels)
    begin = tl.program_id(0) * tiles_per_program
    for tile in range(begin, tl.minimum(begin + tiles_per_program, num_tiles)):
        part, positions = _positions(tile, tiles_per_part, AXIS, BLOCK_POSITIONS)
        there = (positions < length) & is_channel
        offsets = _offsets(part, positions, channels, length, num_channels, AXIS)
        v = _load(y, offsets, there, REAL)
        if NUM_SUMS:
            total += v
            square += v * v
        if NUM_SUMS == 6:
            is_seen = there & (part * length + positions < watched_rows)
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


@triton.jit(do_not_specialize=_FEW, do_not_specialize_on_alignment=_TABLES)
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


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_TABLES)
def backward(
    grad_out, z, given, residual, table, grad_nll, grad_y, grad, partials, length, tiles_per_part, num_tiles, tiles_per_program,
    num_channels, REAL: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, AXIS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """With g = grad_out * act'(z):  grad_y = scale * g + grad_nll * (offset + gain * q), grad = g, and sums of g and of g * q.

    q is `given` or, where that is None, read off z, less the residual. grad or grad_y may be grad_out itself: each entry is read
    before it is written. None: z with the identity, which then needs `given`; given; residual; grad; grad_nll, then grad_y is
    scale * g.
    """
    channels = tl.expand_dims(tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), AXIS)
    is_channel = channels < num_channels
    zero = tl.zeros(
        [BLOCK_POSITIONS if AXIS == 0 else BLOCK_CHANNELS, BLOCK_CHANNELS if AXIS == 0 else BLOCK_POSITIONS], REAL
    )
    total, product = zero, zero
    scale = _row(table, SCALE, channels, num_channels)
    shift, spread = _row(table, SHIFT, channels, num_channels), _row(table, SPREAD, channels, num_channels)
    if grad_nll is not None:
        weight = tl.load(grad_nll)
        offset = weight * _row(table, OFFSET, channels, num_channels)
        gain = weight * _row(table, GAIN, channels, num_channels)
    begin = tl.program_id(0) * tiles_per_program
    for tile in range(begin, tl.minimum(begin + tiles_per_program, num_tiles)):
        part, positions = _positions(tile, tiles_per_part, AXIS, BLOCK_POSITIONS)
        there = (positions < length) & is_channel
        offsets = _offsets(part, positions, channels, length, num_channels, AXIS)
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
        total += g
        product += g * q
        if grad is not None:
            _store(grad, offsets, g, there)
        g *= scale
        if grad_nll is not None:
            g += offset + q * gain
        _store(grad_y, offsets, g, there)
    _store_partial(partials, 0, total, channels, num_channels, AXIS, 2)
    _store_partial(partials, 1, product, channels, num_channels, AXIS, 2)


@triton.jit(do_not_specialize=_FEW, do_not_specialize_on_alignment=_TABLES)
def finish_backward(
    partials, table, sums, grad_nll, vectors, num_blocks, num_images, num_positions, num_channels, REAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """vectors, (4, C), gain the gradients of mean, raw_std, gamma and beta. None: grad_nll, which is then 0."""
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channels < num_channels
    total = _add_partials(partials, 0, num_blocks, channels, num_channels, REAL, 2, BLOCK, BLOCK_CHANNELS)
    product = _add_partials(partials, 1, num_blocks, channels, num_channels, REAL, 2, BLOCK, BLOCK_CHANNELS)
    mean = vectors + channels
    raw, gamma, beta = mean + num_channels, mean + 2 * num_channels, mean + 3 * num_channels
    if grad_nll is not None:
        weight = tl.load(grad_nll)
        of_mean = (
            _row(table, MEAN_MOMENT, channels, num_channels) * _row(sums, 0, channels, num_channels) / num_positions
        )
        of_raw = _row(table, RAW_MOMENT, channels, num_channels) * _row(sums, 1, channels, num_channels) / num_positions
        of_raw += _row(table, RAW_IMAGE, channels, num_channels) * num_images
        tl.store(mean, tl.load(mean, mask=is_channel) + weight * of_mean, mask=is_channel)
        tl.store(raw, tl.load(raw, mask=is_channel) + weight * of_raw, mask=is_channel)
    of_gamma = _row(table, GAMMA_SCALE, channels, num_channels) * product
    of_gamma += _row(table, GAMMA_SHIFT, channels, num_channels) * total
    tl.store(gamma, tl.load(gamma, mask=is_channel) + of_gamma, mask=is_channel)
    tl.store(beta, tl.load(beta, mask=is_channel) + total, mask=is_channel)
