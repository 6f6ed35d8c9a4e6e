"""Shapes, dtypes and memory layouts of feature maps, in one place for the reference, the fakes and the checks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of pooling, cell and state for a map of ``dtype``: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off for the device of ``x``; the meta device knows none, and must not be asked."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # to ask costs a tenth of turning it off
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def channels(x: Tensor, channel_dim: int) -> int:
    """Number of channels of the map ``x``; ``channel_dim`` is 1 or -1."""
    return x.shape[channel_dim]


def spatial_dims(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    """Dimensions over which ``x`` is pooled: all but the first and the channels."""
    return tuple(range(2, x.ndim)) if channel_dim == 1 else tuple(range(1, x.ndim - 1))


def spatial_size(x: Tensor, channel_dim: int) -> int:
    """Number of positions of one channel of one sample, HW."""
    size = 1
    for dim in spatial_dims(x, channel_dim):
        size *= x.shape[dim]
    return size


def broadcast(table: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """A view of the (N, C) ``table`` that broadcasts over the positions of ``x``."""
    for dim in spatial_dims(x, channel_dim):
        table = table.unsqueeze(dim)
    return table


def shares_memory(x: Tensor) -> bool:
    """Whether ``x`` is expanded, so that several of its elements are one place in memory."""
    return x.numel() > 0 and any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def is_mapping() -> bool:
    """Whether the call runs inside ``torch.func.vmap``, at any depth of transforms."""
    if not torch._C._are_functorch_transforms_active():
        return False
    layers = torch._C._functorch.get_interpreter_stack() or ()
    return any(layer.key() == torch._C._functorch.TransformType.Vmap for layer in layers)


def output_format(x: Tensor, channel_dim: int) -> torch.memory_format:
    """Memory format of everything that is shaped like the map ``x``.

    channels_last (or channels_last_3d) if ``x`` is so and is not contiguous, else contiguous. The
    native library computes the same in csrc/core/layout.h. Under ``torch.func.vmap``, which has no other formats,
    always contiguous.
    """
    if channel_dim == 1 and not x.is_contiguous() and not is_mapping():
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def empty_map(x: Tensor, channel_dim: int) -> Tensor:
    """An uninitialised map with the shape, dtype and device of ``x``, in its output format."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=output_format(x, channel_dim))
