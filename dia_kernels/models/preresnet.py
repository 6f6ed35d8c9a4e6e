"""Pre-activation ResNet for small images (CIFAR): 164 layers of bottlenecks.

Batch norm and ReLU come before each convolution and the sum stays as it is (arXiv:1603.05027). A block
that changes the shape has a 1x1 convolution of its raw input as shortcut. With ``attention="dia"`` one
more batch norm follows the last convolution, then the stage's attention scales, then the shortcut is
added, without a ReLU, as in the authors' code (gbup-group/DIANet).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .parts import Block, Network, Options, blocks_per_stage, make_stages

_WIDTHS = (16, 32, 64)


class PreActivationBottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, each after batch norm and ReLU; the 3x3 carries the stride."""

    def __init__(self, in_channels: int, width: int, stride: int, options: Options) -> None:
        out_channels = 4 * width
        super().__init__(out_channels, options)
        self.bn1 = options.batch_norm(in_channels)
        self.conv1 = options.conv(in_channels, width, 1)
        self.bn2 = options.batch_norm(width)
        self.conv2 = options.conv(width, width, 3, stride)
        self.bn3 = options.batch_norm(width)
        self.conv3 = options.conv(width, out_channels, 1)
        self.tail_bn = options.batch_norm(out_channels) if options.shares else nn.Identity()
        self.projection: nn.Module = nn.Identity()
        if options.skip and (stride != 1 or in_channels != out_channels):
            self.projection = options.conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor, shared: nn.Module | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """The block's output, and the attention's state for the next block."""
        shortcut = self.projection(x) if self.skip else None
        x = self.conv1(torch.relu(self.bn1(x)))
        x = self.conv2(torch.relu(self.bn2(x)))
        x = torch.relu(self.bn3(x))
        return self.tail(self.conv3, x, self.tail_bn, shortcut, None, shared, state)


class PreResNet(Network):
    """Pre-activation ResNet of ``depth`` = 9 n + 2 layers: three stages of n bottlenecks.

    Args:
        depth: layers with weights on the longest path.
        num_classes: outputs of the classifier.
        options: attention and what else varies.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(self, depth: int, num_classes: int = 10, *, options: Options = Options()) -> None:
        blocks = blocks_per_stage(depth, 3, other_layers=2)
        stages = make_stages(_WIDTHS[0], _WIDTHS, blocks, PreActivationBottleneck, options, expansion=4)
        channels = 4 * _WIDTHS[-1]
        head = nn.Sequential(options.batch_norm(channels), nn.ReLU())
        stem = options.conv(options.in_channels, _WIDTHS[0], 3)
        super().__init__(stem, stages, head, nn.Linear(channels, num_classes))
