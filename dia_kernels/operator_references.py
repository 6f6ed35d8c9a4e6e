"""The operators in plain PyTorch, by ``reference``: what runs on every device without a kernel of its own.

One function for each schema, with its arguments and results (``operators``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import masks, reference
from .cells import LSTMParameters, LSTMTrace, join_parameters, squash
from .layout import broadcast, channels, compute_dtype, output_format, spatial_size
from .tables import factor_sizes, norm_parts, norm_tokens, table_sizes


def _pack(p: Tensor, trace: LSTMTrace) -> Tensor:
    gates = torch.cat((trace.i, trace.f, trace.g, trace.o), dim=1)
    return torch.cat([part.reshape(-1) for part in (p, trace.zx, trace.zh, gates)])


def _unpack(tables: Tensor, n: int, c: int, m: int, new_c: Tensor, tanh_output: bool) -> tuple[Tensor, LSTMTrace]:
    p, zx, zh, gates = tables.split(table_sizes(n, c, m))
    i, f, g, o = gates.view(n, 4 * c).chunk(4, dim=1)
    h = o * squash(new_c, _output(tanh_output))
    return p.view(n, c), LSTMTrace(h, new_c, zx.view(n, m), zh.view(n, m), i, f, g, o)


def _output(tanh_output: bool) -> str:
    return "tanh" if tanh_output else "sigmoid"


def _in_format(t: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """``t`` as a fresh tensor in the output format of ``x``: what the fakes promise."""
    return torch.empty_like(t, memory_format=output_format(x, channel_dim)).copy_(t)


def _if_in_format(t: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The fresh tensor ``t`` itself if it lies as the fakes promise, in dimensions of one element too; else a copy."""
    promised = torch.empty(t.shape, device="meta", memory_format=output_format(x, channel_dim))
    return t if t.stride() == promised.stride() else _in_format(t, x, channel_dim)


def step(x, shortcut, h, c, *rest):
    *parameters, channel_dim, relu, tanh_output, keep_tables, keep_mask = rest
    with torch.autocast(x.device.type, enabled=False):
        y, p, trace = reference.traced_step(
            x, shortcut, h, c, LSTMParameters(*parameters), channel_dim, relu, _output(tanh_output)
        )
    tables = _pack(p, trace) if keep_tables else p.new_empty(0)
    y = _if_in_format(y, x, channel_dim)
    return y, trace.h, trace.c, tables, _mask(y, channel_dim, relu and keep_mask)


def _mask(y: Tensor, channel_dim: int, wanted: bool) -> Tensor:
    return masks.make(y, channel_dim) if wanted else y.new_empty(0, dtype=torch.uint8)


def step_(x, shortcut, h, c, *rest):
    y, new_h, new_c, *_ = step(x, shortcut, h, c, *rest, False, False)
    x.copy_(y)
    return new_h, new_c


def step_backward(dy, dh, dc, x, y, h, c, new_c, tables, *rest):
    *weights, channel_dim, relu, tanh_output, need_x, need_shortcut, need_state, need_parameters, as_factors = rest
    parameters = _with_weights(weights)
    n, m = x.shape[0], parameters.input_reduce_weight.shape[0]
    y = None if y is None else masks.as_result(y, x, channel_dim)
    p, trace = _unpack(tables, n, channels(x, channel_dim), m, new_c, tanh_output)
    with torch.autocast(x.device.type, enabled=False):
        dx, dshortcut, _, dh, dc, factors = reference.step_backward(
            dy, dh, dc, x, y if relu else None, h, c, new_c, p, trace, parameters, channel_dim, _output(tanh_output)
        )
        of_parameters = _of_parameters(factors, p, trace, h, need_parameters, as_factors)
    return (
        _in_format(dx, x, channel_dim) if need_x else x.new_empty(0),
        _in_format(dshortcut, x, channel_dim) if need_shortcut else x.new_empty(0),
        *((dh, dc) if need_state else (p.new_empty(0), p.new_empty(0))),
        of_parameters,
    )


def _of_parameters(factors, p, trace, h, wanted: bool, as_factors: bool) -> Tensor:
    """The gradients of the parameters, in one tensor, in the form that is asked for; an empty one if none is."""
    if not wanted:
        return p.new_empty(0)
    if as_factors:
        return torch.cat([t.reshape(-1) for t in factors])
    return join_parameters(reference.parameter_gradients(factors, p, trace.zx, trace.zh, h))


def parameter_gradients(factors, tables, h, bottleneck):
    n, c = h[0].shape
    m = bottleneck

    def joined(flats, sizes, widths):
        """Of the tables that each step has in one, those of all steps behind each other."""
        of_steps = zip(*(flat[: sum(sizes)].split(sizes) for flat in flats), strict=True)
        return [torch.cat(parts).view(-1, width) for parts, width in zip(of_steps, widths, strict=True)]

    with torch.autocast(h[0].device.type, enabled=False):
        left = reference.Factors(*joined(factors, factor_sizes(n, c, m), (4 * c, m, m)))
        p, zx, zh = joined(tables, table_sizes(n, c, m)[:3], (c, m, m))
        return join_parameters(reference.parameter_gradients(left, p, zx, zh, torch.cat(h)))


def _with_weights(weights: list[Tensor]) -> LSTMParameters:
    """The four weights in their places; the gradient reads no bias, so its places hold weights too."""
    return LSTMParameters(*(w for weight in weights for w in (weight, weight)))


def _norm_tables(off: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """A norm's tables with the mean itself as shift."""
    return torch.cat([off.reshape(-1), mean, torch.zeros_like(mean), rstd])


def _affine(values, gamma, beta):
    """``values`` (N, C) by gamma and beta, where they are there."""
    values = values if gamma is None else values * gamma
    return values if beta is None else values + beta


def tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest):
    return normed(z, shortcut, h, c, gamma, beta, mean, var, None, eps, *rest)


def normed(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest):
    *parameters, channel_dim, relu, tanh_output, keep_mask = rest
    batch = mean is None
    with torch.autocast(z.device.type, enabled=False):
        if batch:
            mean, var = reference.statistics(z, channel_dim)
        own = None if means is None else (means - mean.double()).to(compute_dtype(z.dtype))
        mean, var = (t.to(compute_dtype(z.dtype)) for t in (mean, var))
        rstd = (var + eps).rsqrt()
        _, x = reference.normalise(z, mean, rstd, gamma, beta, channel_dim)
        wide = None if shortcut is None else shortcut.to(x.dtype)
        off = reference.pool(z, channel_dim) - mean if own is None else own
        y, p, trace = reference.traced_step(
            x, wide, h, c, LSTMParameters(*parameters), channel_dim, relu, _output(tanh_output),
            None if own is None else _affine(own * rstd, gamma, beta),
        )  # fmt: skip
        tables = torch.cat([_pack(p, trace), _norm_tables(off, mean, rstd)])
    statistics = (mean, var) if batch else (mean.new_empty(0), mean.new_empty(0))
    y = _in_format(y.to(z.dtype), z, channel_dim)
    return y, trace.h, trace.c, tables, *statistics, _mask(y, channel_dim, relu and keep_mask)


def tail_join(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest):
    y, new_h, new_c, tables, _, _, mask = normed(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest)
    return y, new_h, new_c, tables, mask


def _move(z, running_mean, running_var, batches, mean, var, factor) -> None:
    """Moves a norm's buffers towards the statistics of the batch ``z``, unless it has no values."""
    if z.numel() == 0:
        batches += 1
        return
    count = z.numel() // max(running_mean.numel(), 1)
    unbiased = var * (count / max(count - 1, 1))
    moved = running_mean.lerp(mean, factor), running_var.lerp(unbiased, factor), batches + 1
    for buffer, value in zip((running_mean, running_var, batches), moved, strict=True):
        buffer.copy_(value)


def tail_tracking_(z, shortcut, h, c, gamma, beta, running_mean, running_var, batches, factor, eps, *rest):
    y, new_h, new_c, tables, mean, var, mask = tail(z, shortcut, h, c, gamma, beta, None, None, eps, *rest)
    _move(z, running_mean, running_var, batches, mean, var, factor)
    return y, new_h, new_c, tables, mask


def tail_sums(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    """All of the tail's gradient but dz: ``(sums, dx, dshortcut, dp, dh, dc, of_parameters)``, x the norm's result."""
    *weights, channel_dim, relu, tanh_output, need_parameters, as_factors = rest
    parameters = _with_weights(weights)
    n, width, m = z.shape[0], channels(z, channel_dim), parameters.input_reduce_weight.shape[0]
    y = None if y is None else masks.as_result(y, z, channel_dim)
    cell, _, mean, rstd = norm_parts(z, tables, channel_dim)
    p, trace = _unpack(cell, n, width, m, new_c, tanh_output)
    with torch.autocast(z.device.type, enabled=False):
        zn, x = reference.normalise(z, mean, rstd, gamma, beta, channel_dim)
        dx, *others, factors = reference.step_backward(
            None if dy is None else dy.to(x.dtype), dh, dc, x, y if relu else None, h, c, new_c, p, trace, parameters,
            channel_dim, _output(tanh_output),
        )  # fmt: skip
        of_parameters = _of_parameters(factors, p, trace, h, need_parameters, as_factors)
        return reference.norm_sums(dx, zn, channel_dim), dx, *others, of_parameters


def tail_backward(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *cell, batch, need_z, need_shortcut, need_state, need_parameters, need_affine, as_factors = rest
    channel_dim = cell[-3]
    sums, dx, dshortcut, _, dh, dc, of_parameters = tail_sums(
        dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *cell, need_parameters, as_factors
    )
    dz = z.new_empty(0)
    if need_z:
        *_, mean, rstd = norm_parts(z, tables, channel_dim)
        zn, _ = reference.normalise(z, mean, rstd, None, None, channel_dim)
        shares = sums / max(z.shape[0] * spatial_size(z, channel_dim), 1) if batch else None
        dz = reference.normalise_backward(dx, zn, rstd, gamma, channel_dim, shares)
        dz = _in_format(dz.to(z.dtype), z, channel_dim)
    nothing = new_c.new_empty
    return (
        dz,
        _in_format(dshortcut.to(z.dtype), z, channel_dim) if need_shortcut else z.new_empty(0),
        *((dh, dc) if need_state else (nothing(0), nothing(0))),
        *((sums[1].clone(), sums[0].clone()) if need_affine else (nothing(0), nothing(0))),
        of_parameters,
    )


def statistics(z, channel_dim):
    wide = z.double()
    return *reference.statistics(wide, channel_dim), reference.pool(wide, channel_dim)


def tail_reduce(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *cell, need_shortcut, need_state, need_parameters = rest
    sums, _, dshortcut, dp, dh, dc, of_parameters = tail_sums(
        dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *cell, need_parameters, False
    )
    nothing = new_c.new_empty
    return (
        sums,
        _in_format(dshortcut.to(z.dtype), z, cell[-3]) if need_shortcut else z.new_empty(0),
        dp,
        *((dh, dc) if need_state else (nothing(0), nothing(0))),
        of_parameters,
    )


def tail_spread(dy, y, z, new_h, dp, tables, gamma, shares, channel_dim):
    *_, mean, rstd = norm_parts(z, tables, channel_dim)
    zn, _ = reference.normalise(z, mean, rstd, None, None, channel_dim)
    dx = reference.spread(dp, zn, channel_dim)
    if dy is not None:
        g = dy if y is None else reference.unrelu(dy, masks.as_result(y, z, channel_dim))
        dx = dx + g.to(zn.dtype) * broadcast(new_h, z, channel_dim)
    dz = reference.normalise_backward(dx, zn, rstd, gamma, channel_dim, shares)
    return _in_format(dz.to(z.dtype), z, channel_dim)


def norm_pool(z, gamma, beta, mean, var, eps, channel_dim, with_variance, with_extreme, keep_tokens):
    batch = mean is None
    with torch.autocast(z.device.type, enabled=False):
        if batch:
            mean, var = reference.statistics(z, channel_dim)
        mean, var = (t.to(compute_dtype(z.dtype)) for t in (mean, var))
        rstd = (var + eps).rsqrt()
        off = reference.pool(z, channel_dim) - mean
        p = _affine(off * rstd, gamma, beta)
        tables = _norm_tables(off, mean, rstd)
        variance = p.new_empty(0, dtype=torch.float64)
        if with_variance:
            variance = reference.variance(z, channel_dim).double() / (var.double() + eps)
        extreme, where = p.new_empty(0), z.new_empty(0, dtype=torch.int64)
        if with_extreme:
            where = reference.extreme_positions(z, gamma, channel_dim)
            extreme = (reference.at_positions(z, where, channel_dim).to(p.dtype) - mean) * rstd
    statistics = (mean, var) if batch else (mean.new_empty(0), mean.new_empty(0))
    return p, tables, *norm_tokens(z, p, keep_tokens), variance, extreme, where, *statistics


def norm_pool_tracking_(z, gamma, beta, running_mean, running_var, batches, factor, eps, *rest):
    *results, mean, var = norm_pool(z, gamma, beta, None, None, eps, *rest)
    _move(z, running_mean, running_var, batches, mean, var, factor)
    return tuple(results)


def norm_pool_backward(
    g, handed, dp, dvariance, variance, dextreme, extreme, where, z, tables, gamma, channel_dim, batch, need_z
):
    _, off, mean, rstd = norm_parts(z, tables, channel_dim)
    of_bias, of_weight, scale = handed
    if spatial_size(z, channel_dim) == 0:  # p is the mean of no values, and what it is told goes nowhere
        dp = torch.zeros_like(dp)
    dbeta = (scale * of_bias + dp).sum(0)
    dgamma = (scale * of_weight + dp * off).sum(0) * rstd
    if z.numel() == 0:  # whatever the mean and the deviation of no values are
        dbeta, dgamma = torch.zeros_like(dbeta), torch.zeros_like(dgamma)
    if not need_z:
        return z.new_empty(0), dgamma, dbeta
    zn, _ = reference.normalise(z, mean, rstd, None, None, channel_dim)
    dx = g.to(zn.dtype) * broadcast(scale, z, channel_dim) + reference.spread(dp, zn, channel_dim)
    count = max(z.shape[0] * spatial_size(z, channel_dim), 1)
    shares = torch.stack((dbeta, dgamma)) / count if batch else None
    dz = reference.normalise_backward(dx, zn, rstd, gamma, channel_dim, shares)
    # The statistics' gradients go to zn: each by itself through the norm before its affine.
    if dvariance is not None:
        slope = (2 * dvariance / max(spatial_size(z, channel_dim) - 1, 1)).to(zn.dtype)
        dzn = (zn - broadcast(off * rstd, z, channel_dim)) * broadcast(slope, z, channel_dim)
        shares = torch.stack((torch.zeros_like(rstd), (2 * dvariance * variance).sum(0).to(rstd.dtype))) / count
        dz = dz + reference.normalise_backward(dzn, zn, rstd, None, channel_dim, shares if batch else None)
    if dextreme is not None:
        dzn = reference.put_at_positions(dextreme, where, zn, channel_dim)
        shares = torch.stack((dextreme.sum(0), (dextreme * extreme).sum(0))) / count
        dz = dz + reference.normalise_backward(dzn, zn, rstd, None, channel_dim, shares if batch else None)
    return _in_format(dz.to(z.dtype), z, channel_dim), dgamma, dbeta


def norm_rescale(z, scale, shortcut, tables, token_of_g, token_of_handed, gamma, beta, channel_dim, relu, keep_mask):
    *_, mean, rstd = norm_parts(z, tables, channel_dim)
    _, x = reference.normalise(z, mean, rstd, gamma, beta, channel_dim)
    wide = None if shortcut is None else shortcut.to(x.dtype)
    y = _in_format(reference.rescale(x, scale, wide, channel_dim, relu).to(z.dtype), z, channel_dim)
    return y, _mask(y, channel_dim, relu and keep_mask)


def norm_rescale_backward(dy, y, z, scale, tables, gamma, beta, channel_dim, need_g):
    *_, mean, rstd = norm_parts(z, tables, channel_dim)
    g = dy if y is None else reference.unrelu(dy, masks.as_result(y, z, channel_dim))
    wide = g.to(mean.dtype)
    off = z.to(mean.dtype) - reference.per_channel(mean, z, channel_dim)
    of_bias, of_weight = (reference.sum_positions(t, channel_dim) for t in (wide, wide * off))
    dscale = of_weight * (rstd if gamma is None else rstd * gamma)
    dscale = dscale if beta is None else dscale + of_bias * beta
    handed = torch.stack((of_bias, of_weight, scale))
    if spatial_size(z, channel_dim) == 0:  # whatever the deviation of no values is
        dscale, handed = torch.zeros_like(dscale), torch.zeros_like(handed)
    return dscale, handed, _in_format(g.to(z.dtype), z, channel_dim) if need_g else z.new_empty(0)


def pool(x, channel_dim):
    return reference.pool(x, channel_dim)


def rescale(x, scale, shortcut, channel_dim, relu):
    return _in_format(reference.rescale(x, scale, shortcut, channel_dim, relu), x, channel_dim)


def rescale_backward(dy, x, scale, y, channel_dim, need_x, need_scale, need_shortcut):
    dx, dscale, dshortcut = reference.rescale_backward(dy, x, scale, y, channel_dim)
    return (
        _in_format(dx.to(x.dtype), x, channel_dim) if need_x else x.new_empty(0),
        dscale if need_scale else scale.new_empty(0),
        _in_format(dshortcut, x, channel_dim) if need_shortcut else x.new_empty(0),
    )
