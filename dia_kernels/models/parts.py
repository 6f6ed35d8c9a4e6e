"""What the families share: their options, the tail of a block, a stage of blocks, and the frame around the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .. import norms
from ..attention import CELLS, create_attention, inplace_between
from ..functional import Activation
from .squeeze import SqueezeExcitation, close

#: None, ``"dia"``, or a name out of ``CELLS``.
Attention = str | None

#: Those of ``CELLS`` that carry a state: they are shared where nothing else is said.
_RECURRENT = ("dia", "lstm", "lstm_tanh", "dsu")


@dataclass(frozen=True)
class Options:
    """What every family can vary.

    Attributes:
        attention: None, ``"dia"`` for one ``SharedAttention`` a stage, ``"se"`` for a squeeze-and-excitation unit in
            every block, or another cell out of ``CELLS``.
        reduction: r of the attention; None for what the papers use on CIFAR: 4 with DIA and others that carry a state,
            16 without.
        skip: False leaves out the shortcuts: the blocks then form a plain chain.
        norm: False leaves out the batch norms; the convolutions then have biases.
        in_channels: channels of the images.
        backend: of the attention; see ``SharedAttention``.
        fold_norm: the last batch norm of a block goes into its attention; False calls it by itself.
        shared: True for one unit a stage, False for one a block; None for what was published: one a stage of the cells
            that carry a state, one a block of the others. (``"se"`` is then the plain unit of its authors, in PyTorch's
            own operations: what others are compared with.)
        stages: which stages have attention, from 0; None for all.
        carry_state: False begins every block of a stage without a state.
        layers: of the LSTM, stacked.

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
    shared: bool | None = None
    stages: tuple[int, ...] | None = None
    carry_state: bool = True
    layers: int = 1

    def __post_init__(self) -> None:
        if self.attention not in (None, "dia", *CELLS):
            raise ValueError(f"attention: expected None, dia or one of {', '.join(CELLS)}, got {self.attention!r}")
        if self.layers != 1 and self.attention not in ("dia", "lstm", "lstm_tanh"):
            raise ValueError(f"layers: expected 1 with attention={self.attention!r}, got {self.layers}")

    def _reduction(self) -> int:
        if self.reduction is not None:
            return self.reduction
        return 4 if self.attention in _RECURRENT else 16

    @property
    def shares(self) -> bool:
        """Whether the blocks of a stage share its attention."""
        if self.attention is None:
            return False
        return self.attention in _RECURRENT if self.shared is None else self.shared

    def of_stage(self, index: int) -> Options:
        """The options of a stage's blocks: without attention, if that stage is to have none."""
        return self if self.stages is None or index in self.stages else replace(self, attention=None, layers=1)

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

    def own_attention(self, channels: int) -> nn.Module | None:
        """The unit that belongs to one block."""
        if self.attention is None or self.shares:
            return None
        if self.attention == "se" and self.shared is None:
            return SqueezeExcitation(channels, self._reduction())
        return self._attention(channels, 1)

    def shared_attention(self, channels: int, blocks: int) -> nn.Module | None:
        """The unit that belongs to a stage of ``blocks`` blocks."""
        return self._attention(channels, blocks) if self.shares else None

    def _attention(self, channels: int, blocks: int) -> nn.Module:
        cell = "lstm" if self.attention == "dia" else self.attention
        assert cell is not None
        return create_attention(
            cell, channels, self._reduction(), blocks=blocks, num_layers=self.layers, backend=self.backend
        )


class Block(nn.Module):
    """A residual block. Its attention is its own, or the stage's and comes as an argument."""

    def __init__(self, channels: int, options: Options) -> None:
        super().__init__()
        self.skip = options.skip
        self.fold_norm = options.fold_norm
        self.attention = options.own_attention(channels)

    def tail(
        self,
        branch: nn.Module,
        x: Tensor,
        norm: nn.Module,
        shortcut: Tensor | None,
        activation: Activation,
        shared: nn.Module | None,
        state: Any,
    ) -> tuple[Tensor, Any]:
        """``activation(attention(norm(branch(x))) + shortcut)``, and the state for the next block.

        ``branch`` is the convolution that ends the branch. In inference attention may write over its result.
        """
        attention = self.attention if shared is None else shared
        inplace = attention is not None and inplace_between(branch, attention)
        z = branch(x)
        if attention is None:
            return close(norm(z), shortcut, activation), None
        state = state if shared is not None else None  # another unit's is none of this one's
        if self.fold_norm and not isinstance(attention, SqueezeExcitation):
            allowed = {"inplace": inplace} if inplace and type(z) is Tensor else {}
            folded = None if norms.is_nothing(norm) else norm
            return attention(z, state, norm=folded, shortcut=shortcut, activation=activation, **allowed)
        return attention(norm(z), state, shortcut=shortcut, activation=activation)


class Stage(nn.Module):
    """Blocks of one width, and the attention that they share (None if they share none)."""

    def __init__(self, blocks: Iterable[Block], attention: nn.Module | None, carry_state: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention
        self.carry_state = carry_state

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for block in self.blocks:
            x, state = block(x, self.attention, state if self.carry_state else None)
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
    make_block: Callable[..., Block],
    options: Options,
    expansion: int = 1,
) -> list[Stage]:
    """Stages of ``blocks`` blocks each, after a stem of ``channels``; the first block of all but the first halves.

    Args:
        channels: that come in.
        widths: one a stage; its blocks put out ``expansion`` times as many channels.
        blocks: in each stage.
        make_block: of (channels in, width, stride) and ``options``.
        options: for the attention of each stage.
        expansion: channels out over width.
    """
    stages = []
    for index, width in enumerate(widths):
        own = options.of_stage(index)
        first = make_block(channels, width, 1 if index == 0 else 2, options=own)
        channels = expansion * width
        rest = [make_block(channels, width, 1, options=own) for _ in range(blocks - 1)]
        stages.append(Stage((first, *rest), own.shared_attention(channels, blocks), own.carry_state))
    return stages


def blocks_per_stage(depth: int, layers_per_block: int, other_layers: int) -> int:
    """Blocks in each of three stages of a network of ``depth`` layers with weights on the longest path."""
    blocks, rest = divmod(depth - other_layers, 3 * layers_per_block)
    if blocks < 1 or rest:
        raise ValueError(f"depth: expected {3 * layers_per_block} n + {other_layers} with n at least 1, got {depth}")
    return blocks
