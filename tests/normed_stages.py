"""Blocks that share attention, with norms of their own that are folded in, and the same with norms called first."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dia_kernels import functional

EPS = torch.finfo(torch.float64).eps
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


class Stage(nn.Module):
    """Two blocks that share ``attention``; ``kind`` is that of their norms, or "none"."""

    def __init__(self, attention: nn.Module, c: int, kind: str = "batch", *, dims: int = 2, **options) -> None:
        super().__init__()
        self.attention, self.kind, self.options = attention, kind, options
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.norms = nn.ModuleList(norm(c, affine=kind != "bare").train(kind in ("batch", "bare")) for _ in range(2))
        for n in self.norms:
            n.running_mean.normal_(), n.running_var.uniform_(0.5, 1.5)
            for p in n.parameters():  # away from zero: the next norm divides by what is left of a channel
                p.data = torch.where(torch.rand(c) < 0.5, -1, 1) * (0.5 + torch.rand(c))

    def forward(self, x: Tensor, shortcut: Tensor | None, apart: bool = False) -> Tensor:
        """``apart``: norms are called by themselves, and all else is the reference's."""
        y, state = x, None
        self.attention.backend = "reference" if apart else None
        for n in self.norms:
            norm = {"pair": (n.weight, n.bias), "none": None}.get(self.kind, n)
            if apart and norm is not None:
                y, norm = functional._called(norm, y, self.attention.channel_dim), None
            y, state = self.attention(y, state, shortcut=shortcut, norm=norm, **self.options)
        return y


def folds(y: Tensor) -> bool:
    """Whether a result was made behind a folded norm."""
    return "NormRescale" in type(y.grad_fn).__name__


def gradients(stage: Stage, x: Tensor, s: Tensor | None, dy: Tensor, apart: bool = False) -> dict[str, Tensor]:
    """Result, gradients and buffers by name, of a copy of ``stage`` in the compute dtype of x."""
    wide = x.dtype == torch.float64
    stage = copy.deepcopy(stage).to(torch.float64 if wide else torch.float32)
    leaves = {"x": x.detach().requires_grad_()}
    if s is not None:
        leaves["shortcut"] = s.detach().requires_grad_()
    y = stage(leaves["x"], leaves.get("shortcut"), apart)
    assert folds(y) is not apart
    found = torch.autograd.grad(y, [*leaves.values(), *stage.parameters()], dy.to(y.dtype), allow_unused=True)
    names = (*leaves, *dict(stage.named_parameters()))
    results = {f"d {name}": g for name, g in zip(names, found, strict=True) if g is not None}
    return {"y": y.detach()} | results | {name: b.double() for name, b in stage.named_buffers()}


def assert_equal_in_float64(found: dict[str, Tensor], expected: dict[str, Tensor], terms: int) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = max(expected[name].abs().max().item(), 1e-3)
        assert (value - expected[name]).abs().max().item() <= 64 * terms**0.5 * EPS * scale, name
