"""ResNet for small images (CIFAR): 20, 56, 110 layers of basic blocks, 164 of bottlenecks.

Three stages, 16, 32 and 64 channels wide, four times that after a bottleneck (arXiv:1512.03385, section
4.2; the shortcut of a block that changes the shape is a 1x1 convolution). With ``attention="dia"``
each stage owns one ``SharedAttention`` that all its blocks call after their last batch norm, and the
attention takes over the block's tail: scaling, shortcut and ReLU (arXiv:1905.10671, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .parts import Block, Network, Options, blocks_per_stage, make_stages

_WIDTHS = (16, 32, 64)


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, options: Options) -> None:
        super().__init__(width, options)
        self.conv1 = options.conv(in_channels, width, 3, stride)
        self.bn1 = options.batch_norm(width)
        self.conv2 = options.conv(width, width, 3)
        self.bn2 = options.batch_norm(width)
        self.projection = options.projection(in_channels, width, stride)

    def forward(self, x: Tensor, shared: nn.Module | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """The block's output, and the attention's state for the next block."""
        shortcut = self.projection(x) if self.skip else None
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.tail(self.conv2, x, self.bn2, shortcut, "relu", shared, state)


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 carries the stride, in ``groups`` in a ResNeXt.

    ``width`` is that of the 3x3; four times that come out, or ``out_channels``.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        options: Options,
        *,
        out_channels: int | None = None,
        groups: int = 1,
    ) -> None:
        out_channels = out_channels or 4 * width
        super().__init__(out_channels, options)
        self.conv1 = options.conv(in_channels, width, 1)
        self.bn1 = options.batch_norm(width)
        self.conv2 = options.conv(width, width, 3, stride, groups)
        self.bn2 = options.batch_norm(width)
        self.conv3 = options.conv(width, out_channels, 1)
        self.bn3 = options.batch_norm(out_channels)
        self.projection = options.projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor, shared: nn.Module | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """The block's output, and the attention's state for the next block."""
        shortcut = self.projection(x) if self.skip else None
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.tail(self.conv3, x, self.bn3, shortcut, "relu", shared, state)


class ResNet(Network):
    """ResNet of ``depth`` layers: 6 n + 2 with n basic blocks a stage, 9 n + 2 with n bottlenecks.

    Args:
        depth: layers with weights on the longest path: 20, 56, 110, or 164 with bottlenecks.
        num_classes: outputs of the classifier.
        bottleneck: build of ``Bottleneck`` instead of ``BasicBlock``.
        options: attention and what else varies.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, *, bottleneck: bool = False, options: Options = Options()
    ) -> None:
        block: type[BasicBlock | Bottleneck] = Bottleneck if bottleneck else BasicBlock
        blocks = blocks_per_stage(depth, 3 if bottleneck else 2, other_layers=2)
        stages = make_stages(_WIDTHS[0], _WIDTHS, blocks, block, options, block.expansion)
        stem = nn.Sequential(
            options.conv(options.in_channels, _WIDTHS[0], 3), options.batch_norm(_WIDTHS[0]), nn.ReLU()
        )
        super().__init__(stem, stages, nn.Identity(), nn.Linear(block.expansion * _WIDTHS[-1], num_classes))
