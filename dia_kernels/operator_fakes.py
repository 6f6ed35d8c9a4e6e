"""Shapes, dtypes and strides of the operators' results, on fake tensors and on ``meta``.

One function for each schema, with its arguments (``operators``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import masks
from .cells import parameter_count
from .layout import channels, compute_dtype, empty_map
from .tables import factor_sizes, norm_table_size, norm_tokens, table_sizes


def step(x, shortcut, h, c, *rest):
    *parameters, channel_dim, relu, _tanh_output, keep_tables, keep_mask = rest
    n, width, m = x.shape[0], channels(x, channel_dim), parameters[0].shape[0]
    table = x.new_empty((n, width), dtype=compute_dtype(x.dtype))
    tables = table.new_empty(sum(table_sizes(n, width, m)) if keep_tables else 0)
    return empty_map(x, channel_dim), table, torch.empty_like(table), tables, _mask(x, relu and keep_mask)


def _mask(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(masks.size(x) if wanted else 0, dtype=torch.uint8)


def step_(x, shortcut, h, c, *rest):
    channel_dim = rest[-3]
    table = x.new_empty((x.shape[0], channels(x, channel_dim)), dtype=compute_dtype(x.dtype))
    return table, torch.empty_like(table)


def step_backward(dy, dh, dc, x, y, h, c, new_c, tables, *rest):
    *weights, channel_dim, _relu, _tanh_output, need_x, need_shortcut, need_state, need_parameters, as_factors = rest
    nothing = new_c.new_empty
    return (
        empty_map(x, channel_dim) if need_x else x.new_empty(0),
        empty_map(x, channel_dim) if need_shortcut else x.new_empty(0),
        nothing(new_c.shape if need_state else 0),
        nothing(new_c.shape if need_state else 0),
        _of_parameters(new_c, weights[0], need_parameters, as_factors),
    )


def _of_parameters(new_c: Tensor, weight: Tensor, wanted: bool, as_factors: bool) -> Tensor:
    if not wanted:
        return new_c.new_empty(0)
    m, c = weight.shape
    return new_c.new_empty(sum(factor_sizes(new_c.shape[0], c, m)) if as_factors else parameter_count(m, c))


def parameter_gradients(factors, tables, h, bottleneck):
    return h[0].new_empty(parameter_count(bottleneck, h[0].shape[1]))


def tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest):
    *parameters, channel_dim, relu, _tanh_output, keep_mask = rest
    n, width, m = z.shape[0], channels(z, channel_dim), parameters[0].shape[0]
    table = z.new_empty((n, width), dtype=compute_dtype(z.dtype))
    tables = table.new_empty(sum(table_sizes(n, width, m)) + norm_table_size(n, width))
    own = 0 if mean is not None else width
    y, mask = empty_map(z, channel_dim), _mask(z, relu and keep_mask)
    return y, table, torch.empty_like(table), tables, table.new_empty(own), table.new_empty(own), mask


def tail_tracking_(z, shortcut, h, c, gamma, beta, running_mean, running_var, batches, factor, eps, *rest):
    y, new_h, new_c, tables, *_, mask = tail(z, shortcut, h, c, gamma, beta, None, None, eps, *rest)
    return y, new_h, new_c, tables, mask


def tail_backward(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *weights, channel_dim, _relu, _tanh_output = rest[:-7]
    _batch, need_z, need_shortcut, need_state, need_parameters, need_affine, as_factors = rest[-7:]
    nothing, width = new_c.new_empty, channels(z, channel_dim)
    return (
        empty_map(z, channel_dim) if need_z else z.new_empty(0),
        empty_map(z, channel_dim) if need_shortcut else z.new_empty(0),
        *(nothing(new_c.shape if need_state else 0) for _ in range(2)),
        *(nothing(width if need_affine else 0) for _ in range(2)),
        _of_parameters(new_c, weights[0], need_parameters, as_factors),
    )


def statistics(z, channel_dim):
    mean = z.new_empty(channels(z, channel_dim), dtype=torch.float64)
    return mean, torch.empty_like(mean), mean.new_empty((z.shape[0], len(mean)))


def tail_join(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest):
    y, new_h, new_c, tables, *_, mask = tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest)
    return y, new_h, new_c, tables, mask


def tail_reduce(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *weights, channel_dim, _relu, _tanh_output, need_shortcut, need_state, need_parameters = rest
    nothing = new_c.new_empty
    return (
        nothing((2, channels(z, channel_dim))),
        empty_map(z, channel_dim) if need_shortcut else z.new_empty(0),
        nothing(new_c.shape),
        *(nothing(new_c.shape if need_state else 0) for _ in range(2)),
        _of_parameters(new_c, weights[0], need_parameters, False),
    )


def tail_spread(dy, y, z, new_h, dp, tables, gamma, shares, channel_dim):
    return empty_map(z, channel_dim)


def norm_pool(z, gamma, beta, mean, var, eps, channel_dim, with_variance, with_extreme, keep_tokens):
    n, width = z.shape[0], channels(z, channel_dim)
    p = z.new_empty((n, width), dtype=compute_dtype(z.dtype))
    own = 0 if mean is not None else width
    tokens = norm_tokens(z, p, keep_tokens)
    statistics = (
        p.new_empty(p.shape if with_variance else 0, dtype=torch.float64),
        p.new_empty(p.shape if with_extreme else 0),
        p.new_empty(p.shape if with_extreme else 0, dtype=torch.int64),
    )
    tables = p.new_empty(norm_table_size(n, width))
    return p, tables, *tokens, *statistics, p.new_empty(own), p.new_empty(own)


def norm_pool_tracking_(z, gamma, beta, running_mean, running_var, batches, factor, eps, *rest):
    return norm_pool(z, gamma, beta, None, None, eps, *rest)[:7]


def norm_pool_backward(g, handed, dp, dvariance, variance, dextreme, extreme, where, z, *rest):
    *_, channel_dim, _batch, need_z = rest
    width = channels(z, channel_dim)
    return empty_map(z, channel_dim) if need_z else z.new_empty(0), dp.new_empty(width), dp.new_empty(width)


def norm_rescale(z, scale, shortcut, tables, token_of_g, token_of_handed, gamma, beta, channel_dim, relu, keep_mask):
    return empty_map(z, channel_dim), _mask(z, relu and keep_mask)


def norm_rescale_backward(dy, y, z, scale, tables, gamma, beta, channel_dim, need_g):
    g = empty_map(z, channel_dim) if need_g else z.new_empty(0)
    return scale.new_empty(scale.shape), scale.new_empty((3, *scale.shape)), g


def pool(x, channel_dim):
    return x.new_empty((x.shape[0], channels(x, channel_dim)), dtype=compute_dtype(x.dtype))


def rescale(x, scale, shortcut, channel_dim, relu):
    return empty_map(x, channel_dim)


def rescale_backward(dy, x, scale, y, channel_dim, need_x, need_scale, need_shortcut):
    return (
        empty_map(x, channel_dim) if need_x else x.new_empty(0),
        scale.new_empty(scale.shape if need_scale else 0),
        empty_map(x, channel_dim) if need_shortcut else x.new_empty(0),
    )
