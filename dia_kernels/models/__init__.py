"""The networks of the paper, by name: ``create("resnet20", num_classes=10, attention="dia")``."""

from __future__ import annotations

from .resnet import Attention, ResNet

__all__ = ["ResNet", "create", "names"]

_RESNET_DEPTHS = {"resnet20": 20}


def names() -> tuple[str, ...]:
    """Names that ``create`` takes."""
    return tuple(_RESNET_DEPTHS)


def create(
    name: str,
    num_classes: int = 10,
    *,
    attention: Attention = None,
    reduction: int = 4,
    in_channels: int = 3,
    backend: str | None = None,
) -> ResNet:
    """A network with freshly drawn weights.

    Args:
        name: one of ``names()``.
        num_classes: outputs of the classifier.
        attention: None, or ``"dia"`` for one shared attention unit a stage.
        reduction: r of the attention.
        in_channels: channels of the images.
        backend: of the attention; None for the best one here, or a name out of ``dia_kernels.backends.NAMES``.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    if name not in _RESNET_DEPTHS:
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    return ResNet(
        _RESNET_DEPTHS[name],
        num_classes,
        attention=attention,
        reduction=reduction,
        in_channels=in_channels,
        backend=backend,
    )
