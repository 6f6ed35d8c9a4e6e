"""Squeeze-and-excitation: the unit that the papers compare DIA with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cells import check_bottleneck
from ..functional import Activation


def close(x: Tensor, shortcut: Tensor | None, activation: Activation) -> Tensor:
    """``activation(x + shortcut)``: how a block without shared attention ends."""
    if shortcut is not None:
        x = x + shortcut
    return torch.relu(x) if activation == "relu" else x


class SqueezeExcitation(nn.Module):
    """``x * sigmoid(W2 relu(W1 p + b1) + b2)`` with p the mean of x over its positions.

    Formula: arXiv:1709.01507, section 3. One unit a block; called as ``SharedAttention`` is, with no state.

    Args:
        channels: C of the feature maps.
        reduction: r; the bottleneck has C // r values.

    Raises:
        ValueError: C // r is 0.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        check_bottleneck(channels, reduction)
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, channels)

    def forward(
        self, x: Tensor, state: None = None, *, shortcut: Tensor | None = None, activation: Activation = None
    ) -> tuple[Tensor, None]:
        """``activation(x * scale + shortcut)``, and no state.

        Args:
            x: feature map (N, C, H, W).
            state: None.
            shortcut: the block's other branch, shape of x, or None.
            activation: None or ``"relu"``.
        """
        scale = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))
        return close(x * scale[:, :, None, None], shortcut, activation), None
