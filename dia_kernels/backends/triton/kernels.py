"""The Triton kernels: sweeps over a map, the cell's elementwise parts, and a step in one program for each sample.

The sweeps are those of ``csrc/kernels/sweeps.h``: ``reduce`` sums over each channel's positions, ``spread`` applies a
value of each sample and channel. A map is (N, C, L) with any distance between samples and, within one, ``sc`` elements
from channel to channel and ``sl`` from position to position, one of which is 1. A program takes a tile of channels and
positions in registers; nothing is staged, and each map is read or written once. Sums are trees of a fixed shape: the
same bits every time. Tables are float32.

What is absent is None. Sizes alone compile nothing anew but where they ask for another tile, or where Triton itself
tells multiples of sixteen and ones from other numbers and addresses. Of tables, which begin anywhere in one piece of
memory, it is not to ask that.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Arguments that are tables, or sizes of kernels that have nothing but tables.
_TABLES = [
    "shift", "total", "product", "scale", "offset", "slope", "first", "squares", "u", "bias", "c", "of_gates", "new_c",
    "new_h", "d", "beta", "factor", "added", "dh", "dc", "du", "old_dh", "old_dc", "rstd", "mean", "var", "off", "dp",
    "dgamma", "dbeta", "p", "zx", "zh", "dzx", "dzh", "h",
]  # fmt: skip
_SIZES = ["rows", "count", "samples", "length"]
#: Decorators of kernels that have maps, and of those that have tables only.
_of_maps = triton.jit(do_not_specialize_on_alignment=_TABLES)
_of_tables = triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_TABLES)


@triton.jit
def _tile(data, sample, stride, channels, positions, sc, sl, inside):
    """A tile of a map, as float32; zero outside."""
    at = data + sample * stride + channels.to(tl.int64)[:, None] * sc + positions.to(tl.int64)[None, :] * sl
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(data, sample, stride, channels, positions, sc, sl, inside, values):
    at = data + sample * stride + channels.to(tl.int64)[:, None] * sc + positions.to(tl.int64)[None, :] * sl
    tl.store(at, values.to(data.dtype.element_ty), mask=inside)


@triton.jit
def _masked(dy, y, sample, dy_stride, y_stride, channels, positions, sc, sl, inside):
    """A tile of g: of dy, where y > 0 if there is y. NaN passes."""
    tile = _tile(dy, sample, dy_stride, channels, positions, sc, sl, inside)
    if y is not None:
        tile = tl.where(_tile(y, sample, y_stride, channels, positions, sc, sl, inside) <= 0.0, 0.0, tile)
    return tile


@_of_maps
def reduce(
    x, dy, y, g, shift, total, product, count, length, sc, sl, x_stride, dy_stride, y_stride, g_stride,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """``total`` = sum of g and ``product`` = sum of g (x - shift); without dy ``total`` = sum of x - shift.

    g is dy, where y > 0 if there is y (NaN passes), and is written to ``g``. Tables (N, C), shift (C); a program a
    sample and tile of channels. Moves each map once.
    """
    sample = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < count
    offset = tl.zeros([CHANNELS], tl.float32)
    if shift is not None:
        offset = tl.load(shift + channels, mask=known, other=0.0)
    first = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    second = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for begin in range(0, length, POSITIONS):
        positions = begin + tl.arange(0, POSITIONS)
        inside = known[:, None] & (positions < length)[None, :]
        if x is not None:
            of_x = tl.where(
                inside, _tile(x, sample, x_stride, channels, positions, sc, sl, inside) - offset[:, None], 0.0
            )
        if dy is not None:
            of_g = _masked(dy, y, sample, dy_stride, y_stride, channels, positions, sc, sl, inside)
            if g is not None:
                _put(g, sample, g_stride, channels, positions, sc, sl, inside, of_g)
            first += of_g
            if x is not None:
                second += of_g * of_x
        else:
            first += of_x
    at = sample * count + channels
    if total is not None:
        tl.store(total + at, tl.sum(first, 1), mask=known)
    if product is not None:
        tl.store(product + at, tl.sum(second, 1), mask=known)


@_of_maps
def moments(x, first, total, squares, count, length, sc, sl, x_stride, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """Of each sample and channel: one of its values, the sum about it, and the squares about its own mean.

    Two sums about a value, float64 where lanes meet and so in their tables; what rounding leaves of the squares is
    never negative. NaN passes. The value, put into ``first``, is the median of three (csrc/core/shift.h says why).
    """
    sample = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < count
    row = x + sample * x_stride + channels.to(tl.int64) * sc
    length_64 = tl.full([], length, tl.int64)
    a = tl.load(row + length_64 * 27 // 128 * sl, mask=known, other=0.0).to(tl.float32)
    b = tl.load(row + length_64 * 66 // 128 * sl, mask=known, other=0.0).to(tl.float32)
    c = tl.load(row + length_64 * 107 // 128 * sl, mask=known, other=0.0).to(tl.float32)
    median = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
    origin = tl.where((a - a) + (b - b) + (c - c) == 0.0, median, 0.0)
    sums = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    products = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for begin in range(0, length, POSITIONS):
        positions = begin + tl.arange(0, POSITIONS)
        inside = known[:, None] & (positions < length)[None, :]
        value = tl.where(inside, _tile(x, sample, x_stride, channels, positions, sc, sl, inside) - origin[:, None], 0.0)
        sums += value
        products += value * value
    of_all = tl.sum(sums.to(tl.float64), 1)
    about = tl.sum(products.to(tl.float64), 1) - of_all * (of_all / length)
    at = sample * count + channels
    tl.store(first + at, origin, mask=known)
    tl.store(total + at, of_all, mask=known)
    tl.store(squares + at, tl.where(about < 0.0, 0.0, about), mask=known)


@_of_maps
def spread(
    x, dy, y, shortcut, out, scale, offset, shift, slope, count, length, sc, sl,
    x_stride, dy_stride, y_stride, shortcut_stride, out_stride,
    RELU: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """out = g scale + (x - shift) slope + offset + shortcut; without slope x is scaled by ``scale``.

    g as in ``reduce``. Tables scale and offset (N, C), shift and slope (C). A program a sample and tile. Moves each map
    once.
    """
    pieces = tl.cdiv(length, POSITIONS)
    sample = (tl.program_id(0) // pieces).to(tl.int64)
    positions = tl.program_id(0) % pieces * POSITIONS + tl.arange(0, POSITIONS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < count
    inside = known[:, None] & (positions < length)[None, :]
    at = sample * count + channels
    sums = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    if offset is not None:
        sums += tl.load(offset + at, mask=known, other=0.0)[:, None]
    if scale is not None:
        factor = tl.load(scale + at, mask=known, other=0.0)
    if dy is not None:
        of_g = _masked(dy, y, sample, dy_stride, y_stride, channels, positions, sc, sl, inside)
        sums += of_g * factor[:, None]
    if x is not None:
        of_x = _tile(x, sample, x_stride, channels, positions, sc, sl, inside)
        if shift is not None:
            of_x -= tl.load(shift + channels, mask=known, other=0.0)[:, None]
        if slope is not None:
            factor = tl.load(slope + channels, mask=known, other=0.0)
        sums += of_x * factor[:, None]
    if shortcut is not None:
        sums += _tile(shortcut, sample, shortcut_stride, channels, positions, sc, sl, inside)
    if RELU:
        sums = tl.where(sums <= 0.0, 0.0, sums)  # not a maximum: NaN passes
    _put(out, sample, out_stride, channels, positions, sc, sl, inside, sums)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # Of |x|, so that nothing overflows; for a small x its own series, as 1 - exp(-2 x) would cancel.
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    square = size * size
    small = size * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    value = tl.where(size < 0.25, small, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -value, value)


@triton.jit
def _gates(i, f, g, o):
    """The gates, of their pre-activations."""
    return _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)


@triton.jit
def _output(cell, TANH: tl.constexpr):
    return _tanh(cell) if TANH else _sigmoid(cell)


@triton.jit
def _put_gates(at, count, known, i, f, g, o):
    """Four values of each channel into a row (4 C)."""
    tl.store(at, i, mask=known)
    tl.store(at + count, f, mask=known)
    tl.store(at + 2 * count, g, mask=known)
    tl.store(at + 3 * count, o, mask=known)


@triton.jit
def _through_gates(of_h, of_c, cell, before, i, f, g, o, TANH: tl.constexpr):
    """From the gradients of h' and c' those of the four pre-activations, of the old c, and o's own output s."""
    s = _output(cell, TANH)
    of_c += of_h * o * ((1.0 - s * s) if TANH else s * (1.0 - s))
    du_i = of_c * g * i * (1.0 - i)
    du_f = of_c * before * f * (1.0 - f)
    return du_i, du_f, of_c * i * (1.0 - g * g), of_h * s * o * (1.0 - o), of_c * f, s


@_of_tables
def gates(
    u, bias, c, of_gates, new_c, new_h, d, scale, beta, factor, added, rows, count,
    TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gates and state from the products ``u`` (N, 4 C) and both biases' sum (4 C), an element a lane.

    i, f, o = sigmoid; g = tanh; c' = f c + i g; h' = o sigmoid(c'), or o tanh(c') (arXiv:1905.10671, section 3).
    Behind a norm x = ((z - shift) - d) scale + beta also what y takes of z: (z - shift) ``factor`` + ``added``.
    """
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = k < rows * count
    row = k // count
    channel = k - row * count
    at = row * 4 * count + channel
    i, f, g, o = _gates(
        tl.load(u + at, mask=known) + tl.load(bias + channel, mask=known),
        tl.load(u + at + count, mask=known) + tl.load(bias + channel + count, mask=known),
        tl.load(u + at + 2 * count, mask=known) + tl.load(bias + channel + 2 * count, mask=known),
        tl.load(u + at + 3 * count, mask=known) + tl.load(bias + channel + 3 * count, mask=known),
    )
    cell = i * g
    if c is not None:
        cell += f * tl.load(c + k, mask=known)
    tl.store(new_c + k, cell, mask=known)
    h = o * _output(cell, TANH)
    tl.store(new_h + k, h, mask=known)
    if factor is not None:
        of_z = tl.load(scale + channel, mask=known) * h
        tl.store(factor + k, of_z, mask=known)
        tl.store(
            added + k, tl.load(beta + channel, mask=known) * h - tl.load(d + channel, mask=known) * of_z, mask=known
        )
    if of_gates is not None:
        _put_gates(of_gates + at, count, known, i, f, g, o)


@_of_tables
def gate_gradients(
    total, product, dh, dc, c, new_c, of_gates, du, old_dc, new_h, d, scale, beta, factor, rows, count,
    TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the pre-activations (N, 4 C) and of the old c; and h' again. Absent ones of h and c are zero.

    What the map sends to h': ``product``, the sum of g x; behind a norm of g (z - shift), and ``total`` of g.
    ``factor`` is what dz takes of g, scale h'.
    """
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = k < rows * count
    row = k // count
    channel = k - row * count
    at = row * 4 * count + channel
    i = tl.load(of_gates + at, mask=known)
    f = tl.load(of_gates + at + count, mask=known)
    g = tl.load(of_gates + at + 2 * count, mask=known)
    o = tl.load(of_gates + at + 3 * count, mask=known)
    cell = tl.load(new_c + k, mask=known)
    of_h = tl.zeros([BLOCK], tl.float32)
    if product is not None:
        of_map = tl.load(product + k, mask=known)
        if total is not None:
            sums = tl.load(total + k, mask=known)
            of_map = tl.load(scale + channel, mask=known) * (of_map - tl.load(d + channel, mask=known) * sums)
            of_map += tl.load(beta + channel, mask=known) * sums
        of_h += of_map
    if dh is not None:
        of_h += tl.load(dh + k, mask=known)
    of_c = tl.zeros([BLOCK], tl.float32)
    if dc is not None:
        of_c += tl.load(dc + k, mask=known)
    before = tl.zeros([BLOCK], tl.float32)
    if c is not None:
        before = tl.load(c + k, mask=known)
    du_i, du_f, du_g, du_o, of_old, s = _through_gates(of_h, of_c, cell, before, i, f, g, o, TANH)
    _put_gates(du + at, count, known, du_i, du_f, du_g, du_o)
    if old_dc is not None:
        tl.store(old_dc + k, of_old, mask=known)
    tl.store(new_h + k, o * s, mask=known)
    if factor is not None:
        tl.store(factor + k, tl.load(scale + channel, mask=known) * o * s, mask=known)


@triton.jit
def _rows(begin, samples, channels, count, SAMPLES: tl.constexpr):
    """Places in a table (N, C) of some samples' rows from ``begin`` on, and whether they are there."""
    rows = begin + tl.arange(0, SAMPLES)
    at = rows.to(tl.int64)[:, None] * count + channels[None, :]
    return at, (rows < samples)[:, None] & (channels < count)[None, :]


@triton.jit
def _about(first, total, at, inside, origin, length):
    """Each sample's mean less ``origin``, in float64; zero outside."""
    apart = tl.load(first + at, mask=inside, other=0.0).to(tl.float64) - origin[None, :]
    return tl.where(inside, tl.load(total + at, mask=inside, other=0.0) / length + apart, 0.0)


@_of_tables
def batch_statistics(
    first, total, squares, shift, d, rstd, mean, var, off, samples, count, length, eps,
    CHANNELS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """The norm's tables of a batch, from the ``moments`` of each sample.

    In float64, from each sample's sum about a value of its own and its squares about its own mean (see
    ``csrc/kernels/norm.h``): ``shift`` is the float next to the mean, ``d`` the rest of it, ``off`` each sample's mean
    less the mean. A program has some channels, and all samples.
    """
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < count
    origin = tl.load(first + channels, mask=known, other=0.0).to(tl.float64)
    means = tl.zeros([CHANNELS], tl.float64)
    for begin in range(0, samples, SAMPLES):
        at, inside = _rows(begin, samples, channels, count, SAMPLES)
        means += tl.sum(_about(first, total, at, inside, origin, length), 0)
    rest = means / samples
    center = (origin + rest).to(tl.float32)
    of_squares = tl.zeros([CHANNELS], tl.float64)
    for begin in range(0, samples, SAMPLES):
        at, inside = _rows(begin, samples, channels, count, SAMPLES)
        apart = tl.where(inside, _about(first, total, at, inside, origin, length) - rest[None, :], 0.0)
        of_squares += tl.sum(tl.load(squares + at, mask=inside, other=0.0) / length + apart * apart, 0)
        tl.store(off + at, apart.to(tl.float32), mask=inside)
    variance = (of_squares / samples).to(tl.float32)
    tl.store(shift + channels, center, mask=known)
    tl.store(d + channels, (origin - center.to(tl.float64) + rest).to(tl.float32), mask=known)
    tl.store(rstd + channels, 1.0 / tl.sqrt(variance + eps), mask=known)
    tl.store(mean + channels, center, mask=known)
    tl.store(var + channels, variance, mask=known)


@_of_tables
def norm_gradients(
    total, product, dp, off, new_h, d, scale, rstd, dgamma, dbeta, offset, slope, samples, count, length,
    BATCH: tl.constexpr, CHANNELS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Gradients of the norm's parameters, and what dz takes beside g ``factor``: (z - shift) slope + offset.

    As ``csrc/kernels/norm.h``. With given statistics (not BATCH) there is no slope. A program has some channels, and
    all samples.
    """
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < count
    rest = tl.load(d + channels, mask=known, other=0.0)
    by_scale = tl.zeros([CHANNELS], tl.float32)
    by_bias = tl.zeros([CHANNELS], tl.float32)
    for begin in range(0, samples, SAMPLES):
        at, inside = _rows(begin, samples, channels, count, SAMPLES)
        of_h = tl.load(new_h + at, mask=inside, other=0.0)
        of_p = tl.load(dp + at, mask=inside, other=0.0)
        sums = tl.load(total + at, mask=inside, other=0.0)
        about_mean = tl.load(product + at, mask=inside, other=0.0) - rest[None, :] * sums
        by_scale += tl.sum(of_h * about_mean + of_p * tl.load(off + at, mask=inside, other=0.0), 0)
        by_bias += tl.sum(of_h * sums + of_p, 0)
    inverse = tl.load(rstd + channels, mask=known, other=0.0)
    of_gamma = by_scale * inverse
    tl.store(dgamma + channels, of_gamma, mask=known)
    tl.store(dbeta + channels, by_bias, mask=known)
    if offset is not None:
        factor = tl.load(scale + channels, mask=known, other=0.0)
        common = tl.zeros([CHANNELS], tl.float32)
        if BATCH:
            values = samples * (length * 1.0)
            of_z = -factor * inverse * of_gamma / values
            common = -factor * by_bias / values - of_z * rest
            tl.store(slope + channels, of_z, mask=known)
        for begin in range(0, samples, SAMPLES):
            at, inside = _rows(begin, samples, channels, count, SAMPLES)
            of_p = tl.load(dp + at, mask=inside, other=0.0)
            tl.store(offset + at, factor[None, :] * of_p / length + common[None, :], mask=inside)


@triton.jit
def _weights(data, rows, known_rows, columns, known_columns, width):
    """Some rows of a matrix with rows of ``width``; zero outside."""
    inside = known_rows[:, None] & known_columns[None, :]
    return tl.load(data + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _gate(k, w2, b2, v2, a2, of_x, of_h, channels, known, hidden, narrow, count, width):
    """Pre-activation of gate ``k`` from the bottlenecks: a value of each channel."""
    rows = k * count + channels
    sums = tl.load(b2 + rows, mask=known, other=0.0) + tl.load(a2 + rows, mask=known, other=0.0)
    sums += tl.sum(_weights(w2, rows, known, hidden, narrow, width) * of_x[None, :], 1)
    return sums + tl.sum(_weights(v2, rows, known, hidden, narrow, width) * of_h[None, :], 1)


@triton.jit
def _bottleneck(sums, narrow):
    """ReLU; and zero in the lanes without a row, whose zero times infinity is NaN."""
    return tl.where(narrow & ~(sums <= 0.0), sums, 0.0)


@triton.jit
def _rescaled(
    tile, scale, shortcut, sample, shortcut_stride, channels, positions, sc, sl, inside, RELU: tl.constexpr
):  # fmt: skip
    """act(x h' + shortcut) of a tile."""
    result = tile * scale[:, None]
    if shortcut is not None:
        result += _tile(shortcut, sample, shortcut_stride, channels, positions, sc, sl, inside)
    if RELU:
        result = tl.where(result <= 0.0, 0.0, result)  # not a maximum: NaN passes
    return result


@_of_maps
def step_of_sample(
    x, shortcut, h, c, w1, b1, w2, b2, v1, a1, v2, a2, y, new_h, new_c, p, zx, zh, of_gates,
    count, width, length, sc, sl, x_stride, shortcut_stride, y_stride,
    RELU: tl.constexpr, TANH: tl.constexpr, MORE: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The whole step, a program a sample: the means, the cell, y = act(x h' + shortcut); perhaps the tables.

    The first tile lies in registers meanwhile. If there are MORE, they are read twice, the second time from a cache.
    Every program reads all weights. One launch where the split path has ten.
    """
    sample = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    known = channels < count
    hidden = tl.arange(0, WIDTH)
    narrow = hidden < width
    positions = tl.arange(0, POSITIONS)
    inside = known[:, None] & (positions < length)[None, :]
    kept = _tile(x, sample, x_stride, channels, positions, sc, sl, inside)
    sums = kept
    if MORE:
        for begin in range(POSITIONS, length, POSITIONS):
            others = begin + tl.arange(0, POSITIONS)
            there = known[:, None] & (others < length)[None, :]
            sums += _tile(x, sample, x_stride, channels, others, sc, sl, there)
    mean = tl.sum(sums, 1) / length
    row = sample * count + channels
    of_x = tl.load(b1 + hidden, mask=narrow, other=0.0)
    of_x += tl.sum(_weights(w1, hidden, narrow, channels, known, count) * mean[None, :], 1)
    of_h = tl.load(a1 + hidden, mask=narrow, other=0.0)
    if h is not None:
        before = tl.load(h + row, mask=known, other=0.0)
        of_h += tl.sum(_weights(v1, hidden, narrow, channels, known, count) * before[None, :], 1)
    of_x, of_h = _bottleneck(of_x, narrow), _bottleneck(of_h, narrow)
    i, f, g, o = _gates(
        _gate(0, w2, b2, v2, a2, of_x, of_h, channels, known, hidden, narrow, count, width),
        _gate(1, w2, b2, v2, a2, of_x, of_h, channels, known, hidden, narrow, count, width),
        _gate(2, w2, b2, v2, a2, of_x, of_h, channels, known, hidden, narrow, count, width),
        _gate(3, w2, b2, v2, a2, of_x, of_h, channels, known, hidden, narrow, count, width),
    )
    cell = i * g
    if c is not None:
        cell += f * tl.load(c + row, mask=known, other=0.0)
    scale = o * _output(cell, TANH)
    tl.store(new_c + row, cell, mask=known)
    tl.store(new_h + row, scale, mask=known)
    if of_gates is not None:
        tl.store(p + row, mean, mask=known)
        tl.store(zx + sample * width + hidden, of_x, mask=narrow)
        tl.store(zh + sample * width + hidden, of_h, mask=narrow)
        _put_gates(of_gates + sample * 4 * count + channels, count, known, i, f, g, o)
    result = _rescaled(kept, scale, shortcut, sample, shortcut_stride, channels, positions, sc, sl, inside, RELU)
    _put(y, sample, y_stride, channels, positions, sc, sl, inside, result)
    if MORE:
        for begin in range(POSITIONS, length, POSITIONS):
            others = begin + tl.arange(0, POSITIONS)
            there = known[:, None] & (others < length)[None, :]
            tile = _tile(x, sample, x_stride, channels, others, sc, sl, there)
            result = _rescaled(tile, scale, shortcut, sample, shortcut_stride, channels, others, sc, sl, there, RELU)
            _put(y, sample, y_stride, channels, others, sc, sl, there, result)


@triton.jit
def _before_gates(w, du_i, du_f, du_g, du_o, channels, known, hidden, narrow, count, width):
    """The gradient of a bottleneck, a value of each of its lanes."""
    sums = tl.sum(_weights(w, channels, known, hidden, narrow, width) * du_i[:, None], 0)
    sums += tl.sum(_weights(w, channels + count, known, hidden, narrow, width) * du_f[:, None], 0)
    sums += tl.sum(_weights(w, channels + 2 * count, known, hidden, narrow, width) * du_g[:, None], 0)
    return sums + tl.sum(_weights(w, channels + 3 * count, known, hidden, narrow, width) * du_o[:, None], 0)


@_of_maps
def step_of_sample_backward(
    x, dy, y, dh, dc, c, new_c, zx, zh, of_gates, w1, w2, v1, v2, dx, g, du, dzx, dzh, old_dh, old_dc,
    count, width, length, sc, sl, x_stride, dy_stride, y_stride, dx_stride, g_stride,
    TANH: tl.constexpr, MORE: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Gradients of ``step_of_sample``, but the parameters', a program a sample.

    Of the map, shortcut (``g``: dy where y > 0) and old state; and of the pre-activations and bottlenecks, for the
    parameters. The first tile of g lies in registers meanwhile; if there are MORE, they are made of dy and y again.
    """
    sample = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    known = channels < count
    hidden = tl.arange(0, WIDTH)
    narrow = hidden < width
    positions = tl.arange(0, POSITIONS)
    inside = known[:, None] & (positions < length)[None, :]
    kept = _masked(dy, y, sample, dy_stride, y_stride, channels, positions, sc, sl, inside)
    if g is not None:
        _put(g, sample, g_stride, channels, positions, sc, sl, inside, kept)
    sums = kept * _tile(x, sample, x_stride, channels, positions, sc, sl, inside)
    if MORE:
        for begin in range(POSITIONS, length, POSITIONS):
            others = begin + tl.arange(0, POSITIONS)
            there = known[:, None] & (others < length)[None, :]
            tile = _masked(dy, y, sample, dy_stride, y_stride, channels, others, sc, sl, there)
            if g is not None:
                _put(g, sample, g_stride, channels, others, sc, sl, there, tile)
            sums += tile * _tile(x, sample, x_stride, channels, others, sc, sl, there)
    row = sample * count + channels
    of_h = tl.sum(sums, 1)
    if dh is not None:
        of_h += tl.load(dh + row, mask=known, other=0.0)
    of_c = tl.zeros([CHANNELS], tl.float32)
    if dc is not None:
        of_c += tl.load(dc + row, mask=known, other=0.0)
    before = tl.zeros([CHANNELS], tl.float32)
    if c is not None:
        before = tl.load(c + row, mask=known, other=0.0)
    at = sample * 4 * count + channels
    o = tl.load(of_gates + at + 3 * count, mask=known, other=0.0)
    du_i, du_f, du_g, du_o, of_old, s = _through_gates(
        of_h, of_c, tl.load(new_c + row, mask=known, other=0.0), before,
        tl.load(of_gates + at, mask=known, other=0.0),
        tl.load(of_gates + at + count, mask=known, other=0.0),
        tl.load(of_gates + at + 2 * count, mask=known, other=0.0),
        o, TANH,
    )  # fmt: skip
    _put_gates(du + at, count, known, du_i, du_f, du_g, du_o)
    of_zx = _before_gates(w2, du_i, du_f, du_g, du_o, channels, known, hidden, narrow, count, width)
    of_zh = _before_gates(v2, du_i, du_f, du_g, du_o, channels, known, hidden, narrow, count, width)
    at = sample * width + hidden
    of_zx = tl.where(tl.load(zx + at, mask=narrow, other=0.0) <= 0.0, 0.0, of_zx)
    of_zh = tl.where(tl.load(zh + at, mask=narrow, other=0.0) <= 0.0, 0.0, of_zh)
    tl.store(dzx + at, of_zx, mask=narrow)
    tl.store(dzh + at, of_zh, mask=narrow)
    if old_dc is not None:
        tl.store(old_dc + row, of_old, mask=known)
        of_state = tl.sum(_weights(v1, hidden, narrow, channels, known, count) * of_zh[:, None], 0)
        tl.store(old_dh + row, of_state, mask=known)
    if dx is not None:
        scale = o * s
        offset = tl.sum(_weights(w1, hidden, narrow, channels, known, count) * of_zx[:, None], 0) / length
        _put(dx, sample, dx_stride, channels, positions, sc, sl, inside, kept * scale[:, None] + offset[:, None])
        if MORE:
            for begin in range(POSITIONS, length, POSITIONS):
                others = begin + tl.arange(0, POSITIONS)
                there = known[:, None] & (others < length)[None, :]
                tile = _masked(dy, y, sample, dy_stride, y_stride, channels, others, sc, sl, there)
                result = tile * scale[:, None] + offset[:, None]
                _put(dx, sample, dx_stride, channels, others, sc, sl, there, result)
