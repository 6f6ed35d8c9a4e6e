"""The networks of the papers, by name: ``create("resnet164", num_classes=100, attention="dia")``.

Those are for small images; ``resnet18`` to ``resnet152`` are torchvision's for ImageNet, with attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .imagenet import resnet18, resnet34, resnet50, resnet101, resnet152
from .parts import Attention, Network, Options
from .preresnet import PreResNet
from .resnet import ResNet
from .resnext import ResNeXt
from .squeeze import SqueezeExcitation
from .wide_resnet import WideResNet

__all__ = [
    "Network",
    "Options",
    "PreResNet",
    "ResNeXt",
    "ResNet",
    "SqueezeExcitation",
    "WideResNet",
    "create",
    "names",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]

_FAMILIES: dict[str, Callable[..., Network]] = {
    "resnet20": partial(ResNet, 20),
    "resnet56": partial(ResNet, 56),
    "resnet110": partial(ResNet, 110),
    "resnet164": partial(ResNet, 164, bottleneck=True),
    "preresnet164": partial(PreResNet, 164),
    "wrn52_4": partial(WideResNet, 52, widen=4, dropout=0.3),
    "resnext101_8x32": partial(ResNeXt, 101, groups=8, widen=4),
}


def names() -> tuple[str, ...]:
    """Names that ``create`` takes."""
    return tuple(_FAMILIES)


def create(
    name: str,
    num_classes: int = 10,
    *,
    attention: Attention = None,
    reduction: int | None = None,
    skip: bool = True,
    norm: bool = True,
    in_channels: int = 3,
    backend: str | None = None,
    fold_norm: bool = True,
) -> Network:
    """A network for small images with freshly drawn weights, by its authors' rules.

    Args:
        name: one of ``names()``.
        num_classes: outputs of the classifier.
        attention: None, ``"se"`` for a squeeze-and-excitation unit a block, or ``"dia"`` for one shared
            attention unit a stage.
        reduction: r of the attention; None for 16 with SE and 4 with DIA.
        skip: False leaves out the shortcuts.
        norm: False leaves out the batch norms; the convolutions then have biases.
        in_channels: channels of the images.
        backend: of the attention; None for the best one here, or a name out of ``dia_kernels.backends.names()``.
        fold_norm: with DIA, the last batch norm of each block goes into the attention's step, at no pass of its own
            over the map; False calls it by itself. The weights and their names are the same.

    Returns:
        A module that maps images (N, in_channels, H, W), H and W at least 4, to logits (N, num_classes).

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    if name not in _FAMILIES:
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    options = Options(attention, reduction, skip, norm, in_channels, backend, fold_norm)
    return _FAMILIES[name](num_classes=num_classes, options=options)
