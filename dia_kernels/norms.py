"""The norm before the step: which ones are folded into the tail, with which statistics, and their buffers.

Folded are ``nn.BatchNorm1d/2d/3d``, ``nn.SyncBatchNorm``, torchvision's ``FrozenBatchNorm2d``, timm's
``BatchNormAct2d`` without activation and a bare ``(scale, bias)``. Their semantics are those of the modules themselves:
batch statistics (of all processes, for a SyncBatchNorm) in training or where there are no running ones, running ones
otherwise, buffers updated in training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .autograd import transforms_active
from .layout import channels, compute_dtype
from .operators import Operators
from .schemas import NAMESPACE

#: A norm: a module or function of the map, or a scale and a bias for each channel.
Norm = nn.Module | Callable[[Tensor], Tensor] | tuple[Tensor, Tensor]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
#: Those that they begin with.
_DTYPES = (torch.float32, torch.float32, torch.int64)
#: PyTorch's that look for the channels in dimension 1.
_OF_CHANNELS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, nn.InstanceNorm2d.forward, nn.GroupNorm.forward)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Folded(NamedTuple):
    """What the tail needs of a norm.

    ``mean`` and ``var`` None: the batch's own, which ``module`` wants to know. The batch is that of all processes of
    ``group``, if there is one.
    """

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    module: _BatchNorm | None = None
    group: Any = None


def fold(norm: Norm, z: Tensor, channel_dim: int) -> Folded | None:
    """What the tail needs of ``norm`` for the map ``z``; None where the norm has to be called by itself.

    Raises:
        ValueError: the norm's own checks: rank, one value for each channel in training.
        TypeError: ``norm`` is nothing that could be called.
    """
    if isinstance(norm, tuple):
        scale, bias = pair(norm)
        return Folded(scale, bias, torch.zeros_like(scale), torch.ones_like(scale), 0.0)
    if not callable(norm):
        raise TypeError(f"norm: expected a norm module, a function or a pair (scale, bias), got {type(norm).__name__}")
    if not isinstance(norm, nn.Module) or _is_hooked(norm):
        return None
    if _is_batch_norm(norm):
        return _fold_batch_norm(norm, z, z.shape[channel_dim])  # type: ignore[arg-type]
    return _with_running_statistics(norm) if _is_frozen(norm) else None


def pair(norm: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """``norm``, if it is a scale and a bias.

    Raises:
        TypeError: it is no pair of tensors.
    """
    if len(norm) != 2 or not all(isinstance(t, Tensor) for t in norm):
        kinds = ", ".join(type(t).__name__ for t in norm)
        raise TypeError(f"norm: expected a pair of tensors (scale, bias), got ({kinds})")
    return norm


def tensors(norm: Norm | None, folded: Folded | None) -> tuple[Tensor | None, ...]:
    """Where gradients of ``norm`` may go, as far as it shows: what it is ``folded`` by, or what a module has."""
    if folded is not None:
        return folded[:2]
    if isinstance(norm, nn.Module):
        return (*norm.parameters(), *norm.buffers())
    return norm if isinstance(norm, tuple) else ()


def called(norm: nn.Module | Callable[[Tensor], Tensor], x: Tensor, channel_dim: int) -> Any:
    """``norm(x)``, of the channels of ``x``: PyTorch's batch, group and instance norms look for them in dimension 1."""
    if channel_dim == 1 or not isinstance(norm, nn.Module):
        return norm(x)
    # A module with a forward of its own knows its layout.
    if getattr(type(norm), "forward", None) in _OF_CHANNELS or _is_batch_norm(norm) or _is_frozen(norm):
        return norm(x.movedim(channel_dim, 1)).movedim(1, channel_dim)
    return norm(x)


def nothing(x: Tensor, channel_dim: int) -> Folded:
    """A norm that changes nothing, for those who want of the map ``x`` what only the pooling behind a norm has."""
    mean = x.new_zeros(channels(x, channel_dim), dtype=compute_dtype(x.dtype))
    return Folded(None, None, mean, torch.ones_like(mean), 0.0)


def is_nothing(norm: nn.Module) -> bool:
    """Whether ``norm`` stands for none, and nobody would notice that it is not called."""
    return type(norm) is nn.Identity and not _is_hooked(norm)


def folds(norm: nn.Module) -> bool:
    """Whether ``norm`` before a step is folded into it."""
    return (_is_frozen(norm) or _is_batch_norm(norm)) and not _is_hooked(norm)


def _is_frozen(norm: nn.Module) -> bool:
    return type(norm).__name__ == "FrozenBatchNorm2d" and type(norm).__module__.startswith("torchvision.")


def _is_batch_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` computes what PyTorch's batch norms compute: timm's with activation has none, now and then."""
    if type(norm) in _BATCH_NORMS:
        return True
    if type(norm).__name__ == "BatchNormAct2d" and type(norm).__module__.startswith("timm."):
        return type(norm.act) is nn.Identity and type(norm.drop) is nn.Identity
    return False


def _is_hooked(norm: nn.Module) -> bool:
    """Whether something waits for the norm to be called: then it must be."""
    return bool(norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks) or (
        "parametrizations" in norm._modules and nn.utils.parametrize.is_parametrized(norm)
    )


def _uses_batch(norm: _BatchNorm) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _group(norm: _BatchNorm) -> Any:
    """The processes whose samples make up the batch of ``norm``; None if it is this one's alone."""
    distributed = torch.distributed
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training):
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _fold_batch_norm(norm: _BatchNorm, z: Tensor, width: int) -> Folded:
    norm._check_input_dim(z)
    if width != norm.num_features:
        raise ValueError(f"norm: expected {width} features, the channels of x, got {norm.num_features}")
    if not _uses_batch(norm):
        return _with_running_statistics(norm)
    group = _group(norm)
    if group is None and z.numel() // max(width, 1) <= 1 and z.numel() > 0:
        raise ValueError(f"norm: expected more than 1 value per channel when training, got x of shape {tuple(z.shape)}")
    return Folded(_own(norm, "weight"), _own(norm, "bias"), None, None, norm.eps, norm, group)


def _with_running_statistics(norm: Any) -> Folded:
    weight, bias, mean, var = (_own(norm, name) for name in ("weight", "bias", "running_mean", "running_var"))
    return Folded(weight, bias, mean, var, norm.eps)


def _own(norm: nn.Module, name: str) -> Tensor | None:
    """``getattr``, past the half microsecond that a module takes to find what is none of Python's own attributes."""
    found: Tensor | None = norm._parameters.get(name)
    found = norm._buffers.get(name) if found is None else found
    return getattr(norm, name) if found is None else found


class Tracked(NamedTuple):
    """The buffers that an operator moves by itself: running mean, running variance, count; and by which factor."""

    buffers: tuple[Tensor, Tensor, Tensor]
    factor: float


def tracked_by(ops: Operators, norm: _BatchNorm, z: Tensor) -> Tracked | None:
    """What ``ops.tail_tracking_`` moves of a norm that takes the statistics of the batch ``z``, in a plain call.

    None: nothing is moved, or by ``update_buffers``. The operator moves buffers such as a norm begins with, of
    implementers that have a kernel for it.
    """
    if not norm.track_running_stats or norm.momentum is None or type(z) is not Tensor or z.dtype is torch.float64:
        return None
    device = z.device
    if not _tracks(ops, device.type):
        return None
    buffers = tuple(map(norm._buffers.__getitem__, _BUFFERS))
    for buffer, dtype in zip(buffers, _DTYPES, strict=True):
        if type(buffer) is not Tensor or buffer.dtype is not dtype or buffer.device != device:
            return None
        if not buffer.is_contiguous():
            return None
    return Tracked(buffers, norm.momentum)  # type: ignore[arg-type]


@cache
def _tracks(ops: Operators, device: str) -> bool:
    """Whether ``ops`` has a kernel of its own that moves buffers on a device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    name = f"{NAMESPACE}::tail_tracking_{ops.suffix}"
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def update_buffers(norm: _BatchNorm, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """What the norm does to its buffers, from a batch's mean and biased variance over ``count`` values.

    A batch without values counts as one, but has no statistics. No gradient flows through ``mean`` and ``var``.
    """
    if not norm.track_running_stats:
        return
    running_mean, running_var, batches = (norm._buffers[name] for name in _BUFFERS)
    move = _move
    if transforms_active():
        _check_mapped(mean, running_mean)
        move = _move_mapped
    factor = 0.0 if norm.momentum is None else norm.momentum
    if batches is not None:
        batches.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(batches)
    if not isinstance(count, Tensor) and count == 0:
        return
    rest = count - 1
    unbiased = var * (count / (rest.clamp(min=1) if isinstance(rest, Tensor) else max(rest, 1)))
    for running, value in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            move(running, torch.where(count > 0, value, running) if isinstance(count, Tensor) else value, factor)


def _check_mapped(mean: Tensor, running_mean: Tensor | None) -> None:
    """Several batches side by side have no one running mean."""
    is_mapped = torch._C._functorch.is_batchedtensor
    if running_mean is not None and is_mapped(mean) and not is_mapped(running_mean):
        raise RuntimeError(
            "norm: in training its running statistics cannot be updated under torch.func.vmap, which maps over the "
            "batches but not over them; map over them too, use eval(), track_running_stats=False, or "
            "torch.func.replace_all_batch_norm_modules_"
        )


def _move(running: Tensor, value: Tensor, factor: float) -> None:
    running.lerp_(value if value.dtype is running.dtype else value.to(running.dtype), factor)


def _move_mapped(running: Tensor, value: Tensor, factor: float) -> None:
    """``_move`` without ``lerp_``, for which vmap has no rule of its own."""
    running.mul_(1.0 - factor).add_(value.to(running.dtype), alpha=factor)
