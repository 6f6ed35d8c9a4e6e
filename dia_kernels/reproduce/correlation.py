"""How alike the scales of a stage's blocks are: Pearson's correlation of every pair, over test images and channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..attention import SharedAttention
from ..cell_attention import CellAttention
from ..models import Network
from ..models.parts import Block, Stage
from ..train.images import ImageData

#: Test images that are looked at.
IMAGES = 256

#: Of each stage, the correlations of its blocks: rows and columns are blocks.
Correlations = list[list[list[float]]]


@torch.no_grad()
def of_stages(network: Network, data: ImageData) -> Correlations:
    """The correlations in ``network``, in evaluation, whose every block ends in an attention unit of ours."""
    network.eval()
    images = torch.stack([data.test[k][0] for k in range(min(IMAGES, len(data.test)))])
    with ExitStack() as stack:
        scales = [stack.enter_context(_noted(cast(Stage, stage))) for stage in network.stages]
        network(images)
    return [torch.corrcoef(torch.stack([s.flatten() for s in of_blocks])).tolist() for of_blocks in scales]


@contextmanager
def _noted(stage: Stage) -> Iterator[list[Tensor]]:
    """The scale of each block of ``stage``, (N, C), once the network has been called."""
    found: list[Tensor] = []
    units = [stage.attention, *(cast(Block, block).attention for block in stage.blocks)]
    handles = [_note(unit, found) for unit in units if unit is not None]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(unit: nn.Module, found: list[Tensor]):
    if isinstance(unit, SharedAttention):
        return unit.register_forward_hook(lambda module, args, result: found.append(result[1][0]))
    if not isinstance(unit, CellAttention):
        raise TypeError(f"unit: expected attention of this library, got {type(unit).__name__}")
    return unit.cell.register_forward_hook(lambda module, args, result: found.append(result[0]))
