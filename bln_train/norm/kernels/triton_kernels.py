"""The kernels of the epilogue in Triton's language; triton.py alone imports and runs them.

eager.py says what they compute.

A tile belongs to one image. Its positions lie along AXIS: 0 where channels are adjacent in memory, 1 where positions
are. A program walks some tiles of an image one after the other and keeps their sums in registers. So `partials`,
(N * programs of an image, NUM_SUMS, C), is small. A second kernel adds the partial sums in order. There are no
atomics: the same shape on the same device gives the same bits.

REAL is the precision of tables and sums. Everything between load and store is computed in it; tensors may have a lower
precision. Offsets are 64-bit. Arguments that may be None are documented as such.
"""

import torch
import triton
import triton.language as tl

from bln_train.norm.kernels import table as rows
from bln_train.norm.kernels.table import Row, StateRow

INNER = tl.constexpr(int(Row.INNER))
SHIFT = tl.constexpr(int(Row.SHIFT))
INVERSE = tl.constexpr(int(Row.INVERSE))
OUTER = tl.constexpr(int(Row.OUTER))
NLL_SQUARE = tl.constexpr(int(Row.NLL_SQUARE))
NLL_IMAGE = tl.constexpr(int(Row.NLL_IMAGE))
MEAN_MOMENT = tl.constexpr(int(Row.MEAN_MOMENT))
RAW_MOMENT = tl.constexpr(int(Row.RAW_MOMENT))
RAW_IMAGE = tl.constexpr(int(Row.RAW_IMAGE))
LEFT_SHIFT = tl.constexpr(int(StateRow.LEFT_SHIFT))
LEFT_SLOPE = tl.constexpr(int(StateRow.LEFT_SLOPE))
TO_COME = tl.constexpr(int(StateRow.TO_COME))
HORIZON = tl.constexpr(rows.HORIZON)
LARGEST_SQUARE = tl.constexpr(rows.LARGEST_SQUARE)

# Numbers that change with the micro-batch, and pointers into tables: no reason to compile again.
PLAIN = ["num_positions", "num_tiles", "tiles_per_program", "num_blocks", "num_probe"]
FEW = ["num_blocks", "num_images", "num_positions"]
TABLES = ["table", "maps", "partials", "sums", "probe", "nll", "loss_weight", "running", "state", "vectors"]


def real(dtype: torch.dtype) -> tl.dtype:
    """A precision of tables and sums, by the name that kernels know."""
    return tl.float64 if dtype == torch.float64 else tl.float32


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
    return _values(table, row, channels, channels < num_channels, num_channels)


@triton.jit
def _values(pointer, row, channels, there, num_channels):
    """Some channels of a row, 0 for those that are not there."""
    return tl.load(pointer + row * num_channels + channels, mask=there, other=0)


@triton.jit
def _add(vectors, row: tl.constexpr, more, channels, there, num_channels):
    """Add to some channels of a row."""
    places = vectors + row * num_channels + channels
    tl.store(places, tl.load(places, mask=there) + more, mask=there)


@triton.jit
def _add_likelihood(
    vectors, table, loss_weight, all_y, all_square, num_images, num_positions, channels, there, num_channels
):  # fmt: skip
    """Add the gradients of mean and raw_std, from all images' sums of y and y^2."""
    weight = tl.load(loss_weight)
    of_mean = _values(table, MEAN_MOMENT, channels, there, num_channels) * all_y / num_positions
    of_raw = _values(table, RAW_MOMENT, channels, there, num_channels) * all_square / num_positions
    of_raw += _values(table, RAW_IMAGE, channels, there, num_channels) * num_images
    _add(vectors, 0, weight * of_mean, channels, there, num_channels)
    _add(vectors, 1, weight * of_raw, channels, there, num_channels)


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
def _correction(running_shift, running_slope, left_shift, left_slope, to_come, second):
    """(A, B) of the image that comes next, whose mean of xhat^2 is `second`, and by how much its regressors are scaled down."""
    rest, excess = tl.maximum(to_come, HORIZON), (1 + second) / LARGEST_SQUARE
    damping = 1 / tl.sqrt(tl.where(excess < 1, 1.0, excess))  # in this order a NaN stays one
    return damping * (running_shift + left_shift / rest), damping * (running_slope + left_slope / rest), damping


@triton.jit
def _left_over(shift, slope, damping, along_one, along_xhat, first, second):
    """What the image adds to what is left, from its means of h, h * xhat, xhat and xhat^2."""
    return damping * (along_one - shift - slope * first), damping * (along_xhat - shift * first - slope * second)


@triton.jit
def _group_moments(total, square, count, EPS: tl.constexpr):
    """Mean and 1 / deviation of a group, from its channels' sums of xhat and xhat^2."""
    mean = tl.sum(total, 0) / count
    variance = tl.sum(square, 0) / count - mean * mean
    variance = tl.where(variance < 0, 0, variance)  # in this order a NaN stays one
    return mean, 1 / tl.sqrt(variance + EPS)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def forward(
    y, z, residual, maps, partials, num_positions, num_tiles, tiles_per_program, num_blocks, num_probe, num_channels,
    REAL: tl.constexpr, RELU: tl.constexpr, AXIS: tl.constexpr, NUM_SUMS: tl.constexpr, PER_IMAGE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """z becomes relu(scale * y + shift + residual), and may be y; sums of y and y^2 and, where NUM_SUMS is 4, those of the first
    `num_probe` images.

    maps: scale and shift, (2, C) or, PER_IMAGE, (N, 2, C). None: residual; maps and z, then nothing but sums is written; partials,
    where NUM_SUMS is 0.
    """
    channels = tl.expand_dims(tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), AXIS)
    is_channel = channels < num_channels
    zero = tl.zeros(
        [BLOCK_POSITIONS if AXIS == 0 else BLOCK_CHANNELS, BLOCK_CHANNELS if AXIS == 0 else BLOCK_POSITIONS], REAL
    )
    total, square, probe_total, probe_square = zero, zero, zero, zero
    image = tl.program_id(0) // num_blocks
    if PER_IMAGE:
        maps += image.to(tl.int64) * 2 * num_channels
    if maps is not None:
        scale, shift = _row(maps, 0, channels, num_channels), _row(maps, 1, channels, num_channels)
    begin = (tl.program_id(0) - image * num_blocks) * tiles_per_program
    for tile in range(begin, tl.minimum(begin + tiles_per_program, num_tiles)):
        positions = _positions(tile, AXIS, BLOCK_POSITIONS)
        there = (positions < num_positions) & is_channel
        offsets = _offsets(image, positions, channels, num_positions, num_channels, AXIS)
        v = _load(y, offsets, there, REAL)
        if NUM_SUMS:
            total += v
            square += v * v
        if NUM_SUMS == 4:
            of_probe = tl.where(there & (image < num_probe), v, zero)
            probe_total += of_probe
            probe_square += of_probe * of_probe
        if maps is not None:
            v = v * scale + shift
            if residual is not None:
                v += _load(residual, offsets, there, REAL)
            if RELU:
                v = tl.where(v < 0, zero, v)  # in this order a NaN stays one
            _store(z, offsets, v, there)
    if NUM_SUMS:
        _store_partial(partials, 0, total, channels, num_channels, AXIS, NUM_SUMS)
        _store_partial(partials, 1, square, channels, num_channels, AXIS, NUM_SUMS)
    if NUM_SUMS == 4:
        _store_partial(partials, 2, probe_total, channels, num_channels, AXIS, NUM_SUMS)
        _store_partial(partials, 3, probe_square, channels, num_channels, AXIS, NUM_SUMS)


@triton.jit(do_not_specialize=FEW, do_not_specialize_on_alignment=TABLES)
def finish_forward(
    partials, table, sums, probe, nll, num_blocks, num_images, num_positions, num_channels, REAL: tl.constexpr,
    NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """sums, (2, C), become those of all programs, the others are added to probe, (2, C), and the likelihood to nll.

    One program for all channels, since the likelihood is over all of them. None: probe where NUM_SUMS is 2; table and nll.
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
                _add(probe, number - 2, total, channels, is_channel, num_channels)
            if number == 1 and nll is not None:
                likelihood += _row(table, NLL_SQUARE, channels, num_channels) * total / num_positions
                likelihood += _row(table, NLL_IMAGE, channels, num_channels) * num_images
    if nll is not None:
        tl.store(nll, tl.load(nll) + tl.sum(likelihood, 0))


@triton.jit(do_not_specialize=FEW, do_not_specialize_on_alignment=TABLES)
def finish_groups(
    partials, table, sums, maps, num_blocks, num_positions, num_channels, size, EPS: tl.constexpr, REAL: tl.constexpr,
    NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """sums, (N, 2, C), become each image's of y and y^2, and maps, (N, 2, C), the scale and shift of y, with groups of channels.

    A program for each group, of `size` channels in a power of 2 of lanes, and image.
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
    inverse = _values(table, INVERSE, channels, there, num_channels)
    mean, r = _group_moments(inverse * y, inverse * inverse * square, size * num_positions, EPS)
    scale = _values(table, OUTER, channels, there, num_channels) * r
    tl.store(maps + image * 2 * num_channels + channels, scale * inverse, mask=there)
    shift = _values(table, SHIFT, channels, there, num_channels) - scale * mean
    tl.store(maps + (image * 2 + 1) * num_channels + channels, shift, mask=there)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
def backward(
    grad_z, z, y, table, sums, loss_weight, running, state, maps, grad_y, grad, partials, num_positions, num_tiles,
    tiles_per_program, num_blocks, num_channels, REAL: tl.constexpr, RELU: tl.constexpr, AXIS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """With g = grad_z * relu'(z):  grad_y = offset + gain * y + scale * g, grad = g, and sums of g and of g * y.

    Offset, gain and scale are the image's in maps, (N, 3, C). Where that is None they are those of the layer without groups, the
    correction being that of the one image, from running, state and sums, (2, C), of its forward. grad or grad_y may be grad_z,
    grad_y may be y: each entry is read before it is written. None: z without RELU; maps; grad; grad_y, then nothing is written but
    sums; partials, then there are none; state, then the correction is 0.
    """
    channels = tl.expand_dims(tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), AXIS)
    is_channel = channels < num_channels
    zero = tl.zeros(
        [BLOCK_POSITIONS if AXIS == 0 else BLOCK_CHANNELS, BLOCK_CHANNELS if AXIS == 0 else BLOCK_POSITIONS], REAL
    )
    total, product = zero, zero
    image = tl.program_id(0) // num_blocks
    scale = _row(table, INNER, channels, num_channels)
    if maps is not None:
        own = maps + image.to(tl.int64) * 3 * num_channels
        offset, gain = _row(own, 0, channels, num_channels), _row(own, 1, channels, num_channels)
        scale = _row(own, 2, channels, num_channels)
    elif state is not None and grad_y is not None:
        inverse = _row(table, INVERSE, channels, num_channels)
        second = inverse * inverse * _row(sums, 1, channels, num_channels) / num_positions
        running_shift, running_slope = (
            _row(running, 0, channels, num_channels),
            _row(running, 1, channels, num_channels),
        )
        left_shift = _row(state, LEFT_SHIFT, channels, num_channels)
        left_slope = _row(state, LEFT_SLOPE, channels, num_channels)
        to_come = _row(state, TO_COME, channels, num_channels)
        shift, slope, _ = _correction(running_shift, running_slope, left_shift, left_slope, to_come, second)
        factor = -tl.load(loss_weight) * scale
        offset, gain = factor * shift, factor * slope * inverse
    begin = (tl.program_id(0) - image * num_blocks) * tiles_per_program
    for tile in range(begin, tl.minimum(begin + tiles_per_program, num_tiles)):
        positions = _positions(tile, AXIS, BLOCK_POSITIONS)
        there = (positions < num_positions) & is_channel
        offsets = _offsets(image, positions, channels, num_positions, num_channels, AXIS)
        g = _load(grad_z, offsets, there, REAL)
        if RELU:
            g = tl.where(_load(z, offsets, there, REAL) <= 0, zero, g)
        q = _load(y, offsets, there, REAL)
        if partials is not None:
            total += g
            product += g * q
        if grad is not None:
            _store(grad, offsets, g, there)
        if grad_y is not None:
            g *= scale
            if maps is not None or state is not None:
                g += offset + q * gain
            _store(grad_y, offsets, g, there)
    if partials is not None:
        _store_partial(partials, 0, total, channels, num_channels, AXIS, 2)
        _store_partial(partials, 1, product, channels, num_channels, AXIS, 2)


@triton.jit(do_not_specialize=FEW, do_not_specialize_on_alignment=TABLES)
def finish_backward(
    partials, table, sums, loss_weight, running, state, maps, vectors, num_blocks, num_images, num_positions, num_channels, size,
    EPS: tl.constexpr, HAS_GROUPS: tl.constexpr, IS_ONE: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """vectors, (4, C) or with groups (6, C), gain the gradients of mean, raw_std, weights and biases; `state` goes on, image after
    image; maps, (N, 3, C), become each one's offset, gain and scale of the gradient of y.

    A program for `size` channels in a power of 2 of lanes: with groups, those of one. partials: those of the one image, where
    IS_ONE, else sums of each, (N, 2, C). sums: (N, 2, C), of the forward. None: loss_weight, which is then 0; running and state;
    maps.
    """
    lanes = tl.arange(0, BLOCK_CHANNELS)
    channels = tl.program_id(0) * size + lanes
    there = (lanes < size) & (channels < num_channels)
    zero = tl.zeros([BLOCK_CHANNELS], REAL)
    all_g, all_u, all_h, all_along, all_y, all_square = zero, zero, zero, zero, zero, zero
    inner = _values(table, INNER, channels, there, num_channels)
    inverse = _values(table, INVERSE, channels, there, num_channels)
    outer = _values(table, OUTER, channels, there, num_channels)
    if state is not None:
        weight = tl.load(loss_weight)
        counts = weight != 0
        unit = 1 / (tl.where(counts, weight, 1) * num_positions)
        left_shift = _values(state, LEFT_SHIFT, channels, there, num_channels)
        left_slope = _values(state, LEFT_SLOPE, channels, there, num_channels)
        to_come = _values(state, TO_COME, channels, there, num_channels)
        running_shift = _values(running, 0, channels, there, num_channels)
        running_slope = _values(running, 1, channels, there, num_channels)
    for image in tl.range(0, num_images, num_stages=1 if IS_ONE else 4):
        row = image * 2
        if IS_ONE:
            safe = tl.where(there, channels, num_channels)
            g = _add_partials(partials, 0, num_blocks, safe, num_channels, REAL, 2, BLOCK, BLOCK_CHANNELS)
            along_h = (
                _add_partials(partials, 1, num_blocks, safe, num_channels, REAL, 2, BLOCK, BLOCK_CHANNELS) * inverse
            )
        else:
            g = _values(partials, row, channels, there, num_channels)
            along_h = _values(partials, row + 1, channels, there, num_channels) * inverse
        y = _values(sums, row, channels, there, num_channels)
        square = _values(sums, row + 1, channels, there, num_channels)
        of_x, of_square = y * inverse, square * inverse * inverse
        all_y += y
        all_square += square
        h, scale, shift, slope = g, inner, zero, zero
        if HAS_GROUPS:
            count = size * num_positions
            mean, r = _group_moments(of_x, of_square, count, EPS)
            along_u = r * (along_h - mean * g)
            e1, e2 = tl.sum(outer * g, 0) / count, tl.sum(outer * along_u, 0) / count
            slope = r * r * e2 + zero
            shift = r * e1 - slope * mean
            h = outer * r * g - shift * num_positions - slope * of_x
            along_h = outer * r * along_h - shift * of_x - slope * of_square
            scale = inner * outer * r
            all_g += g
            all_u += along_u
        all_h += h
        all_along += along_h
        if state is not None:
            first, second = of_x / num_positions, of_square / num_positions
            along_one, along_slope, damping = _correction(
                running_shift, running_slope, left_shift, left_slope, to_come, second
            )
            shift += weight * along_one
            slope += weight * along_slope
            if counts:
                more_shift, more_slope = _left_over(
                    along_one, along_slope, damping, h * unit, along_h * unit, first, second
                )
                left_shift += more_shift
                left_slope += more_slope
                to_come -= 1
        if maps is not None:
            own = maps + image * 3 * num_channels + channels
            tl.store(own, -inner * shift, mask=there)
            tl.store(own + num_channels, -inner * inverse * slope, mask=there)
            tl.store(own + 2 * num_channels, scale, mask=there)
    if state is not None:
        tl.store(state + LEFT_SHIFT * num_channels + channels, left_shift, mask=there)
        tl.store(state + LEFT_SLOPE * num_channels + channels, left_slope, mask=there)
        tl.store(state + TO_COME * num_channels + channels, to_come, mask=there)
    if loss_weight is not None:
        _add_likelihood(
            vectors, table, loss_weight, all_y, all_square, num_images, num_positions, channels, there, num_channels
        )
    _add(vectors, 2, all_along, channels, there, num_channels)
    _add(vectors, 3, all_h, channels, there, num_channels)
    if HAS_GROUPS:
        _add(vectors, 4, all_u, channels, there, num_channels)
        _add(vectors, 5, all_g, channels, there, num_channels)
