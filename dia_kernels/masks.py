"""The mask of a ReLU: what a gradient needs of the result, a bit for each value.

A mask is a tensor of bytes. Bit k % 8 of byte k // 8 tells of the k-th value of the result, in the order of its memory,
whether the ReLU let it through: it is 0 where y <= 0, so that NaN passes. Every row of the map begins a byte, so
channels of a channels-last map, or positions of another one, have to be a multiple of eight. A thirty-second of a
float32 map, a sixteenth of a 16-bit one, it saves a gradient the reading of y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import output_format

#: Values that a byte tells of.
VALUES = 8


def _channels_inside(x: Tensor, channel_dim: int) -> bool:
    """Whether channels are dimension 1 in shape, but side by side in memory."""
    return channel_dim == 1 and output_format(x, channel_dim) != torch.contiguous_format


def fits(x: Tensor, channel_dim: int) -> bool:
    """Whether a result in the output format of ``x`` may have a mask."""
    if channel_dim != 1 or (not x.is_contiguous() and _channels_inside(x, channel_dim)):
        return x.shape[channel_dim] % VALUES == 0
    positions = 1
    for length in x.shape[2:]:
        positions *= length
    return positions % VALUES == 0


def size(x: Tensor) -> int:
    """Bytes of a mask."""
    return x.numel() // VALUES


def make(y: Tensor, channel_dim: int) -> Tensor:
    """The mask of a ReLU's result ``y``, which is in its output format.

    Raises:
        ValueError: its rows do not begin bytes.
    """
    if not fits(y, channel_dim):
        raise ValueError(f"keep_mask: expected rows of a multiple of {VALUES} values, got shape {tuple(y.shape)}")
    ordered = y.movedim(1, -1) if _channels_inside(y, channel_dim) else y
    passed = ~(ordered <= 0).reshape(-1, VALUES)
    places = torch.arange(VALUES, dtype=torch.uint8, device=y.device)
    return (passed.to(torch.uint8) << places).sum(1, dtype=torch.uint8)


def as_result(y: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """A result or, for its mask, a map like ``x`` that stands for it: 1 where the ReLU let a value through, else 0."""
    if y.dtype != torch.uint8:
        return y
    places = torch.arange(VALUES, dtype=torch.uint8, device=y.device)
    passed = (y[:, None] >> places & 1).to(x.dtype)
    if not _channels_inside(x, channel_dim):
        return passed.reshape(x.shape)
    return passed.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
