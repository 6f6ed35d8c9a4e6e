"""ResNet-18 to 152 for ImageNet: torchvision's, with attention shared by ``share_attention``.

Layers, initial weights and state-dict keys are torchvision's; attention stands under ``layer{1..4}.0.attention``, or
with SE under every block.
"""

from __future__ import annotations

from torch import nn

from ..cells import check_positive
from ..sharing import share_attention

__all__ = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

#: r where none is given: what the authors of DIA take on ImageNet, and those of SE.
_REDUCTIONS = {"dia": 20, "se": 16}


def _resnet(
    name: str, attention: str | None, reduction: int | None, num_classes: int, weights: str | None, backend: str | None
) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError("models: torchvision is not installed (pip install torchvision)") from error
    if attention is not None and attention not in _REDUCTIONS:
        raise ValueError(f'attention: expected None, "dia" or "se", got {attention!r}')
    check_positive("num_classes", num_classes)
    known = models.get_model_weights(name)
    try:
        known.verify(weights)
    except (KeyError, TypeError) as error:
        raise ValueError(f"weights: expected None or one of {', '.join(known.__members__)}, got {weights!r}") from error
    of_imagenet = 1000 if weights is not None else num_classes
    network = getattr(models, name)(weights=weights, num_classes=of_imagenet)
    if num_classes != of_imagenet:
        network.fc = nn.Linear(network.fc.in_features, num_classes)
    if attention is None:
        return network
    return share_attention(
        network,
        "lstm" if attention == "dia" else "se",
        _REDUCTIONS[attention] if reduction is None else reduction,
        per_block=attention == "se",
        init="preserve" if weights is not None and attention == "dia" else "default",
        backend=backend,
    )


def _builder(depth: int):
    def build(
        *,
        attention: str | None = "dia",
        reduction: int | None = None,
        num_classes: int = 1000,
        weights: str | None = None,
        backend: str | None = None,
    ) -> nn.Module:
        return _resnet(f"resnet{depth}", attention, reduction, num_classes, weights, backend)

    build.__name__ = build.__qualname__ = f"resnet{depth}"
    build.__doc__ = f"""torchvision's ResNet-{depth} with shared attention.

    Args:
        attention: ``"dia"`` for one LSTM unit a stage, ``"se"`` for a squeeze-and-excitation unit a block, or None.
        reduction: r; None for 20 with DIA (arXiv:1905.10671, section 4) and 16 with SE.
        num_classes: outputs of the classifier; of pretrained weights one that is not 1000 has a classifier drawn anew.
        weights: torchvision's pretrained weights, by name; with DIA the network then computes what it did before.
        backend: of the attention; None for the best one here.

    Returns:
        A module that maps images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        ImportError: torchvision is not installed.
        ValueError: an argument is wrong; the message names it.
    """
    return build


resnet18 = _builder(18)
resnet34 = _builder(34)
resnet50 = _builder(50)
resnet101 = _builder(101)
resnet152 = _builder(152)
