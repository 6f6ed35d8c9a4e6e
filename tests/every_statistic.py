"""A cell that looks at every statistic of a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dia_kernels import Cell


class EveryStatistic(Cell):
    """``scale = sigmoid(a max + b mean + c std + what the block before had)``, channel by channel."""

    statistics = ("max", "mean", "std")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, channels) / 2)

    def forward(self, pooled: tuple[Tensor, ...], state: Any) -> tuple[Tensor, Tensor]:
        u = sum(w.to(p.dtype) * p for w, p in zip(self.weight, pooled, strict=True))
        u = u if state is None else u + state / 2
        return torch.sigmoid(u), u


class OneStatistic(EveryStatistic):
    """The same of one."""

    def __init__(self, channels: int, statistic: str) -> None:
        super().__init__(channels)
        self.statistics = (statistic,)

    def forward(self, pooled: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(self.weight[0].to(pooled.dtype) * pooled), pooled
