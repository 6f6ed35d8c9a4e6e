"""A scale for each position of the rescaled map, from statistics over its channels, against plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import simulated_backend
import torch
from accuracy import assert_accurate
from normed_stages import EPS, LAYOUTS
from torch import Tensor, fx, nn
from torch.autograd import gradcheck, gradgradcheck

from dia_kernels import CBAM, Cell, CellAttention, create_attention
from dia_kernels.functional import STD_EPS

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = pytest.mark.parametrize("backend", ["fallback", "cpu"], indirect=True)


class Positions(Cell):
    """``y = x sigmoid(mean) sigmoid(a statistic + ...)``, with statistics over the channels of the map rescaled."""

    def __init__(self, *statistics: str) -> None:
        super().__init__()
        self.position_statistics = statistics
        self.weight = nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, pooled: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.sigmoid(pooled), state

    def position_scale(self, pooled: Tensor | tuple[Tensor, ...]) -> Tensor:
        pooled = pooled if isinstance(pooled, tuple) else (pooled,)
        terms = zip(self.weight, pooled, strict=False)
        return torch.sigmoid(sum(w.to(p.dtype) * p for w, p in terms))


class PositionsThenMore(Positions):
    def after(self, y: Tensor) -> Tensor:
        return y * 2


def plain(cell: Positions, x: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """The same by the book, for maps (N, C, *spatial)."""
    y = x * torch.sigmoid(x.flatten(2).mean(2)).view(*x.shape[:2], *(1,) * (x.ndim - 2))
    by_name = {"mean": lambda: y.mean(1), "max": lambda: y.amax(1), "std": lambda: (y.var(1) + STD_EPS).sqrt()}
    pooled = tuple(by_name[name]() for name in cell.position_statistics)
    y = cell.after(y * cell.position_scale(pooled).unsqueeze(1))
    y = y if shortcut is None else y + shortcut
    return torch.relu(y) if relu else y


def assert_equal(found: Tensor, expected: Tensor, terms: int) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 64 * terms**0.5 * EPS * max(expected.abs().max().item(), 1e-3)


@BACKENDS
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("statistics", [("mean",), ("max",), ("std", "mean", "max")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, statistics, with_shortcut, relu, backend):
    torch.manual_seed(0)
    cell = Positions(*statistics).double()
    x, s, dy = torch.randn(3, 3, 25, 6, 5, dtype=torch.float64)
    leaves = [LAYOUTS[layout](t).requires_grad_() for t in ((x, s) if with_shortcut else (x,))]
    y, _ = CellAttention(cell)(
        leaves[0], shortcut=leaves[1] if with_shortcut else None, activation="relu" if relu else None
    )
    own = [t.detach().requires_grad_() for t in leaves]
    expected = plain(cell, own[0], own[1] if with_shortcut else None, relu)
    assert_equal(y, expected, 100)
    assert y.is_contiguous(memory_format=torch.channels_last) is (layout == "channels_last")
    of_cell = [cell.weight]
    found = torch.autograd.grad(y, [*leaves, *of_cell], dy)
    for a, b in zip(found, torch.autograd.grad(expected, [*own, *of_cell], dy), strict=True):
        assert_equal(a, b, 1000)


@BACKENDS
@pytest.mark.parametrize("shape", [(2, 25, 9), (2, 6, 3, 2, 4), (5, 102, 1, 1), (2, 2, 7, 7)], ids=str)
@pytest.mark.parametrize("tokens", [False, True])
def test_shapes(shape, tokens, backend):
    torch.manual_seed(0)
    cell = Positions("max", "mean", "std").double()
    x, s, dy = torch.randn(3, *shape, dtype=torch.float64)
    attention = CellAttention(cell, channel_dim=-1 if tokens else 1)
    leaves = [(t.movedim(1, -1).contiguous() if tokens else t).requires_grad_() for t in (x, s)]
    y, _ = attention(leaves[0], shortcut=leaves[1], activation="relu")
    found = torch.autograd.grad(y, leaves, dy.movedim(1, -1) if tokens else dy)
    own = [t.detach().requires_grad_() for t in (x, s)]
    expected = plain(cell, *own, True)
    back = (lambda t: t.movedim(-1, 1)) if tokens else (lambda t: t)
    assert_equal(back(y), expected, 1000)
    for a, b in zip(found, torch.autograd.grad(expected, own, dy), strict=True):
        assert_equal(back(a), b, 1000)


def test_derivatives():
    cell = Positions("max", "mean", "std").double()
    attention = CellAttention(cell)
    values = [torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def call(x, s):
        return attention(x, shortcut=s, activation="relu")[0]

    assert gradcheck(call, values)
    assert gradgradcheck(call, values, atol=1e-4)
    direct = torch.func.grad(lambda x: call(x, values[1]).square().sum())(values[0].detach())
    torch.testing.assert_close(direct, torch.autograd.grad(call(*values).square().sum(), values[0])[0])
    x = values[0].detach()
    torch.testing.assert_close(torch.func.vmap(lambda x: attention(x[None])[0][0])(x), attention(x)[0])


@pytest.mark.parametrize("backend", [None, "simulated"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_contract(dtype, layout, backend):
    """CBAM behind a batch norm against float64, with all of it as it is in PyTorch as the yardstick."""
    if backend == "simulated":
        simulated_backend.library()
    found, truth, eager = [], [], []
    for seed in range(6):
        torch.manual_seed(seed)
        attention = create_attention("cbam", 16, 4, backend=backend)
        own = create_attention("cbam", 16, 4, backend="reference")
        own.load_state_dict(attention.state_dict())
        norm = nn.BatchNorm2d(16)
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
        # No two values of a channel so close that rounding could make another the largest.
        order = torch.rand(6, 16, 24).argsort(2).view(6, 16, 4, 6)
        z = LAYOUTS[layout]((order / 8 - 1.5 + torch.rand(16, 1, 1) / 64).to(dtype))
        s, dy = (LAYOUTS[layout](t.to(dtype)) for t in torch.randn(2, *z.shape))
        for into, module, wide in ((found, attention, None), (truth, own, torch.float64), (eager, own, None)):
            module, before = copy.deepcopy(module), copy.deepcopy(norm)
            module, before = (module, before) if wide is None else (module.double(), before.double())
            maps = [t.to(wide or dtype).detach().requires_grad_() for t in (z, s)]
            y, _ = module(maps[0], norm=before, shortcut=maps[1])
            leaves = {"z": maps[0], "s": maps[1]} | dict(module.named_parameters()) | dict(before.named_parameters())
            grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
            into.append({"y": y.detach()} | dict(zip(leaves, grads, strict=True)))
    for name in found[0]:
        ours, true, theirs = (torch.stack([of[name] for of in results]) for results in (found, truth, eager))
        assert_accurate(ours, true, theirs, name, 6 * 24)


def test_a_shortcut_of_another_dtype_or_layout():
    torch.manual_seed(0)
    attention = CellAttention(Positions("mean"))
    x, s = torch.randn(2, 3, 8, 4, 5)
    expected = attention(x, shortcut=s, activation="relu")[0]
    torch.testing.assert_close(
        attention(LAYOUTS["channels_last"](x), shortcut=s, activation="relu")[0], expected, rtol=1e-5, atol=1e-5
    )
    half = s.to(torch.bfloat16)
    y, _ = attention(x, shortcut=half, activation="relu")
    torch.testing.assert_close(y, attention(x, shortcut=half.float(), activation="relu")[0])


def test_what_comes_after_positions():
    torch.manual_seed(0)
    cell = PositionsThenMore("mean", "max")
    x, s = torch.randn(2, 3, 8, 4, 5)
    y, _ = CellAttention(cell)(x, shortcut=s, activation="relu")
    torch.testing.assert_close(y, plain(cell, x, s, True))


def test_inplace():
    attention = CellAttention(Positions("mean")).eval()
    x, s = torch.randn(2, 3, 8, 4, 5)
    with torch.no_grad():
        expected = attention(x, shortcut=s, activation="relu")[0]
        y, _ = attention(x, shortcut=s, activation="relu", inplace=True)
    assert y is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(0, 8, 4, 5), (3, 8, 0, 5)], ids=str)
def test_empty_maps(shape):
    attention = CellAttention(Positions("mean", "max", "std"))
    x = torch.randn(shape, requires_grad=True)
    y, _ = attention(x, activation="relu")
    assert y.shape == shape
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == shape


def test_traced_and_compiled():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = create_attention("cbam", 8, 2)

        def forward(self, x):
            return self.attention(x, shortcut=x, activation="relu")[0]

    block = Block().eval()
    x = torch.randn(3, 8, 9, 9)
    expected = block(x)
    torch.testing.assert_close(fx.symbolic_trace(block)(x), expected)
    block.train()
    other = copy.deepcopy(block)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        found = []
        for module, call in ((block, block), (other, compiled)):
            leaf = x.detach().clone().requires_grad_()
            found.append(torch.autograd.grad(call(leaf).square().sum(), [leaf, *module.parameters()]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["mean", ("median",), ("mean", "min"), ["mean"]], ids=str)
def test_wrong_statistics(wrong):
    cell = Positions()
    cell.position_statistics = wrong
    with pytest.raises(ValueError, match="cell: expected position_statistics to be a tuple out of mean, std, max"):
        CellAttention(cell)


class Wrong(Positions):
    def position_scale(self, pooled):
        return pooled.flatten(1)


def test_a_scale_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"cell position_scale: expected shape \(3, 4, 5\), got \(3, 20\)"):
        CellAttention(Wrong("mean"))(torch.randn(3, 8, 4, 5))


def test_a_cell_without_a_scale_for_positions():
    class Without(Cell):
        position_statistics = ("mean",)

        def forward(self, pooled, state):
            return torch.sigmoid(pooled), state

    with pytest.raises(NotImplementedError, match="Without has no position_scale"):
        CellAttention(Without())(torch.randn(3, 8, 4, 5))


def test_cbam_of_another_rank():
    with pytest.raises(ValueError, match="x: expected 2 spatial dimensions, those of the CBAM, got 1"):
        CellAttention(CBAM(8, 2))(torch.randn(3, 8, 5))
