"""The tail whose batch norm is over several processes (``nn.SyncBatchNorm``): sums are exchanged between the sweeps.

Forward: ``statistics`` | all-gather | ``tail_join`` on the statistics of all. Backward: ``tail_reduce`` | all-reduce |
``tail_spread``. The exchange is 2 C + 1 float64 values a process forward and 2 C values of the compute dtype backward,
and lies outside of every operator. The gradients of the norm's weight and bias stay those of this process's samples,
for DistributedDataParallel to add up, as ``nn.SyncBatchNorm`` leaves them.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.autograd.function import Function

from . import masks, reference
from .autograd import keeps_mask, saved_tensors
from .cells import LSTMParameters, split_parameters
from .layout import broadcast, channels, compute_dtype, spatial_dims
from .operators import Operators


def _over_processes(mean: Tensor, var: Tensor, count: int, group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values over all processes, from those of this one's.

    A process without samples takes part, with no weight.
    """
    own = torch.cat((mean, var, mean.new_full((1,), count)))
    if count == 0:
        own.zero_()
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(gathered, own, group=group)
    means, variances, counts = torch.stack(gathered).split([len(mean), len(var), 1], dim=1)
    total = counts.sum()
    weights = counts / total
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0), total


class SyncTail(Function):
    """``tail`` on the statistics of all processes of a group; differentiable again through the reference."""

    @staticmethod
    def forward(ctx, ops, z, shortcut, h, c, gamma, beta, eps, *rest):
        *parameters, channel_dim, relu, tanh_output, group = rest
        count = z.numel() // max(channels(z, channel_dim), 1)
        mean, var, means = ops.statistics(z, channel_dim)
        mean, var, total = _over_processes(mean, var, count, group)
        ctx.ops, ctx.flags, ctx.eps, ctx.group = ops, (channel_dim, relu, tanh_output), eps, group
        keep_mask = relu and any(ctx.needs_input_grad) and keeps_mask(ops, z, channel_dim)
        y, new_h, new_c, tables, mask = ops.tail_join(
            z, shortcut, h, c, gamma, beta, mean, var, means, eps, *parameters, *ctx.flags, keep_mask
        )
        passed = mask if keep_mask else y if relu else None
        ctx.save_for_backward(z, passed, h, c, new_h, new_c, tables, gamma, beta, total, *parameters)
        ctx.mark_non_differentiable(mean, var, total)
        ctx.set_materialize_grads(False)
        return y, new_h, new_c, mean, var, total

    @staticmethod
    def backward(ctx, dy, dh, dc, *_):
        z, y, h, c, new_h, new_c, tables, gamma, beta, total, *parameters = saved_tensors(ctx)
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, (dy, dh, dc), y, (z, h, c, gamma, beta, *parameters))
        need, (channel_dim, relu, _) = ctx.needs_input_grad[1:], ctx.flags
        need_shortcut, need_state, need_parameters = need[1] and dy is not None, need[2] or need[3], any(need[7:15])
        sums, g, dp, dh, dc, flat = ctx.ops.tail_reduce(
            dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *parameters[::2], *ctx.flags,
            need_shortcut and relu, need_state, need_parameters,
        )  # fmt: skip
        dz = None
        if need[0]:
            shares = sums.clone()
            distributed.all_reduce(shares, group=ctx.group)
            shares /= total.to(shares.dtype)
            source, mask = (g, None) if need_shortcut and relu else (dy, y)
            dz = ctx.ops.tail_spread(source, mask, z, new_h, dp, tables, gamma, shares, channel_dim)
        dshortcut = g if relu else dy
        dparameters = split_parameters(flat, *parameters[0].shape) if need_parameters else (None,) * 8
        return None, *_asked(need, dz, dshortcut if need_shortcut else None, dh, dc, sums[1], sums[0], *dparameters)


def _asked(need: tuple, dz, dshortcut, dh, dc, dgamma, dbeta, *dparameters) -> tuple:
    """A gradient for each argument of ``SyncTail``: None where it is not needed."""
    gradients = (dz, dshortcut, dh, dc, dgamma, dbeta, None, *dparameters, *(None,) * 4)
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=True))


def _differentiable_gradients(ctx, grads, y, inputs) -> tuple:
    """The gradients of ``SyncTail`` with a graph of their own, by the reference; the ReLU's mask is a constant."""
    channel_dim, _, tanh_output = ctx.flags
    dy, dh, dc = grads
    g = dy if dy is None or y is None else reference.unrelu(dy, masks.as_result(y, inputs[0], channel_dim))
    # Views, as an input may itself depend on another (z on h, through the blocks before).
    views = tuple(None if t is None else t.view_as(t) for t in inputs)
    z, h, c, gamma, beta, *parameters = views
    outputs = _reference_tail(
        z, None, h, c, gamma, beta, ctx.eps, LSTMParameters._make(parameters), channel_dim, False,
        "tanh" if tanh_output else "sigmoid", ctx.group,
    )[:3]  # fmt: skip
    pairs = [(out, grad) for out, grad in zip(outputs, (g, dh, dc), strict=True) if grad is not None]
    wanted = [t for t in views if t is not None and t.requires_grad]
    found: tuple[Tensor | None, ...] = ()
    if wanted and pairs:  # else the shortcut's gradient is all that is asked for
        results, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, wanted, cotangents, create_graph=True, allow_unused=True)
    rest = iter(found)
    dz, dh, dc, dgamma, dbeta, *dparameters = (next(rest) if t is not None and t.requires_grad else None for t in views)
    return None, *_asked(ctx.needs_input_grad[1:], dz, g, dh, dc, dgamma, dbeta, *dparameters)


class AllReduce(Function):
    """The sum of a tensor over the processes of a group, differentiable any number of times."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.apply(grad, ctx.group), None


def statistics(z: Tensor, channel_dim: int, group) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.statistics`` over the processes of a group, differentiable, and the number of values."""
    wide, dims = z.to(compute_dtype(z.dtype)), (0, *spatial_dims(z, channel_dim))
    count = wide.new_full((), z.numel() // max(channels(z, channel_dim), 1))
    total = AllReduce.apply(count, group)
    mean = AllReduce.apply(wide.sum(dims), group) / total
    off = wide - broadcast(mean.unsqueeze(0), z, channel_dim)
    return mean, AllReduce.apply(off.square().sum(dims), group) / total, total


def _reference_tail(z, shortcut, h, c, gamma, beta, eps, parameters, channel_dim, relu, output, group):
    mean, var, total = statistics(z, channel_dim, group)
    y, h, c, *_ = reference.tail(z, shortcut, h, c, gamma, beta, mean, var, eps, parameters, channel_dim, relu, output)
    return y, h, c, mean, var, total


@torch.compiler.disable
def tail(
    ops: Operators | None,
    z: Tensor,
    shortcut: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    parameters: LSTMParameters,
    channel_dim: int,
    relu: bool,
    output: str,
    group,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(y, h', c', mean, var, count)``, the last three over all processes of ``group``; no ``ops``: by the reference.

    ``torch.compile`` breaks the graph here: an exchange in the middle of a backward has no form in it.
    """
    first = (z, shortcut, h, c, gamma, beta, eps)
    if ops is None:
        return _reference_tail(*first, parameters, channel_dim, relu, output, group)
    return SyncTail.apply(ops, *first, *parameters, channel_dim, relu, output == "tanh", group)
