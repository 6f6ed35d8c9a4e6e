"""The networks of the papers, by name: ``create("resnet164", num_classes=100, attention="dia")``.

Those are for small images; ``resnet18`` to ``resnet152`` are torchvision's for ImageNet, with attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from ..cells import check_positive
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

#: Depths at which the papers' ResNet is of bottlenecks.
_BOTTLENECKS = (83, 164, 245, 407)

#: What makes the networks of each family from the numbers in their names.
_FAMILIES: dict[str, Callable[..., Callable[..., Network]]] = {
    r"resnet(\d+)": lambda depth: partial(ResNet, depth, bottleneck=depth in _BOTTLENECKS),
    r"resnet(\d+)bn": lambda depth: partial(ResNet, depth, bottleneck=True),
    r"preresnet(\d+)": lambda depth: partial(PreResNet, depth),
    r"wrn(\d+)_(\d+)": lambda depth, widen: partial(WideResNet, depth, widen=widen, dropout=0.3),
    r"resnext(\d+)_(\d+)x(\d+)": lambda depth, groups, width: partial(ResNeXt, depth, groups=groups, widen=width // 8),
}


def _numbers(match: re.Match[str]) -> tuple[int, ...]:
    """Those in a name; none where a network would be without layers, groups or channels."""
    numbers = tuple(map(int, match.groups()))
    return numbers if all(numbers) and (len(numbers) < 3 or numbers[2] >= 8) else ()


def names() -> tuple[str, ...]:
    """The papers' networks by the names that ``create`` takes; it takes their relatives of other sizes too."""
    return ("resnet20", "resnet56", "resnet110", "resnet164", "preresnet164", "wrn52_4", "resnext101_8x32")


def builder(name: str) -> Callable[..., Network]:
    """What ``create`` calls for ``name``, with ``num_classes`` and ``options``.

    Raises:
        ValueError: no family has such a name.
    """
    for pattern, family in _FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match is not None and (numbers := _numbers(match)):
            return family(*numbers)
    raise ValueError(f"name: expected one of {', '.join(names())}, or a relative of another size, got {name!r}")


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
    shared: bool | None = None,
    stages: Sequence[int] | None = None,
    carry_state: bool = True,
    layers: int = 1,
) -> Network:
    """A network for small images with freshly drawn weights, by its authors' rules.

    (For those of ImageNet's size, torchvision's with attention, see ``resnet18`` to ``resnet152`` here: the same name
    means another network there.)

    Args:
        name: one of ``names()``, or a relative of another size: ``"resnet<depth>"`` (6 n + 2 layers of basic blocks;
            83, 164, 245 and 407 of bottlenecks), ``"resnet<depth>bn"`` (9 n + 2 of bottlenecks),
            ``"preresnet<depth>"`` (9 n + 2), ``"wrn<depth>_<widen>"`` (6 n + 4), ``"resnext<depth>_<groups>x<width>"``
            (9 n + 2; the last stages are ``width`` / 8 times 32, 64 and 128 channels wide).
        num_classes: outputs of the classifier.
        attention: None, ``"dia"`` for one shared attention unit a stage, ``"se"`` for a squeeze-and-excitation unit a
            block, or another cell out of ``dia_kernels.CELLS``. ``"se"`` by itself is the papers' baseline, in
            PyTorch's operations; with ``shared=False`` (or True) it is the library's, the norm folded in.
        reduction: r of the attention; None for 4 with DIA and other cells that carry a state, 16 without.
        skip: False leaves out the shortcuts.
        norm: False leaves out the batch norms; the convolutions then have biases.
        in_channels: channels of the images.
        backend: of the attention (but for the baseline ``"se"``); None for the best one here, or a name out of
            ``dia_kernels.backends.names()``.
        fold_norm: with attention but that baseline, the last batch norm of each block goes into the attention's step,
            at no pass of its own over the map; False calls it by itself. The weights and their names are the same.
        shared: whether the blocks of a stage share one unit; None for what was published (see ``Options``).
        stages: which of the three stages have attention, from 0; None for all.
        carry_state: False begins each block of a stage without a state.
        layers: of the LSTM, stacked.

    Returns:
        A module that maps images (N, in_channels, H, W), H and W at least 4, to logits (N, num_classes).

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    build = builder(name)
    check_positive("num_classes", num_classes)
    check_positive("in_channels", in_channels)
    if stages is not None and not (isinstance(stages, Sequence) and set(stages) <= {0, 1, 2}):
        raise ValueError(f"stages: expected some of 0, 1, 2, got {stages!r}")
    options = Options(
        attention, reduction, skip, norm, in_channels, backend, fold_norm, shared,
        None if stages is None else tuple(stages), carry_state, layers,
    )  # fmt: skip
    return build(num_classes=num_classes, options=options)
