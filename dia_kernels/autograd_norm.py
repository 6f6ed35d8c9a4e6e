"""Pooling and rescaling behind a norm that is folded into them, for cells that no operator computes.

``p = mean(norm(z))``, a cell of any kind, ``y = act(norm(z) * scale + shortcut)``: two nodes of the graph, one before
the cell and one behind it, and z goes into both. Their gradients take two sweeps over the map, as a tail's do. The
first is the rescaling's: it makes the gradients of scale and shortcut, and gives none to z and the norm. What it has
for these it hands on to the pooling, as gradients of two tokens that came from there; and the pooling makes those of z,
gamma and beta through both in the second sweep, when dp has come back through the cell.

A gradient that is to be differentiated again goes through the reference: each node gives its own. So it is in compiled
autograd, which knows no node that gives no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import masks, operators, reference
from .autograd import (
    below_autograd,
    current_pass,
    derivative,
    give_gradient,
    keeps_mask,
    saved_tensors,
    wants_gradient,
)
from .layout import broadcast
from .norms import Folded, Tracked
from .operators import Operators
from .tables import norm_parts


class Normed(NamedTuple):
    """What a rescaling needs of a folded norm, beside its map."""

    tables: Tensor
    tokens: tuple[Tensor, Tensor] | tuple[None, None]
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    #: Whether the statistics are those of the map itself.
    batch: bool


def _by_themselves() -> bool:
    """Whether in a backward pass each node gives its own gradients."""
    return torch.is_grad_enabled() or current_pass() is None


def _normalised(ctx, z: Tensor, tables: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """The norm of ``z`` by the reference, in the compute dtype; a function of ``z`` through its statistics too."""
    if ctx.batch:
        mean, var = reference.statistics(z, ctx.channel_dim)
        rstd = (var + ctx.eps).rsqrt()
    else:
        *_, mean, rstd = norm_parts(z, tables.detach(), ctx.channel_dim)
    return reference.normalise(z, mean, rstd, gamma, beta, ctx.channel_dim)[1]


# --- pool ------------------------------------------------------------------------------------------
# Arguments: z, gamma, beta, mean, var, eps, channel_dim, with_variance, with_extreme, keep_tokens. Or, of the operator
# that moves buffers, the same with its ``Tracked`` and None in place of mean and var.


def _pool_context(ctx, inputs, output) -> None:
    ctx.ops, z, gamma, beta, mean, _, ctx.eps, ctx.channel_dim, with_variance, with_extreme, _ = inputs
    ctx.batch = not isinstance(mean, Tensor)
    variance, extreme, where = output[4:7]
    of_extreme = (extreme, where) if with_extreme else (None, None)
    ctx.save_for_backward(z, gamma, beta, output[1], variance if with_variance else None, *of_extreme)


def _pool_gradients(ctx, grads: tuple, need: tuple, saved: tuple) -> tuple:
    """Gradients of the inputs of ``norm_pool`` from those of its results."""
    dp, _, g, handed, dvariance, dextreme, *_ = grads
    z, gamma, _, tables, variance, extreme, where = saved
    statistics = (
        torch.zeros_like(handed[0]) if dp is None else dp,
        *((None, None) if variance is None else (dvariance, variance)),
        *((None, None, None) if extreme is None else (dextreme, extreme, where)),
    )
    grads = ctx.ops.norm_pool_backward(g, handed, *statistics, z, tables, gamma, ctx.channel_dim, ctx.batch, need[0])
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=False)), *(None,) * 7


class NormPool(Function):
    """``operators.norm_pool``, or ``norm_pool_tracking_`` where a ``Tracked`` lies in place of the statistics."""

    @staticmethod
    def forward(ctx, *args):
        with below_autograd():
            output = _call_pool(*args)
        _pool_context(ctx, args, output)
        ctx.mark_non_differentiable(output[1], *output[6:], *(t for t in output[4:6] if t.numel() == 0))
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, *grads):
        if grads[3] is not None and not _by_themselves():
            return None, *_pool_gradients(ctx, grads, ctx.needs_input_grad[1:], saved_tensors(ctx))
        z, gamma, beta, tables, variance, extreme, where = saved_tensors(ctx)

        def pool(z, gamma, beta):
            p = reference.pool(_normalised(ctx, z, tables, gamma, beta), ctx.channel_dim)
            zn = _normalised(ctx, z, tables, None, None)
            variances = None if variance is None else reference.variance(zn, ctx.channel_dim).double()
            return p, variances, None if extreme is None else reference.at_positions(zn, where, ctx.channel_dim)

        return None, *derivative(pool, (z, gamma, beta), (grads[0], *grads[4:6])), *(None,) * 7


def _call_pool(ops: Operators, z, gamma, beta, mean, var, *rest) -> tuple:
    if isinstance(mean, Tracked):
        return ops.norm_pool_tracking_(z, gamma, beta, *mean.buffers, mean.factor, *rest)
    return ops.norm_pool(z, gamma, beta, mean, var, *rest)


class Pooled(NamedTuple):
    """Statistics of a map behind a norm, (N, C) each: the mean and, where they are wanted, of the norm's result before
    its affine the unbiased variance (in float64), and the value that the affine makes the largest."""

    p: Tensor
    variance: Tensor
    extreme: Tensor


def pool(
    ops: Operators,
    z: Tensor,
    folded: Folded,
    channel_dim: int,
    with_variance: bool,
    with_extreme: bool,
    tracked: Tracked | None,
) -> tuple[Pooled, tuple[Tensor, Tensor] | None, Normed]:
    """``(pooled, statistics, normed)``: what a cell wants to know of a map behind a norm, and what its rescaling needs.

    ``statistics``: mean and biased variance of the batch, where the norm takes them; None with ``tracked``, whose
    buffers are moved.
    """
    gamma, beta, mean, var, eps = folded[:5]
    recorded = wants_gradient(z, gamma, beta)
    statistics = (mean, var) if tracked is None else (tracked, None)
    args = (ops, z, gamma, beta, *statistics, eps, channel_dim, with_variance, with_extreme, recorded)
    if torch.compiler.is_compiling():
        p, tables, *results = _call_pool(*args)
    elif recorded:
        p, tables, *results = super(Function, NormPool).apply(*args)
    else:
        with below_autograd():
            p, tables, *results = _call_pool(*args)
    if tracked is not None:
        torch.autograd.graph.increment_version(tracked.buffers)
    own = None
    if mean is None and tracked is None:
        # For buffers, where no gradient may flow to, which the raw operator does not know.
        own = (results[5].detach(), results[6].detach())
    tokens = (results[0], results[1]) if recorded else (None, None)
    return Pooled(p, results[2], results[3]), own, Normed(tables, tokens, gamma, beta, eps, mean is None)


# --- rescale ---------------------------------------------------------------------------------------
# Arguments: z, scale, shortcut, tables, token_of_g, token_of_handed, gamma, beta, channel_dim, relu, keep_mask; the
# Function's go on with eps and batch, which its second derivatives need.


def _rescale_context(ctx, inputs, output) -> None:
    ctx.ops, z, scale, _, tables, _, _, gamma, beta, ctx.channel_dim, ctx.relu, keep_mask = inputs
    y, mask = output
    ctx.save_for_backward(z, scale, mask if keep_mask else y if ctx.relu else None, tables, gamma, beta)


def _rescale_gradients(ctx, dy, need: tuple, saved: tuple) -> tuple:
    """Gradients of the inputs of ``norm_rescale``: none of z, gamma and beta, but of the tokens."""
    z, scale, y, tables, gamma, beta = saved
    _, need_scale, need_shortcut, _, need_g, *_ = need
    masked = ctx.relu and (need_shortcut or need_g)
    dscale = handed = g = None
    if need_scale or need_g or masked:
        dscale, handed, g = ctx.ops.norm_rescale_backward(dy, y, z, scale, tables, gamma, beta, ctx.channel_dim, masked)
    g = g if ctx.relu else dy
    return (
        None,
        dscale if need_scale else None,
        g if need_shortcut else None,
        None,
        g if need_g else None,
        handed if need_g else None,
        *(None,) * 5,
    )


class NormRescale(Function):
    """``operators.norm_rescale``."""

    @staticmethod
    def forward(ctx, *args):
        with below_autograd():
            output = args[0].norm_rescale(*args[1:-2])
        _rescale_context(ctx, args[:-2], output)
        ctx.eps, ctx.batch = args[-2:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 14
        if not _by_themselves():
            return None, *_rescale_gradients(ctx, dy, ctx.needs_input_grad[1:], saved_tensors(ctx)), None, None
        dz, dscale, dshortcut, dgamma, dbeta = _differentiable_gradients(ctx, dy)
        grads = (None, dz, dscale, dshortcut, None, None, None, dgamma, dbeta, *(None,) * 5)
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


def _differentiable_gradients(ctx, dy: Tensor) -> tuple:
    """Gradients of z, scale, shortcut, gamma and beta with a graph of their own; the ReLU's mask is a constant."""
    z, scale, y, tables, gamma, beta = saved_tensors(ctx)

    def before_relu(z, scale, gamma, beta):
        x = _normalised(ctx, z, tables, gamma, beta)
        return ((x * broadcast(scale, z, ctx.channel_dim)).to(z.dtype),)

    g = dy if y is None else reference.unrelu(dy, masks.as_result(y, z, ctx.channel_dim))
    dz, dscale, dgamma, dbeta = derivative(before_relu, (z, scale, gamma, beta), (g,))
    return dz, dscale, g, dgamma, dbeta


def rescale(
    ops: Operators, z: Tensor, scale: Tensor, shortcut: Tensor | None, normed: Normed, channel_dim: int, relu: bool
) -> Tensor:
    """``act(norm(z) * scale + shortcut)`` with the norm of ``pool``."""
    tables, tokens, gamma, beta, eps, batch = normed
    recorded = wants_gradient(z, scale, shortcut, gamma, beta)
    keep_mask = recorded and relu and keeps_mask(ops, z, channel_dim)
    args = (z, scale, shortcut, tables, *tokens, gamma, beta, channel_dim, relu, keep_mask)
    y: Tensor
    if torch.compiler.is_compiling():
        y, _ = ops.norm_rescale(*args)
    elif recorded:
        y, _ = super(Function, NormRescale).apply(ops, *args, eps, batch)
    else:
        with below_autograd():
            y, _ = ops.norm_rescale(*args)
    return y


# --- compiled --------------------------------------------------------------------------------------


def register(ops: Operators) -> None:
    """Gives the raw operators their gradients."""
    give_gradient(
        ops,
        "norm_pool",
        _pool_context,
        lambda ctx, *grads: _pool_gradients(ctx, grads, ctx.needs_input_grad, ctx.saved_tensors),
    )
    give_gradient(
        ops,
        "norm_rescale",
        _rescale_context,
        lambda ctx, dy, _: _rescale_gradients(ctx, dy, ctx.needs_input_grad, ctx.saved_tensors),
    )


register(operators.native)
register(operators.plain)
