"""The step in plain PyTorch. It defines what is right.

Every backend is tested against these functions in float64; gradcheck, double backward, forward
mode and vmap run through them; and they are the last fallback. They take checked arguments:
``functional`` is the door. Formulas: arXiv:1905.10671, section 3, and the authors' code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cells import LSTMParameters, LSTMTrace, lstm, squash
from .layout import broadcast, channels, compute_dtype, no_autocast, output_format, spatial_dims, spatial_size


def pool(x: Tensor, channel_dim: int) -> Tensor:
    """Mean of each channel over its positions: (N, C) in the compute dtype, NaN where there are none."""
    return x.to(compute_dtype(x.dtype)).mean(spatial_dims(x, channel_dim))


def rescale(x: Tensor, scale: Tensor, shortcut: Tensor | None, channel_dim: int, relu: bool) -> Tensor:
    """``act(x * scale + shortcut)``, computed in the dtype of ``scale``, rounded once to that of ``x``."""
    y = x.to(scale.dtype) * broadcast(scale, x, channel_dim)
    if shortcut is not None:
        y = y + shortcut.to(scale.dtype)
    if relu:
        y = torch.relu(y)
    return y.to(x.dtype).contiguous(memory_format=output_format(x, channel_dim))


def initial_state(p: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state given, or zeros like ``p``: h = c = 0 at the first block of a stage."""
    return torch.zeros_like(p) if h is None else h, torch.zeros_like(p) if c is None else c


def traced_step(
    x: Tensor,
    shortcut: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    parameters: LSTMParameters,
    channel_dim: int,
    relu: bool,
    output: str,
    p: Tensor | None = None,
) -> tuple[Tensor, Tensor, LSTMTrace]:
    """The whole step: y, the pooled p (unless it is given), and the trace of the cell (which holds the new state)."""
    p = pool(x, channel_dim) if p is None else p
    trace = lstm(p, *initial_state(p, h, c), parameters, output)
    y = rescale(x, trace.h, shortcut, channel_dim, relu)
    return y, p, trace


def step(
    x: Tensor,
    shortcut: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    parameters: LSTMParameters,
    channel_dim: int,
    relu: bool,
    output: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h', c')`` of one step. It never follows autocast: the cell stays in the compute dtype."""
    with no_autocast(x):
        y, _, trace = traced_step(x, shortcut, h, c, parameters, channel_dim, relu, output)
    return y, trace.h, trace.c


def per_channel(vector: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """A view of the (C,) ``vector`` that broadcasts over samples and positions of ``x``."""
    return broadcast(vector.unsqueeze(0), x, channel_dim)


def statistics(z: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over samples and positions, (C,), in the compute dtype."""
    wide = z.to(compute_dtype(z.dtype))
    dims = (0, *spatial_dims(z, channel_dim))
    mean = wide.mean(dims)
    return mean, (wide - per_channel(mean, z, channel_dim)).square().mean(dims)


def normalise(
    z: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor | None, beta: Tensor | None, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """``(z - mean) * rstd``, and that ``* gamma + beta``, in the compute dtype."""
    zn = (z.to(mean.dtype) - per_channel(mean, z, channel_dim)) * per_channel(rstd, z, channel_dim)
    x = zn if gamma is None else zn * per_channel(gamma, z, channel_dim)
    return zn, x if beta is None else x + per_channel(beta, z, channel_dim)


def tail(
    z: Tensor,
    shortcut: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    parameters: LSTMParameters,
    channel_dim: int,
    relu: bool,
    output: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(y, h', c', mean, var)``: batch norm of ``z``, then the step on it, rounded once in the end.

    ``mean`` and ``var`` are the statistics to use, None for those of this batch. (arXiv:1502.03167,
    algorithm 1; then as ``step``.)
    """
    with no_autocast(z):
        if mean is None or var is None:
            mean, var = statistics(z, channel_dim)
        _, x = normalise(z, mean, (var + eps).rsqrt(), gamma, beta, channel_dim)
        wide = None if shortcut is None else shortcut.to(x.dtype)
        y, _, trace = traced_step(x, wide, h, c, parameters, channel_dim, relu, output)
        y = y.to(z.dtype).contiguous(memory_format=output_format(z, channel_dim))
    return y, trace.h, trace.c, mean, var


def norm_sums(dx: Tensor, zn: Tensor, channel_dim: int) -> Tensor:
    """Gradients of the norm's bias and weight, stacked: (2, C)."""
    dims = (0, *spatial_dims(zn, channel_dim))
    return torch.stack((dx.sum(dims), (dx * zn).sum(dims)))


def normalise_backward(
    dx: Tensor,
    zn: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    channel_dim: int,
    shares: Tensor | None,
) -> Tensor:
    """Gradient of z through ``normalise``.

    ``shares``: ``norm_sums`` over all values that the statistics are of, divided by their number; None where the
    statistics are constants.
    """
    if shares is not None:
        through_mean, through_rstd = (per_channel(part, zn, channel_dim) for part in shares)
        dx = dx - (through_mean + zn * through_rstd)
    factor = rstd if gamma is None else rstd * gamma
    return dx * per_channel(factor, zn, channel_dim)


def variance(x: Tensor, channel_dim: int) -> Tensor:
    """Unbiased variance of each channel of each sample, (N, C), in the compute dtype.

    A single position has none by the book; here it is 0. Of no positions it is NaN.
    """
    wide, positions = x.to(compute_dtype(x.dtype)), spatial_size(x, channel_dim)
    off = wide - broadcast(pool(x, channel_dim), x, channel_dim)
    return sum_positions(off.square(), channel_dim) / (max(positions - 1, 1) if positions else torch.nan)


def extreme_positions(z: Tensor, gamma: Tensor | None, channel_dim: int) -> Tensor:
    """Where each channel of each sample is largest, (N, C) in int64; where ``gamma`` (C,) is negative, smallest.

    Positions are counted in the order of the dimensions; of equal values it is the first. NaN is beyond all others.
    """
    if spatial_size(z, channel_dim) == 0:
        return z.new_zeros((z.shape[0], channels(z, channel_dim)), dtype=torch.int64)
    if gamma is not None:
        z = torch.where(per_channel(gamma, z, channel_dim) < 0, -z, z)
    return _rows(z, channel_dim).argmax(2)


def at_positions(x: Tensor, where: Tensor, channel_dim: int) -> Tensor:
    """What ``x`` is at one position of each channel of each sample, (N, C); NaN where there are no positions."""
    rows = _rows(x, channel_dim)
    return rows.gather(2, where[..., None]).squeeze(2) if rows.shape[2] else rows.new_full(where.shape, torch.nan)


def put_at_positions(values: Tensor, where: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """Gradient of ``at_positions``: zero but there."""
    rows = _rows(x, channel_dim)
    if rows.shape[2]:
        rows = torch.zeros_like(rows).scatter(2, where[..., None], values[..., None])
    return rows.view(*rows.shape[:2], *(x.shape[k] for k in spatial_dims(x, channel_dim))).movedim(1, channel_dim)


def _rows(x: Tensor, channel_dim: int) -> Tensor:
    """``x`` as (N, C, HW)."""
    return x.movedim(channel_dim, 1).flatten(2)


def unrelu(dy: Tensor, y: Tensor) -> Tensor:
    """Gradient through the ReLU that made ``y``: zero only where y <= 0, so that NaN passes."""
    return dy.masked_fill(y <= 0, 0)


def sum_positions(x: Tensor, channel_dim: int) -> Tensor:
    """Sum of each channel over its positions, (N, C)."""
    dims = spatial_dims(x, channel_dim)
    return x.sum(dims) if x.numel() else x.new_zeros(x.shape[0], x.shape[channel_dim])


def spread(dp: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """Gradient of ``pool``: ``dp / HW`` at every position, as an expanded view in the dtype of ``x``."""
    share = dp / max(spatial_size(x, channel_dim), 1)
    return broadcast(share.to(x.dtype), x, channel_dim).expand(x.shape)


def rescale_backward(
    dy: Tensor, x: Tensor, scale: Tensor, y: Tensor | None, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dx, dscale, dshortcut)`` of ``rescale``, dx not yet rounded to the dtype of ``x``.

    ``y`` is the result of ``rescale`` if it had a ReLU, else None.
    """
    g = dy if y is None else unrelu(dy, y)
    wide = g.to(scale.dtype)
    return wide * broadcast(scale, x, channel_dim), sum_positions(wide * x.to(scale.dtype), channel_dim), g


def lstm_backward(
    dh: Tensor, dc: Tensor, c: Tensor, new_c: Tensor, i: Tensor, f: Tensor, g: Tensor, o: Tensor, output: str
) -> tuple[Tensor, Tensor]:
    """Gradients of the pre-activations, (N, 4 C) in gate order, and of the old cell state, (N, C)."""
    s = squash(new_c, output)
    dc = dc + dh * o * (s * (1 - s) if output == "sigmoid" else 1 - s * s)
    du = torch.cat((dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * s * o * (1 - o)), 1)
    return du, dc * f


class Factors(NamedTuple):
    """What the gradients of a cell's parameters are made of, together with its own tables.

    Gradients of the pre-activations, ``du`` (N, 4 C), and of both bottlenecks, ``dzx`` and ``dzh`` (N, m).
    """

    du: Tensor
    dzx: Tensor
    dzh: Tensor


def parameter_gradients(factors: Factors, p: Tensor, zx: Tensor, zh: Tensor, h: Tensor | None) -> LSTMParameters:
    """Gradients of the parameters, sums over all rows of the tables; ``h`` is the old state, None for zero."""
    du, dzx, dzh = factors
    return LSTMParameters(
        input_reduce_weight=dzx.t() @ p,
        input_reduce_bias=dzx.sum(0),
        input_expand_weight=du.t() @ zx,
        input_expand_bias=du.sum(0),
        hidden_reduce_weight=dzh.t() @ (torch.zeros_like(p) if h is None else h),
        hidden_reduce_bias=dzh.sum(0),
        hidden_expand_weight=du.t() @ zh,
        hidden_expand_bias=du.sum(0),
    )


def step_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    new_c: Tensor,
    p: Tensor,
    trace: LSTMTrace,
    parameters: LSTMParameters,
    channel_dim: int,
    output: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Factors]:
    """Gradients ``(dx, dshortcut, dp, dh, dc)`` of ``step`` and the factors of its parameters', written out.

    ``y`` is the step's result if it had a ReLU, else None; ``dy``, ``dh`` and ``dc`` may be None
    for zero. Of ``parameters`` only the weights are read.
    """
    _, c = initial_state(p, h, c)
    dy = torch.zeros_like(x) if dy is None else dy
    dh = torch.zeros_like(p) if dh is None else dh
    dc = torch.zeros_like(p) if dc is None else dc
    w = parameters

    dx, dscale, dshortcut = rescale_backward(dy, x, trace.h, y, channel_dim)
    du, dc = lstm_backward(dh + dscale, dc, c, new_c, trace.i, trace.f, trace.g, trace.o, output)
    dzx = unrelu(du @ w.input_expand_weight, trace.zx)
    dzh = unrelu(du @ w.hidden_expand_weight, trace.zh)
    dp = dzx @ w.input_reduce_weight
    dx = dx + broadcast(dp / max(spatial_size(x, channel_dim), 1), x, channel_dim)
    return dx.to(x.dtype), dshortcut, dp, dzh @ w.hidden_reduce_weight, dc, Factors(du, dzx, dzh)
