"""torchvision's ResNet-50 with attention units put into its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from dia_kernels import SharedAttention, create_attention, models


class Stage(nn.Module):
    """A stage of torchvision's ResNet whose blocks end in an attention unit."""

    def __init__(self, blocks: nn.Sequential, units: Sequence[nn.Module], tail: Callable) -> None:
        super().__init__()
        self.blocks = blocks
        self.units = nn.ModuleList(units)  # one for all blocks, or one for each
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for k, b in enumerate(self.blocks):
            shortcut = x if b.downsample is None else b.downsample(x)
            x = b.relu(b.bn1(b.conv1(x)))
            x = b.relu(b.bn2(b.conv2(x)))
            x, state = self.tail(self.units[k % len(self.units)], b.conv3(x), b.bn3, state, shortcut)
        return x


def folded_tail(unit: nn.Module, z: Tensor, norm: nn.Module, state: Any, shortcut: Tensor) -> tuple[Tensor, Any]:
    return unit(z, state, norm=norm, shortcut=shortcut, activation="relu", inplace="auto")  # z is a convolution's


def step_tail(unit: nn.Module, z: Tensor, norm: nn.Module, state: Any, shortcut: Tensor) -> tuple[Tensor, Any]:
    return unit(norm(z), state, shortcut=shortcut, activation="relu")


def separate_tail(unit: nn.Module, z: Tensor, norm: nn.Module, state: Any, shortcut: Tensor) -> tuple[Tensor, Any]:
    x, state = unit(norm(z), state)
    return F.relu(x + shortcut), state


def resnet50(variant: str, reduction: int) -> nn.Module:
    """torchvision's ResNet-50 with the units of ``variant`` in its blocks."""
    model = torchvision.models.resnet50()
    if variant == "plain":
        return model
    for name in ("layer1", "layer2", "layer3", "layer4"):
        blocks = getattr(model, name)
        channels = blocks[0].conv3.out_channels
        if variant == "se":
            stage = Stage(blocks, [models.SqueezeExcitation(channels) for _ in blocks], step_tail)
        elif variant == "our se":
            stage = Stage(blocks, [create_attention("se", channels, 16) for _ in blocks], folded_tail)
        elif variant == "pytorchcv":
            from pytorchcv.models.diaresnet import DIAAttention  # a bare machine with a GPU lacks it

            stage = Stage(blocks, [DIAAttention(channels, channels)], separate_tail)
        else:
            backend = "reference" if variant == "eager" else None
            tail = folded_tail if variant == "ours" else step_tail
            stage = Stage(blocks, [SharedAttention(channels, reduction, backend=backend)], tail)
        setattr(model, name, stage)
    return model
