"""Parameters: of one attention unit, of the papers' networks for CIFAR-100, of growing depths, of ResNets for ImageNet.

Nothing is trained and no weights are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torchvision

from .. import params, share_attention
from ..attention import SharedAttention

Record = dict[str, Any]

#: The depths of the ResNet that the papers show the flat cost of attention with (arXiv:1905.10671, section 4).
DEPTHS = ("resnet83", "resnet164", "resnet245", "resnet407")

_CHANNELS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_IMAGENET = (("resnet18", 4), ("resnet34", 4), ("resnet50", 4), ("resnet101", 4), ("resnet152", 4), ("resnet50", 20))


def records() -> list[Record]:
    """Each says in ``table`` to which table it belongs: ``unit``, ``networks`` or ``imagenet``."""
    with torch.device("meta"):
        return [*_units(), *_networks(), *_imagenet()]


def _units() -> Iterator[Record]:
    for channels in _CHANNELS:
        one, two = (params.count(SharedAttention(channels, 4, num_layers=layers)) for layers in (1, 2))
        yield {"table": "unit", "channels": channels, "parameters": one, "another_layer": two - one}


def _networks() -> Iterator[Record]:
    for row in params.count_all(names=dict.fromkeys((*params.PUBLISHED, *DEPTHS))):
        published = params.PUBLISHED.get(row.name, params.Published(None, None))
        yield {
            "table": "networks", "network": row.name, "plain": row.plain, "se": row.se, "dia": row.dia,
            "published_plain": published.plain, "published_dia": published.dia,
        }  # fmt: skip


def _imagenet() -> Iterator[Record]:
    for name, reduction in _IMAGENET:
        network = getattr(torchvision.models, name)()
        plain = params.count(network)
        dia = params.count(share_attention(network, reduction=reduction))
        yield {"table": "imagenet", "network": name, "reduction": reduction, "plain": plain, "dia": dia}
