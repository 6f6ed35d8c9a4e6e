"""What the families share: their options, the tail of a block, a stage of blocks, and the frame around the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..attention import SharedAttention
from ..functional import Activation, State
from .squeeze import SqueezeExcitation, close

Attention = Literal["se", "dia"] | None

_DEFAULT_REDUCTION = {"se": 16, "dia": 4}


@dataclass(frozen=True)
class Options:
    """What every family can vary.

    Attributes:
        attention: None, ``"se"`` for a squeeze-and-excitation unit in every block, or ``"dia"`` for one
            ``SharedAttention`` a stage.
        reduction: r of the attention; None for what the papers use on CIFAR, 16 with SE and 4 with DIA.
        skip: False leaves out the shortcuts: the blocks then form a plain chain.
        norm: False leaves out the batch norms; the convolutions then have biases.
        in_channels: channels of the images.
        backend: of the attention; see ``SharedAttention``.
        fold_norm: with DIA, the last batch norm of a block goes into the attention's step; False calls it by itself.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    attention: Attention = None
    reduction: int | None = None
    skip: bool = True
    norm: bool = True
    in_channels: int = 3
    backend: str | None = None
    fold_norm: bool = True

    def __post_init__(self) -> None:
        if self.attention not in (None, "se", "dia"):
            raise ValueError(f'attention: expected None, "se" or "dia", got {self.attention!r}')

    def _reduction(self) -> int:
        return _DEFAULT_REDUCTION[self.attention or "dia"] if self.reduction is None else self.reduction

    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        """A convolution that keeps the sides of the map at stride 1."""
        return nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=not self.norm
        )

    def batch_norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if self.norm else nn.Identity()

    def projection(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """The shortcut of a post-activation block: 1x1 convolution and norm where the shape changes."""
        if not self.skip or (stride == 1 and in_channels == out_channels):
            return nn.Identity()
        return nn.Sequential(self.conv(in_channels, out_channels, 1, stride), self.batch_norm(out_channels))

    def own_attention(self, channels: int) -> SqueezeExcitation | None:
        """The unit that belongs to one block."""
        if self.attention != "se":
            return None
        return SqueezeExcitation(channels, self._reduction())

    def shared_attention(self, channels: int) -> SharedAttention | None:
        """The unit that belongs to a stage."""
        if self.attention != "dia":
            return None
        return SharedAttention(channels, self._reduction(), backend=self.backend)


class Block(nn.Module):
    """A residual block. Its attention is its own (SE), or the stage's and comes as an argument (DIA)."""

    def __init__(self, channels: int, options: Options) -> None:
        super().__init__()
        self.skip = options.skip
        self.fold_norm = options.fold_norm
        self.attention = options.own_attention(channels)

    def tail(
        self,
        z: Tensor,
        norm: nn.Module,
        shortcut: Tensor | None,
        activation: Activation,
        shared: SharedAttention | None,
        state: State | None,
    ) -> tuple[Tensor, State | None]:
        """``activation(attention(norm(z)) + shortcut)``, and the state for the next block."""
        if shared is not None and self.fold_norm:
            return shared(z, state, norm=norm, shortcut=shortcut, activation=activation)
        x = norm(z)
        attention = self.attention if shared is None else shared
        if attention is not None:
            return attention(x, state, shortcut=shortcut, activation=activation)
        return close(x, shortcut, activation), None


class Stage(nn.Module):
    """Blocks of one width, and the attention that they share (None without DIA)."""

    def __init__(self, blocks: Iterable[Block], attention: SharedAttention | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for block in self.blocks:
            x, state = block(x, self.attention, state)
        return x


class Network(nn.Module):
    """Stem, stages, what follows the last stage, mean over the positions, classifier."""

    def __init__(self, stem: nn.Module, stages: Iterable[Stage], head: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head = head
        self.classifier = classifier
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W) of any size."""
        x = self.head(self.stages(self.stem(x)))
        return self.classifier(x.mean((2, 3)))


def make_stages(
    channels: int,
    widths: Iterable[int],
    blocks: int,
    make_block: Callable[[int, int, int], Block],
    options: Options,
    expansion: int = 1,
) -> list[Stage]:
    """Stages of ``blocks`` blocks each, after a stem of ``channels``; the first block of all but the first halves.

    Args:
        channels: that come in.
        widths: one a stage; its blocks put out ``expansion`` times as many channels.
        blocks: in each stage.
        make_block: of (channels in, width, stride).
        options: for the attention of each stage.
        expansion: channels out over width.
    """
    stages = []
    for index, width in enumerate(widths):
        first = make_block(channels, width, 1 if index == 0 else 2)
        channels = expansion * width
        rest = (make_block(channels, width, 1) for _ in range(blocks - 1))
        stages.append(Stage((first, *rest), options.shared_attention(channels)))
    return stages


def blocks_per_stage(depth: int, layers_per_block: int, other_layers: int) -> int:
    """Blocks in each of three stages of a network of ``depth`` layers with weights on the longest path."""
    blocks, rest = divmod(depth - other_layers, 3 * layers_per_block)
    if blocks < 1 or rest:
        raise ValueError(f"depth: expected {3 * layers_per_block} n + {other_layers} with n at least 1, got {depth}")
    return blocks
