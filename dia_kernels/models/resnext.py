"""ResNeXt for small images (CIFAR): 101 layers, cardinality 8, 32 channels in the stem.

Bottlenecks whose 3x3 convolution is split into groups (arXiv:1611.05431); the widths are those of the
DIA authors' code (gbup-group/DIANet): stages of 128, 256 and 512 channels, twice that inside a block.
The stage's attention follows the last batch norm; scaling, shortcut and ReLU are its tail.
"""

from __future__ import annotations

from torch import nn

from .parts import Network, Options, blocks_per_stage, make_stages
from .resnet import Bottleneck

_STEM_WIDTH = 32


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

        def make_block(in_channels: int, out_channels: int, stride: int, options: Options) -> Bottleneck:
            width = groups * out_channels // widen
            return Bottleneck(in_channels, width, stride, options, out_channels=out_channels, groups=groups)

        stages = make_stages(_STEM_WIDTH, widths, blocks, make_block, options)
        stem = nn.Sequential(
            options.conv(options.in_channels, _STEM_WIDTH, 3), options.batch_norm(_STEM_WIDTH), nn.ReLU()
        )
        super().__init__(stem, stages, nn.Identity(), nn.Linear(widths[-1], num_classes))
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
