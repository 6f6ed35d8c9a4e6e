"""ResNeXt for small images (CIFAR): 101 layers, cardinality 8, 32 channels in the stem.

Bottlenecks whose 3x3 convolution is split into groups (arXiv:1611.05431); the widths are those of the
DIA authors' code (gbup-group/DIANet): stages of 128, 256 and 512 channels, twice that inside a block.
The stage's attention follows the last batch norm; scaling, shortcut and ReLU are its tail.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..attention import SharedAttention
from ..functional import State
from .parts import Block, Network, Options, blocks_per_stage, make_stages

_STEM_WIDTH = 32


class GroupedBottleneck(Block):
    """1x1, grouped 3x3 and 1x1 convolutions; the 3x3 carries the stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, widen: int, options: Options):
        super().__init__(out_channels, options)
        inner = groups * out_channels // widen
        self.conv1 = options.conv(in_channels, inner, 1)
        self.bn1 = options.batch_norm(inner)
        self.conv2 = options.conv(inner, inner, 3, stride, groups)
        self.bn2 = options.batch_norm(inner)
        self.conv3 = options.conv(inner, out_channels, 1)
        self.bn3 = options.batch_norm(out_channels)
        self.projection = options.projection(in_channels, out_channels, stride)

    def forward(
        self, x: Tensor, shared: SharedAttention | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """The block's output, and the attention's state for the next block."""
        shortcut = self.projection(x) if self.skip else None
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.tail(self.conv3(x), self.bn3, shortcut, "relu", shared, state)


class ResNeXt(Network):
    """ResNeXt of ``depth`` = 9 n + 2 layers: three stages of n bottlenecks.

    Args:
        depth: layers with weights on the longest path.
        num_classes: outputs of the classifier.
        groups: cardinality of the 3x3 convolutions.
        widen: factor of the widths 32, 64 and 128.
        options: attention and what else varies.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, *, groups: int = 8, widen: int = 4, options: Options = Options()
    ) -> None:
        blocks = blocks_per_stage(depth, 3, other_layers=2)
        widths = (32 * widen, 64 * widen, 128 * widen)
        stages = make_stages(
            _STEM_WIDTH,
            widths,
            blocks,
            partial(GroupedBottleneck, groups=groups, widen=widen, options=options),
            options,
        )
        stem = nn.Sequential(
            options.conv(options.in_channels, _STEM_WIDTH, 3), options.batch_norm(_STEM_WIDTH), nn.ReLU()
        )
        super().__init__(stem, stages, nn.Identity(), nn.Linear(widths[-1], num_classes))
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
