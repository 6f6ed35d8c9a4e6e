"""The Triton kernels: sweeps over a map, and the cell's elementwise parts.

The sweeps are those of ``csrc/kernels/sweeps.h``: ``reduce`` sums over each channel's positions, ``spread`` applies a
value of each sample and channel. A map is (N, C, L) with any distance between samples and, within one, ``sc`` elements
from channel to channel and ``sl`` from position to position, one of which is 1. A program takes a tile of channels and
positions in registers; nothing is staged, and each map is read or written once. Sums are trees of a fixed shape: the
same bits every time. Tables are float32.

What is absent is None. Sizes alone compile nothing anew but where Triton itself tells multiples of sixteen and ones
from other numbers, which kernels of tables do not ask for.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
            of_g = _tile(dy, sample, dy_stride, channels, positions, sc, sl, inside)
            if y is not None:
                of_g = tl.where(_tile(y, sample, y_stride, channels, positions, sc, sl, inside) <= 0.0, 0.0, of_g)
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


@triton.jit
def moments(x, first, total, squares, count, length, sc, sl, x_stride, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """Of each sample and channel: its first value, the sum about it, and the squares about its own mean.

    Two sums about the first value, float64 where lanes meet and so in their tables; what rounding leaves of the squares
    is never negative. NaN passes.
    """
    sample = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < count
    origin = tl.load(x + sample * x_stride + channels.to(tl.int64) * sc, mask=known, other=0.0).to(tl.float32)
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


@triton.jit
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
        of_g = _tile(dy, sample, dy_stride, channels, positions, sc, sl, inside)
        if y is not None:
            of_g = tl.where(_tile(y, sample, y_stride, channels, positions, sc, sl, inside) <= 0.0, 0.0, of_g)
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


@triton.jit(do_not_specialize=["rows", "count"])
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
    i = _sigmoid(tl.load(u + at, mask=known) + tl.load(bias + channel, mask=known))
    f = _sigmoid(tl.load(u + at + count, mask=known) + tl.load(bias + channel + count, mask=known))
    g = _tanh(tl.load(u + at + 2 * count, mask=known) + tl.load(bias + channel + 2 * count, mask=known))
    o = _sigmoid(tl.load(u + at + 3 * count, mask=known) + tl.load(bias + channel + 3 * count, mask=known))
    cell = i * g
    if c is not None:
        cell += f * tl.load(c + k, mask=known)
    tl.store(new_c + k, cell, mask=known)
    h = o * (_tanh(cell) if TANH else _sigmoid(cell))
    tl.store(new_h + k, h, mask=known)
    if factor is not None:
        of_z = tl.load(scale + channel, mask=known) * h
        tl.store(factor + k, of_z, mask=known)
        tl.store(
            added + k, tl.load(beta + channel, mask=known) * h - tl.load(d + channel, mask=known) * of_z, mask=known
        )
    if of_gates is not None:
        tl.store(of_gates + at, i, mask=known)
        tl.store(of_gates + at + count, f, mask=known)
        tl.store(of_gates + at + 2 * count, g, mask=known)
        tl.store(of_gates + at + 3 * count, o, mask=known)


@triton.jit(do_not_specialize=["rows", "count"])
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
    s = _tanh(cell) if TANH else _sigmoid(cell)
    of_c = of_h * o * ((1.0 - s * s) if TANH else s * (1.0 - s))
    if dc is not None:
        of_c += tl.load(dc + k, mask=known)
    before = tl.zeros([BLOCK], tl.float32)
    if c is not None:
        before = tl.load(c + k, mask=known)
    tl.store(du + at, of_c * g * i * (1.0 - i), mask=known)
    tl.store(du + at + count, of_c * before * f * (1.0 - f), mask=known)
    tl.store(du + at + 2 * count, of_c * i * (1.0 - g * g), mask=known)
    tl.store(du + at + 3 * count, of_h * s * o * (1.0 - o), mask=known)
    if old_dc is not None:
        tl.store(old_dc + k, of_c * f, mask=known)
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


@triton.jit(do_not_specialize=["samples", "count", "length"])
def batch_statistics(
    first, total, squares, shift, d, rstd, mean, var, off, samples, count, length, eps,
    CHANNELS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """The norm's tables of a batch, from the ``moments`` of each sample.

    In float64, from each sample's sum about its own first value and its squares about its own mean (see
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


@triton.jit(do_not_specialize=["samples", "count", "length"])
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
