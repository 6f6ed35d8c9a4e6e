"""The operators: schemas, fakes, the reference kernels behind every device, and the native library.

Schemas (``schemas.py``) and fakes stand in Python, so that a pure-Python install has the same operators;
the native library only adds kernels for its devices. Another implementer for the same devices has a
set of its own (``define``), under the same schemas, fakes and gradients. In all of them ``x`` is the map,
``channel_dim`` is 1 or -1, ``relu`` says whether the step ends in a ReLU, and ``tanh_output``
whether the cell's output function is tanh (False: the paper's sigmoid).

======================  ======================================================================
``step``                ``(y, h', c', tables, mask)``: the whole step. ``tables`` is what its gradient
                        needs beside x, y and the states (see ``table_sizes``); it is empty
                        unless ``keep_tables``. ``mask`` is the ReLU's (``masks.py``), empty
                        unless ``keep_mask`` and ``relu``. Rows that begin no bytes have none,
                        and not every implementer keeps one (``Operators.masked_dtypes``).
``step_``               ``(h', c')``: the same, y written over ``x``. Inference only.
``step_backward``       gradients of x, shortcut, h, c and, in one flat tensor
                        (``cells.join_parameters``), of the eight parameters; those that the four
                        ``need_*`` flags do not ask for come back empty. With ``as_factors``, for a step
                        with a state, in place of the parameters' gradients what they are made of:
                        du, dzx and dzh (``factor_sizes``), for ``parameter_gradients``.
``tail``                ``(y, h', c', tables, mean, var, mask)``: the step on the batch norm of z.
                        ``mean`` and ``var`` (C,) are the statistics to use, in the compute
                        dtype or float64; None for those of this batch, which come back (else
                        empty tensors do).
``tail_tracking_``      ``(y, h', c', tables, mask)``: the same with the statistics of the batch, towards which the
                        norm's buffers are moved by ``factor``, as PyTorch does it: ``running_mean`` and
                        ``running_var``, float32 (C,), and ``batches``, its count in int64. For maps of at most
                        32 bits. Neither autograd nor tensor versions know of what is written: for ``norms``.
``tail_backward``       gradients of z, shortcut, h, c, the norm's weight and bias and the eight
                        parameters (in one, or ``as_factors``), by the five ``need_*`` flags
``parameter_gradients`` the gradients of the eight parameters, in one, of several steps that share them: from the
                        ``factors``, ``tables`` and old ``h`` of each, all of one number of samples
``statistics``          ``(mean, var, means)``: of each channel of z over samples and positions, (C,), the
                        variance biased; and the means of each sample, (N, C). All in float64.
``tail_join``           ``(y, h', c', tables, mask)``: ``tail`` on the statistics of several processes and the
                        ``means`` of these samples, so that z is read once
``tail_reduce``         the first half of ``tail_backward`` on batch statistics: ``(sums,
                        dshortcut, dp)`` and the gradients of h, c and the parameters (in one). ``sums``
                        (2, C): the gradients of the norm's bias and weight.
``tail_spread``         the second half: dz, from dy, y and z (or from the shortcut's gradient and
                        z), ``dp`` and ``shares``: sums over all processes, divided by the
                        number of values of a channel
``pool``                mean over positions, (N, C), in the compute dtype
``rescale``             ``act(x * scale + shortcut)``
``rescale_backward``    gradients of x, scale and shortcut
======================  ======================================================================

Where a gradient takes y, it takes the mask in its place, of implementers that keep one (but for ``rescale_backward``).

An operator may not return its input: with no ReLU the gradient of the shortcut is the incoming
one, which ``autograd`` hands on by itself.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import masks, reference
from .cells import LSTMParameters, LSTMTrace, join_parameters, parameter_count, squash
from .layout import broadcast, channels, compute_dtype, empty_map, output_format, shares_memory, spatial_size
from .schemas import NAMESPACE, SCHEMAS

Operator: TypeAlias = Any  # torch._ops.OpOverload, which knows no types

library = torch.library.Library(NAMESPACE, "DEF")


def table_sizes(n: int, c: int, m: int) -> list[int]:
    """Element counts of the parts of ``tables``: p, zx, zh and the gates i, f, g, o."""
    return [n * c, n * m, n * m, n * c * 4]


def factor_sizes(n: int, c: int, m: int) -> list[int]:
    """Element counts of the parts of a step's factors: du, dzx and dzh."""
    return [n * c * 4, n * m, n * m]


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


# --- reference kernels: every device without a native one ----------------------------------------


def _reference_step(x, shortcut, h, c, *rest):
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


def _reference_step_(x, shortcut, h, c, *rest):
    y, new_h, new_c, *_ = _reference_step(x, shortcut, h, c, *rest, False, False)
    x.copy_(y)
    return new_h, new_c


def _reference_step_backward(dy, dh, dc, x, y, h, c, new_c, tables, *rest):
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


def _reference_parameter_gradients(factors, tables, h, bottleneck):
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


# The norm's part of ``tables`` follows that of the cell: each sample's mean less the mean, (N, C), then shift, d and
# rstd (C each), with which zn = ((z - shift) - d) * rstd. Here the shift is the mean itself, and d is 0.


def _affine(values, gamma, beta):
    """``values`` (N, C) by gamma and beta, where they are there."""
    values = values if gamma is None else values * gamma
    return values if beta is None else values + beta


def _reference_tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest):
    return _reference_normed(z, shortcut, h, c, gamma, beta, mean, var, None, eps, *rest)


def _reference_normed(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest):
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
        tables = torch.cat([_pack(p, trace), off.reshape(-1), mean, torch.zeros_like(mean), rstd])
    statistics = (mean, var) if batch else (mean.new_empty(0), mean.new_empty(0))
    y = _in_format(y.to(z.dtype), z, channel_dim)
    return y, trace.h, trace.c, tables, *statistics, _mask(y, channel_dim, relu and keep_mask)


def _reference_tail_join(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest):
    y, new_h, new_c, tables, _, _, mask = _reference_normed(
        z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest
    )
    return y, new_h, new_c, tables, mask


def _reference_tail_tracking_(z, shortcut, h, c, gamma, beta, running_mean, running_var, batches, factor, eps, *rest):
    y, new_h, new_c, tables, mean, var, mask = _reference_tail(z, shortcut, h, c, gamma, beta, None, None, eps, *rest)
    count = z.numel() // max(running_mean.numel(), 1)
    unbiased = var * (count / max(count - 1, 1))
    moved = running_mean.lerp(mean, factor), running_var.lerp(unbiased, factor), batches + 1
    for buffer, value in zip((running_mean, running_var, batches), moved, strict=True):
        buffer.copy_(value)
    return y, new_h, new_c, tables, mask


def _norm_tables(z, tables, channel_dim):
    """The cell's part of ``tables``, and the norm's mean and rstd."""
    n, width = z.shape[0], channels(z, channel_dim)
    norm = n * width + 3 * width
    cell, _, shift, d, rstd = tables.split([tables.numel() - norm, n * width, width, width, width])
    return cell, shift + d, rstd


def _reference_tail_sums(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    """All of the tail's gradient but dz: ``(sums, dx, dshortcut, dp, dh, dc, of_parameters)``, x the norm's result."""
    *weights, channel_dim, relu, tanh_output, need_parameters, as_factors = rest
    parameters = _with_weights(weights)
    n, width, m = z.shape[0], channels(z, channel_dim), parameters.input_reduce_weight.shape[0]
    y = None if y is None else masks.as_result(y, z, channel_dim)
    cell, mean, rstd = _norm_tables(z, tables, channel_dim)
    p, trace = _unpack(cell, n, width, m, new_c, tanh_output)
    with torch.autocast(z.device.type, enabled=False):
        zn, x = reference.normalise(z, mean, rstd, gamma, beta, channel_dim)
        dx, *others, factors = reference.step_backward(
            None if dy is None else dy.to(x.dtype), dh, dc, x, y if relu else None, h, c, new_c, p, trace, parameters,
            channel_dim, _output(tanh_output),
        )  # fmt: skip
        of_parameters = _of_parameters(factors, p, trace, h, need_parameters, as_factors)
        return reference.norm_sums(dx, zn, channel_dim), dx, *others, of_parameters


def _reference_tail_backward(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *cell, batch, need_z, need_shortcut, need_state, need_parameters, need_affine, as_factors = rest
    channel_dim = cell[-3]
    sums, dx, dshortcut, _, dh, dc, of_parameters = _reference_tail_sums(
        dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *cell, need_parameters, as_factors
    )
    dz = z.new_empty(0)
    if need_z:
        _, mean, rstd = _norm_tables(z, tables, channel_dim)
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


def _reference_statistics(z, channel_dim):
    wide = z.double()
    return *reference.statistics(wide, channel_dim), reference.pool(wide, channel_dim)


def _reference_tail_reduce(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *cell, need_shortcut, need_state, need_parameters = rest
    sums, _, dshortcut, dp, dh, dc, of_parameters = _reference_tail_sums(
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


def _reference_tail_spread(dy, y, z, new_h, dp, tables, gamma, shares, channel_dim):
    _, mean, rstd = _norm_tables(z, tables, channel_dim)
    zn, _ = reference.normalise(z, mean, rstd, None, None, channel_dim)
    dx = reference.spread(dp, zn, channel_dim)
    if dy is not None:
        g = dy if y is None else reference.unrelu(dy, masks.as_result(y, z, channel_dim))
        dx = dx + g.to(zn.dtype) * broadcast(new_h, z, channel_dim)
    dz = reference.normalise_backward(dx, zn, rstd, gamma, channel_dim, shares)
    return _in_format(dz.to(z.dtype), z, channel_dim)


def _reference_pool(x, channel_dim):
    return reference.pool(x, channel_dim)


def _reference_rescale(x, scale, shortcut, channel_dim, relu):
    return _in_format(reference.rescale(x, scale, shortcut, channel_dim, relu), x, channel_dim)


def _reference_rescale_backward(dy, x, scale, y, channel_dim, need_x, need_scale, need_shortcut):
    dx, dscale, dshortcut = reference.rescale_backward(dy, x, scale, y, channel_dim)
    return (
        _in_format(dx.to(x.dtype), x, channel_dim) if need_x else x.new_empty(0),
        dscale if need_scale else scale.new_empty(0),
        _in_format(dshortcut, x, channel_dim) if need_shortcut else x.new_empty(0),
    )


# --- fakes: shapes, dtypes and strides of the results ----------------------------------------------


def _fake_step(x, shortcut, h, c, *rest):
    *parameters, channel_dim, relu, _tanh_output, keep_tables, keep_mask = rest
    n, width, m = x.shape[0], channels(x, channel_dim), parameters[0].shape[0]
    table = x.new_empty((n, width), dtype=compute_dtype(x.dtype))
    tables = table.new_empty(sum(table_sizes(n, width, m)) if keep_tables else 0)
    return empty_map(x, channel_dim), table, torch.empty_like(table), tables, _fake_mask(x, relu and keep_mask)


def _fake_mask(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(masks.size(x) if wanted else 0, dtype=torch.uint8)


def _fake_step_(x, shortcut, h, c, *rest):
    channel_dim = rest[-3]
    table = x.new_empty((x.shape[0], channels(x, channel_dim)), dtype=compute_dtype(x.dtype))
    return table, torch.empty_like(table)


def _fake_step_backward(dy, dh, dc, x, y, h, c, new_c, tables, *rest):
    *weights, channel_dim, _relu, _tanh_output, need_x, need_shortcut, need_state, need_parameters, as_factors = rest
    nothing = new_c.new_empty
    return (
        empty_map(x, channel_dim) if need_x else x.new_empty(0),
        empty_map(x, channel_dim) if need_shortcut else x.new_empty(0),
        nothing(new_c.shape if need_state else 0),
        nothing(new_c.shape if need_state else 0),
        _fake_of_parameters(new_c, weights[0], need_parameters, as_factors),
    )


def _fake_of_parameters(new_c: Tensor, weight: Tensor, wanted: bool, as_factors: bool) -> Tensor:
    if not wanted:
        return new_c.new_empty(0)
    m, c = weight.shape
    return new_c.new_empty(sum(factor_sizes(new_c.shape[0], c, m)) if as_factors else parameter_count(m, c))


def _fake_parameter_gradients(factors, tables, h, bottleneck):
    return h[0].new_empty(parameter_count(bottleneck, h[0].shape[1]))


def _fake_tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest):
    *parameters, channel_dim, relu, _tanh_output, keep_mask = rest
    n, width, m = z.shape[0], channels(z, channel_dim), parameters[0].shape[0]
    table = z.new_empty((n, width), dtype=compute_dtype(z.dtype))
    tables = table.new_empty(sum(table_sizes(n, width, m)) + n * width + 3 * width)
    own = 0 if mean is not None else width
    y, mask = empty_map(z, channel_dim), _fake_mask(z, relu and keep_mask)
    return y, table, torch.empty_like(table), tables, table.new_empty(own), table.new_empty(own), mask


def _fake_tail_tracking_(z, shortcut, h, c, gamma, beta, running_mean, running_var, batches, factor, eps, *rest):
    y, new_h, new_c, tables, *_, mask = _fake_tail(z, shortcut, h, c, gamma, beta, None, None, eps, *rest)
    return y, new_h, new_c, tables, mask


def _fake_tail_backward(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *weights, channel_dim, _relu, _tanh_output = rest[:-7]
    _batch, need_z, need_shortcut, need_state, need_parameters, need_affine, as_factors = rest[-7:]
    nothing, width = new_c.new_empty, channels(z, channel_dim)
    return (
        empty_map(z, channel_dim) if need_z else z.new_empty(0),
        empty_map(z, channel_dim) if need_shortcut else z.new_empty(0),
        *(nothing(new_c.shape if need_state else 0) for _ in range(2)),
        *(nothing(width if need_affine else 0) for _ in range(2)),
        _fake_of_parameters(new_c, weights[0], need_parameters, as_factors),
    )


def _fake_statistics(z, channel_dim):
    mean = z.new_empty(channels(z, channel_dim), dtype=torch.float64)
    return mean, torch.empty_like(mean), mean.new_empty((z.shape[0], len(mean)))


def _fake_tail_join(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest):
    y, new_h, new_c, tables, *_, mask = _fake_tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest)
    return y, new_h, new_c, tables, mask


def _fake_tail_reduce(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *weights, channel_dim, _relu, _tanh_output, need_shortcut, need_state, need_parameters = rest
    nothing = new_c.new_empty
    return (
        nothing((2, channels(z, channel_dim))),
        empty_map(z, channel_dim) if need_shortcut else z.new_empty(0),
        nothing(new_c.shape),
        *(nothing(new_c.shape if need_state else 0) for _ in range(2)),
        _fake_of_parameters(new_c, weights[0], need_parameters, False),
    )


def _fake_tail_spread(dy, y, z, new_h, dp, tables, gamma, shares, channel_dim):
    return empty_map(z, channel_dim)


def _fake_pool(x, channel_dim):
    return x.new_empty((x.shape[0], channels(x, channel_dim)), dtype=compute_dtype(x.dtype))


def _fake_rescale(x, scale, shortcut, channel_dim, relu):
    return empty_map(x, channel_dim)


def _fake_rescale_backward(dy, x, scale, y, channel_dim, need_x, need_scale, need_shortcut):
    return (
        empty_map(x, channel_dim) if need_x else x.new_empty(0),
        scale.new_empty(scale.shape if need_scale else 0),
        empty_map(x, channel_dim) if need_shortcut else x.new_empty(0),
    )


def _on_one_device(operator: Operator, fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, which refuses tensors on several devices.

    One tensor on "meta" brings a call here. With x elsewhere the results would be real tensors that nobody has filled.
    """
    names = [argument.name for argument in operator._schema.arguments]

    def checked(*args):
        lists = ((name, arg if isinstance(arg, list) else [arg]) for name, arg in zip(names, args, strict=False))
        tensors = [(name, t) for name, of in lists for t in of if isinstance(t, Tensor)]
        first, device = tensors[0][0], tensors[0][1].device
        for name, t in tensors:
            if t.device != device:
                raise RuntimeError(f"dia_kernels: {name}: on {t.device}, but {first} on {device}")
        return fake(*args)

    return checked


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "step": (_reference_step, _fake_step),
    "step_": (_reference_step_, _fake_step_),
    "step_backward": (_reference_step_backward, _fake_step_backward),
    "tail": (_reference_tail, _fake_tail),
    "tail_tracking_": (_reference_tail_tracking_, _fake_tail_tracking_),
    "tail_backward": (_reference_tail_backward, _fake_tail_backward),
    "parameter_gradients": (_reference_parameter_gradients, _fake_parameter_gradients),
    "statistics": (_reference_statistics, _fake_statistics),
    "tail_join": (_reference_tail_join, _fake_tail_join),
    "tail_reduce": (_reference_tail_reduce, _fake_tail_reduce),
    "tail_spread": (_reference_tail_spread, _fake_tail_spread),
    "pool": (_reference_pool, _fake_pool),
    "rescale": (_reference_rescale, _fake_rescale),
    "rescale_backward": (_reference_rescale_backward, _fake_rescale_backward),
}


class Operators:
    """The operators of one implementer: an attribute for each name in ``SCHEMAS``, ``dia_kernels::<name><suffix>``.

    Each has a fake, and behind every device without a kernel of its own the reference.
    """

    step: Operator
    step_: Operator
    step_backward: Operator
    tail: Operator
    tail_tracking_: Operator
    tail_backward: Operator
    parameter_gradients: Operator
    statistics: Operator
    tail_join: Operator
    tail_reduce: Operator
    tail_spread: Operator
    pool: Operator
    rescale: Operator
    rescale_backward: Operator

    def __init__(self, suffix: str) -> None:
        """Defines the operators; once for each suffix."""
        self.suffix = suffix
        #: By the type of a device, dtypes of the maps whose ReLU leaves a mask for its gradient.
        self.masked_dtypes: dict[str, frozenset[torch.dtype]] = {}
        for name, schema in SCHEMAS.items():
            # Any strides are right: without flexible_layout the inductor copies channels_last maps to and fro around
            # each call.
            library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
            kernel, fake = _KERNELS[name]
            library.impl(name + suffix, kernel, "CompositeExplicitAutograd")
            setattr(self, name, getattr(torch.ops.dia_kernels, name + suffix).default)
            checked = _on_one_device(getattr(self, name), fake)
            torch.library.register_fake(f"{NAMESPACE}::{name}{suffix}", checked, lib=library)
        library.impl("step_" + suffix, partial(_step_in_place_version, self.step_), "ADInplaceOrView", with_keyset=True)

    def __repr__(self) -> str:
        return f"Operators({self.suffix!r})"


def _step_in_place_version(step_: Operator, keyset, x, *args):
    """Refuses what may not be written over; tells autograd that the rest was written into.

    Raises:
        RuntimeError: a gradient is to flow, or several elements of ``x`` share memory.
    """
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *args)):
        raise RuntimeError("dia_kernels: step_ writes over x and records no gradient; call it under torch.no_grad()")
    if shares_memory(x):
        raise RuntimeError("dia_kernels: x: an expanded tensor, several of its elements share memory")
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = step_.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, x, *args)
    torch.autograd.graph.increment_version(x)
    return result


#: Those that the native library implements.
native = Operators("")
#: Those that nobody implements: the reference, on every device and in every dtype.
plain = Operators("_plain")


# --- the native library ----------------------------------------------------------------------------

LIBRARY_PATH = Path(__file__).parent / "lib" / "libdia_kernels.so"


def _load_library() -> str | None:
    """Loads the native library. Returns None, or the sentence that says why it is not there."""
    if not LIBRARY_PATH.exists():
        return "the native library was not built (DIA_KERNELS_BUILD=none, or no compiler at install)"
    try:
        torch.ops.load_library(LIBRARY_PATH)
    except OSError as error:
        reason = f"the native library does not load: {error}"
        warnings.warn(f"dia_kernels runs its slow reference path: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


#: None when the native library is loaded, else why it is not.
library_error: str | None = _load_library()
#: Whether the native library is loaded and holds the kernels for CUDA.
library_has_cuda: bool = library_error is None and hasattr(ctypes.CDLL(str(LIBRARY_PATH)), "dia_kernels_gpu_layouts")

#: A mask has a byte for eight values: a GPU's access of sixteen bytes, if they are of 16 bits.
GPU_MASKED_DTYPES = frozenset((torch.float16, torch.bfloat16))
if library_has_cuda:
    native.masked_dtypes["cuda"] = GPU_MASKED_DTYPES
