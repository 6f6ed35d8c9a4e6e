"""Wide ResNet for small images (CIFAR): 52 layers, four times as wide.

Pre-activation blocks of two 3x3 convolutions with dropout between them (arXiv:1605.07146). A block that
changes the width activates its input once, for the branch and for its 1x1 shortcut. With
``attention="dia"`` one more batch norm follows the last convolution, then the stage's attention scales,
then the shortcut is added, without a ReLU, as in the authors' code (gbup-group/DIANet).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .parts import Block, Network, Options, blocks_per_stage, make_stages

_STEM_WIDTH = 16


class WideBlock(Block):
    """Two 3x3 convolutions, each after batch norm and ReLU, with dropout before the second."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float, options: Options) -> None:
        super().__init__(out_channels, options)
        self.bn1 = options.batch_norm(in_channels)
        self.conv1 = options.conv(in_channels, out_channels, 3, stride)
        self.bn2 = options.batch_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = options.conv(out_channels, out_channels, 3)
        self.tail_bn = options.batch_norm(out_channels) if options.shares else nn.Identity()
        self.projection: nn.Module | None = None
        if options.skip and (stride != 1 or in_channels != out_channels):
            self.projection = options.conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor, shared: nn.Module | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """The block's output, and the attention's state for the next block."""
        activated = torch.relu(self.bn1(x))
        shortcut = None
        if self.skip:
            shortcut = x if self.projection is None else self.projection(activated)
        x = torch.relu(self.bn2(self.conv1(activated)))
        return self.tail(self.conv2, self.dropout(x), self.tail_bn, shortcut, None, shared, state)


class WideResNet(Network):
    """Wide ResNet of ``depth`` = 6 n + 4 layers: three stages of n blocks.

    Args:
        depth: layers with weights, the shortcuts' counted too.
        num_classes: outputs of the classifier.
        widen: factor of the widths 16, 32 and 64.
        dropout: probability of zeroing a value between the convolutions; the authors train with 0.3.
        options: attention and what else varies.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, *, widen: int = 4, dropout: float = 0.0, options: Options = Options()
    ) -> None:
        blocks = blocks_per_stage(depth, 2, other_layers=4)
        widths = (16 * widen, 32 * widen, 64 * widen)
        stages = make_stages(_STEM_WIDTH, widths, blocks, partial(WideBlock, dropout=dropout), options)
        head = nn.Sequential(options.batch_norm(widths[-1]), nn.ReLU())
        stem = options.conv(options.in_channels, _STEM_WIDTH, 3)
        super().__init__(stem, stages, head, nn.Linear(widths[-1], num_classes))
        nn.init.zeros_(self.classifier.bias)
