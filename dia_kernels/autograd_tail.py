"""The autograd Functions of the tail with its batch norm folded in, under the rule of ``autograd``.

Arguments: the operators, z, shortcut, h, c, gamma, beta, mean, var, eps, the eight parameters, channel_dim, relu,
tanh_output, keep_mask.
Statistics that are given are constants; the batch's own are functions of z, and the gradient knows it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import masks, operators, reference
from .autograd import (
    derivative,
    differentiable,
    for_each_parameter,
    give_gradient,
    join_if_any,
    keeps_mask,
    route,
    run,
    saved_tensors,
    wants_gradient,
)
from .cells import LSTMParameters
from .norms import Tracked
from .operators import Operators


def _reference_tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest):
    """``operators.tail`` through plain, differentiable ATen; its tables are left empty."""
    *parameters, channel_dim, relu, tanh_output, _ = rest
    y, h, c, mean, var = reference.tail(
        z, shortcut, h, c, gamma, beta, mean, var, eps, LSTMParameters(*parameters), channel_dim, relu,
        "tanh" if tanh_output else "sigmoid",
    )  # fmt: skip
    return y, h, c, h.new_empty(0), mean.detach(), var.detach(), h.new_empty(0)


def _reference_tail_backward(dy, dh, dc, z, y, h, c, gamma, beta, mean, var, parameters, eps, flags):
    """Gradients of z, shortcut, h, c, gamma, beta and, in one, of the parameters, differentiable in every argument."""
    channel_dim, _relu, tanh_output, _batch = flags

    def before_relu(z, h, c, gamma, beta, *parameters):
        return _reference_tail(
            z, None, h, c, gamma, beta, mean, var, eps, *parameters, channel_dim, False, tanh_output, False
        )[:3]

    g = dy if dy is None or y is None else reference.unrelu(dy, masks.as_result(y, z, channel_dim))
    inputs = (z, h, c, gamma, beta, *parameters)
    dz, dh, dc, dgamma, dbeta, *dparameters = derivative(before_relu, inputs, (g, dh, dc))
    return dz, None if y is None else g, dh, dc, dgamma, dbeta, join_if_any(dparameters)


def _context(ctx, inputs, output) -> None:
    ctx.ops, z, _, h, c, gamma, beta, mean, var, eps, *rest = inputs
    *parameters, channel_dim, relu, tanh_output, keep_mask = rest
    y, _, new_c, tables, *_, mask = output
    ctx.save_for_backward(
        z, mask if keep_mask else y if relu else None, h, c, new_c, tables, gamma, beta, mean, var, *parameters
    )
    ctx.flags = (channel_dim, relu, tanh_output, mean is None)
    ctx.eps = eps


def _gradients(ctx, grads, need: tuple, backward, saved: tuple) -> tuple:
    """Gradients of the inputs before the parameters, and theirs in one; ``backward`` computes those asked for."""
    dy, dh, dc, *_ = grads
    z, y, h, c, new_c, tables, gamma, beta, mean, var, *parameters = saved
    _, relu, *_ = ctx.flags
    need_state, need_affine, need_parameters = need[2] or need[3], need[4] or need[5], need[9]
    asked = (need[0], need[1] and relu and dy is not None, need_state, need_parameters, need_affine)
    dz = dshortcut = dgamma = dbeta = flat = None
    if any(asked):
        dz, dshortcut, dh, dc, dgamma, dbeta, flat = backward(
            ctx.ops,
            dy,
            dh,
            dc,
            z,
            y,
            h,
            c,
            new_c,
            tables,
            gamma,
            beta,
            mean,
            var,
            *parameters,
            ctx.eps,
            *ctx.flags,
            *asked,
        )
    return (
        dz if need[0] else None,
        (dshortcut if relu else dy) if need[1] and dy is not None else None,
        dh if need[2] else None,
        dc if need[3] else None,
        dgamma if need[4] else None,
        dbeta if need[5] else None,
        None,
        None,
        None,
        flat if need_parameters else None,
    )


def _formula(ctx, grads, backward, saved: tuple) -> tuple:
    """Gradients of the inputs of the operator."""

    def gradients(need):
        return _gradients(ctx, grads, need, backward, saved)

    return for_each_parameter(gradients, ctx.needs_input_grad[-21:], 9, saved[-8])


def _raw_backward(ops, dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, mean, var, *rest, as_factors=False):
    """The operator: it reads only the weights of the eight parameters, and the statistics from the tables."""
    parameters, flags = rest[:8], rest[9:]
    return ops.tail_backward(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *parameters[::2], *flags, as_factors)


_factors = partial(_raw_backward, as_factors=True)


class TailBackward(Function):
    """``operators.tail_backward`` (with all eight parameters), differentiable through the reference."""

    @staticmethod
    def forward(*args):
        return _raw_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:22])
        ctx.eps, ctx.flags, ctx.asked = inputs[22], inputs[23:27], inputs[27:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        dy, dh, dc, z, y, h, c, _new_c, _tables, gamma, beta, mean, var, *parameters = saved_tensors(ctx)

        def function(dy, dh, dc, z, h, c, gamma, beta, *parameters):
            return _reference_tail_backward(
                dy, dh, dc, z, y, h, c, gamma, beta, mean, var, parameters, ctx.eps, ctx.flags
            )

        need_z, need_shortcut, need_state, need_parameters, need_affine = ctx.asked
        kept = (need_z, need_shortcut, need_state, need_state, need_affine, need_affine, need_parameters)
        grads = tuple(grad if keep else None for grad, keep in zip(grads, kept, strict=True))
        inputs = (dy, dh, dc, z, h, c, gamma, beta, *parameters)
        ddy, ddh, ddc, dz, dhp, dcp, dgamma, dbeta, *dparameters = derivative(function, inputs, grads)
        return (
            *(None, ddy, ddh, ddc, dz, None, dhp, dcp, None, None, dgamma, dbeta, None, None),
            *dparameters,
            *(None,) * 10,
        )

    @staticmethod
    def vmap(info, in_dims, _ops, *args):
        eps, flags = args[21], args[22:26]

        def function(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, mean, var, *parameters):
            outputs = _reference_tail_backward(dy, dh, dc, z, y, h, c, gamma, beta, mean, var, parameters, eps, flags)
            return tuple(new_c.new_zeros(()) if out is None else out for out in outputs)

        return torch.func.vmap(function, in_dims[1:22])(*args[:21]), (0,) * 7


class Tail(Function):
    """``operators.tail``, differentiable any number of times."""

    parameters_at = 9

    @staticmethod
    def forward(ops, *args):
        return ops.tail(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_formula(ctx, grads, differentiable(TailBackward, _raw_backward), saved_tensors(ctx))

    @staticmethod
    def gradients(ctx, grads, need, saved, as_factors):
        backward = _factors if as_factors else differentiable(TailBackward, _raw_backward)
        return _gradients(ctx, grads, need, backward, saved)

    @staticmethod
    def vmap(info, in_dims, _ops, *args):
        def function(*args):
            y, h, c, _, mean, var, _ = _reference_tail(*args)
            return y, h, c, mean, var

        y, h, c, mean, var = torch.func.vmap(function, in_dims[1:])(*args)
        return (y, h, c, h.new_empty(0), mean, var, h.new_empty(0)), (0, 0, 0, None, 0, 0, None)


class TrackingTail(Tail):
    """``operators.tail_tracking_``: a norm's ``Tracked`` lies where ``Tail`` has statistics. For plain calls."""

    @staticmethod
    def forward(ops, *args):
        return ops.tail_tracking_(*args[:6], *args[6], *args[7:])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        Tail.setup_context(ctx, (*inputs[:7], None, None, *inputs[9:]), output)


def register(ops: Operators) -> None:
    """Gives the raw operator its gradient."""
    give_gradient(ops, "tail", _context, lambda ctx, *grads: _formula(ctx, grads, _raw_backward, ctx.saved_tensors))


register(operators.native)
register(operators.plain)


def tail(
    ops: Operators,
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
    tanh_output: bool,
    tracked: Tracked | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(y, h', c', mean, var)``, the last two empty where statistics were given.

    With ``tracked``, in a plain call on the statistics of the batch, the norm's buffers are moved; then they are None.
    """
    recorded = wants_gradient(z, shortcut, h, c, gamma, beta, *parameters)
    keep_mask = recorded and relu and keeps_mask(ops, z, channel_dim)
    statistics = (mean, var) if tracked is None else tracked
    args = (z, shortcut, h, c, gamma, beta, *statistics, eps, *parameters, channel_dim, relu, tanh_output, keep_mask)
    if tracked is None:
        y, h, c, _, mean, var, _ = route(Tail, ops.tail, _reference_tail, args, recorded, ops)
    else:
        y, h, c, _, _ = run(TrackingTail, partial(TrackingTail.forward, ops), args, recorded, ops)
        torch.autograd.graph.increment_version(tracked.buffers)
    return y, h, c, mean, var
