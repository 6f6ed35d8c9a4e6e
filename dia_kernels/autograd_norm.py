"""Pooling and rescaling behind a norm that is folded into them, for cells that no operator computes.

``p = mean(norm(z))``, a cell of any kind, ``y = act(norm(z) * scale + shortcut)``: two autograd Functions, one before
the cell and one behind it. Their gradients take two sweeps over the map, as a tail's does. The first is the
rescaling's: it gives the gradients of scale and shortcut, and leaves to the pooling what it has for z and the norm. The
pooling makes these for both in the second, when dp has come back through the cell. The engine runs a node after all
that used its results, and ``tables`` makes the rescaling one of these.

For plain calls only (``autograd.is_plain``). A gradient that is to be differentiated again, and one of a graph that
compiled autograd traces, goes through the reference, each Function's by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import masks, reference
from .autograd import Left, below_autograd, current_pass, derivative, keeps_mask, saved_tensors, wants_gradient
from .layout import broadcast
from .norms import Folded, Tracked
from .operators import Operators
from .tables import norm_parts


class Normed(NamedTuple):
    """What a rescaling needs of a folded norm, beside its map."""

    tables: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    #: Whether the statistics are those of the map itself.
    batch: bool


def _normalised(z: Tensor, normed: Normed, channel_dim: int) -> Tensor:
    """The norm of ``z`` by the reference, in the compute dtype; a function of ``z`` through its statistics too."""
    if normed.batch:
        mean, var = reference.statistics(z, channel_dim)
        rstd = (var + normed.eps).rsqrt()
    else:
        _, _, mean, rstd = norm_parts(z, normed.tables.detach(), channel_dim)
    return reference.normalise(z, mean, rstd, normed.gamma, normed.beta, channel_dim)[1]


class NormPool(Function):
    """``operators.norm_pool``, or ``norm_pool_tracking_`` where ``tracked`` is given."""

    @staticmethod
    def forward(ctx, ops, z, gamma, beta, mean, var, eps, channel_dim, tracked):
        with below_autograd():
            p, tables, *statistics = _pool(ops, z, gamma, beta, mean, var, eps, channel_dim, tracked)
        ctx.ops, ctx.eps, ctx.channel_dim, ctx.batch = ops, eps, channel_dim, mean is None
        ctx.left = {}
        ctx.save_for_backward(z, gamma, beta, tables)
        ctx.mark_non_differentiable(*(t for t in statistics if t is not None))
        ctx.set_materialize_grads(False)
        return p, tables, *statistics

    @staticmethod
    def backward(ctx, dp, *_):
        left = ctx.left.pop(current_pass(), None)
        grads = _own_gradients(ctx, dp) if left is None else _second_sweep(ctx, dp, left)
        found = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[1:4], strict=True))
        return None, *found, *(None,) * 5


def _second_sweep(ctx, dp: Tensor | None, left: Left) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, gamma and beta through pooling and rescaling."""
    z, gamma, _, tables = saved_tensors(ctx)
    dy, y, scale, sums = left.tensors
    left.used_here()
    grads: tuple[Tensor, Tensor, Tensor] = ctx.ops.norm_pool_backward(
        dy,
        y,
        z,
        scale,
        torch.zeros_like(sums[0]) if dp is None else dp,
        sums,
        tables,
        gamma,
        ctx.channel_dim,
        ctx.batch,
        ctx.needs_input_grad[1],
    )
    return grads


def _own_gradients(ctx, dp: Tensor | None) -> tuple:
    """Gradients of z, gamma and beta through the pooling alone, differentiable."""
    z, gamma, beta, tables = saved_tensors(ctx)

    def pool(z, gamma, beta):
        normed = Normed(tables, gamma, beta, ctx.eps, ctx.batch)
        return (reference.pool(_normalised(z, normed, ctx.channel_dim), ctx.channel_dim),)

    return derivative(pool, (z, gamma, beta), (dp,))


class NormRescale(Function):
    """``operators.norm_rescale``."""

    @staticmethod
    def forward(ctx, ops, z, scale, shortcut, tables, gamma, beta, eps, batch, channel_dim, relu):
        keep_mask = relu and keeps_mask(ops, z, channel_dim)
        with below_autograd():
            y, mask = ops.norm_rescale(z, scale, shortcut, tables, gamma, beta, channel_dim, relu, keep_mask)
        ctx.ops, ctx.eps, ctx.batch, ctx.channel_dim, ctx.relu = ops, eps, batch, channel_dim, relu
        ctx.pooled = tables.grad_fn
        ctx.save_for_backward(z, scale, mask if keep_mask else y if relu else None, tables, gamma, beta)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 11
        number = None if torch.is_grad_enabled() else current_pass()
        dz = dgamma = dbeta = None
        if number is None:
            dz, dscale, dshortcut, dgamma, dbeta = _differentiable_gradients(ctx, dy)
        else:
            dscale, dshortcut = _first_sweep(ctx, dy, number)
        grads = (None, dz, dscale, dshortcut, None, dgamma, dbeta, *(None,) * 4)
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


def _first_sweep(ctx, dy: Tensor, number: int) -> tuple[Tensor | None, Tensor]:
    """Gradients of scale and shortcut. The rest is left to the pooling, if the pass of this number comes by it."""
    z, scale, y, tables, gamma, beta = saved_tensors(ctx)
    need_scale, masked = ctx.needs_input_grad[2], ctx.needs_input_grad[3] and ctx.relu
    need_z = ctx.pooled is not None and torch._C._will_engine_execute_node(ctx.pooled)
    if not (need_z or need_scale or masked):
        return None, dy
    dscale, sums, g = ctx.ops.norm_rescale_backward(dy, y, z, tables, gamma, beta, ctx.channel_dim, masked)
    if need_z:
        # dy itself, not an alias of it: whoever else holds it sees from the count of references that it may not be
        # written into.
        own = dy.detach() if dy.requires_grad else dy
        source, mask = (g, None) if masked else (own, None if y is None else y.detach())
        ctx.pooled.left[number] = Left(source, mask, scale.detach(), sums)
    return dscale, g if masked else dy


def _differentiable_gradients(ctx, dy: Tensor) -> tuple:
    """Gradients of z, scale, shortcut, gamma and beta with a graph of their own; the ReLU's mask is a constant."""
    z, scale, y, tables, gamma, beta = saved_tensors(ctx)

    def before_relu(z, scale, gamma, beta):
        x = _normalised(z, Normed(tables, gamma, beta, ctx.eps, ctx.batch), ctx.channel_dim)
        return ((x * broadcast(scale, z, ctx.channel_dim)).to(z.dtype),)

    g = dy if y is None else reference.unrelu(dy, masks.as_result(y, z, ctx.channel_dim))
    dz, dscale, dgamma, dbeta = derivative(before_relu, (z, scale, gamma, beta), (g,))
    return dz, dscale, g, dgamma, dbeta


def _pool(ops, z, gamma, beta, mean, var, eps, channel_dim, tracked):
    if tracked is None:
        return ops.norm_pool(z, gamma, beta, mean, var, eps, channel_dim)
    return *ops.norm_pool_tracking_(z, gamma, beta, *tracked.buffers, tracked.factor, eps, channel_dim), None, None


def pool(
    ops: Operators, z: Tensor, folded: Folded, channel_dim: int, tracked: Tracked | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Normed]:
    """``(p, statistics, normed)``: the mean of each channel behind a norm, and what its rescaling needs.

    ``statistics``: mean and biased variance of the batch, where the norm takes them; None with ``tracked``, whose
    buffers are moved.
    """
    gamma, beta, mean, var, eps = folded[:5]
    args = (ops, z, gamma, beta, mean, var, eps, channel_dim, tracked)
    if wants_gradient(z, gamma, beta):
        p, tables, *statistics = super(Function, NormPool).apply(*args)
    else:
        with below_autograd():
            p, tables, *statistics = _pool(*args)
    if tracked is not None:
        torch.autograd.graph.increment_version(tracked.buffers)
    own = None if mean is not None or tracked is not None else tuple(statistics)
    return p, own, Normed(tables, gamma, beta, eps, mean is None)


def rescale(
    ops: Operators, z: Tensor, scale: Tensor, shortcut: Tensor | None, normed: Normed, channel_dim: int, relu: bool
) -> Tensor:
    """``act(norm(z) * scale + shortcut)`` with the norm of ``pool``."""
    y: Tensor
    if wants_gradient(z, scale, shortcut, normed.tables, normed.gamma, normed.beta):
        return super(Function, NormRescale).apply(ops, z, scale, shortcut, *normed, channel_dim, relu)
    with below_autograd():
        y, _ = ops.norm_rescale(z, scale, shortcut, normed.tables, normed.gamma, normed.beta, channel_dim, relu, False)
    return y
