"""ResNet for small images (CIFAR), plain or with Dense-and-Implicit Attention.

Three stages of basic blocks, 16, 32 and 64 channels wide (arXiv:1512.03385, section 4.2; the shortcut
of a block that changes the shape is a 1x1 convolution). With ``attention="dia"`` each stage owns one
``SharedAttention`` that all its blocks call, and the attention takes over the block's tail: scaling,
shortcut and ReLU (arXiv:1905.10671, section 3).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..attention import SharedAttention
from ..functional import State

Attention = Literal["dia"] | None

_STAGE_WIDTHS = (16, 32, 64)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. The attention is the stage's, so it comes as an argument."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.projection: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.projection = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(
        self, x: Tensor, attention: SharedAttention | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """The block's output, and the attention's state for the next block."""
        shortcut = self.projection(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if attention is None:
            return torch.relu(x + shortcut), None
        return attention(x, state, shortcut=shortcut, activation="relu")


class Stage(nn.Module):
    """Blocks of one width, and the attention that they share (None in a plain network)."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, stride: int, attention: SharedAttention | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicBlock(in_channels if k == 0 else out_channels, out_channels, stride if k == 0 else 1)
            for k in range(blocks)
        )
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for block in self.blocks:
            x, state = block(x, self.attention, state)
        return x


class ResNet(nn.Module):
    """ResNet of ``depth`` = 6 n + 2 layers: three stages of n basic blocks.

    Args:
        depth: layers with weights on the longest path: 20, 56, 110, ...
        num_classes: outputs of the classifier.
        attention: None, or ``"dia"`` for one ``SharedAttention`` a stage.
        reduction: r of the attention; the authors use 4 for CIFAR.
        in_channels: channels of the images.
        backend: of the attention; see ``SharedAttention``.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        attention: Attention = None,
        reduction: int = 4,
        in_channels: int = 3,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6 != 0:
            raise ValueError(f"depth: expected 6 n + 2 with n at least 1, got {depth}")
        if attention not in (None, "dia"):
            raise ValueError(f'attention: expected None or "dia", got {attention!r}')
        self.conv = _conv3x3(in_channels, _STAGE_WIDTHS[0])
        self.bn = nn.BatchNorm2d(_STAGE_WIDTHS[0])
        stages = []
        width = _STAGE_WIDTHS[0]
        for index, stage_width in enumerate(_STAGE_WIDTHS):
            shared = None if attention is None else SharedAttention(stage_width, reduction, backend=backend)
            stages.append(Stage(width, stage_width, (depth - 2) // 6, 1 if index == 0 else 2, shared))
            width = stage_width
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W) of any size."""
        x = torch.relu(self.bn(self.conv(x)))
        x = self.stages(x)
        return self.classifier(x.mean((2, 3)))
