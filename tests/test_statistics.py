"""Variance and extreme value of each channel, with the pooling behind a norm, against those of PyTorch."""

from __future__ import annotations

import copy

import pytest
import simulated_backend
import torch
from accuracy import assert_accurate
from every_statistic import EveryStatistic, OneStatistic
from normed_stages import LAYOUTS, Stage, assert_equal_in_float64, gradients
from simulated_backend import device, launches
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from dia_kernels import CellAttention, backends, create_attention, functional, operators

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        operators.library_error is not None,
        reason=f"without kernels these statistics are PyTorch's: {operators.library_error}",
    ),
]

KINDS = ("batch", "running", "bare", "pair", "none")
OPERATORS = pytest.mark.parametrize("backend", ["fallback", "cpu"], indirect=True)


def ops_of(name: str) -> operators.Operators:
    if name == "simulated":
        simulated_backend.library()
        return backends._backends["simulated"].operators
    return operators.native


def stage_of(cell: nn.Module, c: int, kind: str, dims: int = 2, **options) -> Stage:
    return Stage(CellAttention(cell), c, kind, dims=dims, **options)


@OPERATORS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 12, 7, 7), (2, 25, 9), (2, 6, 3, 2, 4), (5, 102, 1, 1)], ids=str)
def test_every_statistic(kind, shape, backend):
    torch.manual_seed(shape[1])
    blocks = stage_of(EveryStatistic(shape[1]), shape[1], kind, len(shape) - 2, activation="relu")
    x, s, dy = torch.randn(3, *shape, dtype=torch.float64)
    expected = gradients(blocks, x, s, dy, apart=True)
    assert_equal_in_float64(gradients(blocks, x, s, dy), expected, 16 * shape[0] * shape[1])


@OPERATORS
@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("statistic", ["std", "max"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_statistic(layout, statistic, kind, backend):
    torch.manual_seed(0)
    blocks = stage_of(OneStatistic(25, statistic), 25, kind)
    x, s, dy = torch.randn(3, 3, 25, 6, 5, dtype=torch.float64)
    x, s = LAYOUTS[layout](x), LAYOUTS[layout](s)
    assert_equal_in_float64(gradients(blocks, x, s, dy), gradients(blocks, x, s, dy, apart=True), 1200)


@pytest.mark.parametrize("name", ["srm", "cbam"])
@pytest.mark.parametrize("kind", ["batch", "running", "none"])
def test_published_cells(name, kind):
    torch.manual_seed(0)
    cell = create_attention(name, 12, 3, blocks=2).cell
    blocks = stage_of(cell, 12, kind, activation="relu")
    x, s, dy = torch.randn(3, 6, 12, 6, 5, dtype=torch.float64)
    called = []
    for own in (blocks, copy.deepcopy(blocks)):
        own = own.double()
        y = own(x.requires_grad_(), s, own is not blocks)
        (dx,) = torch.autograd.grad(y, x, dy)
        called.append((y, dx))
    for found, expected in zip(*called, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", [None, "simulated"])
@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_contract(dtype, layout, kind, backend):
    """Against float64, with norm, statistics and attention as they are in PyTorch as the yardstick."""
    ops_of("simulated")
    found, truth, eager = [], [], []
    for seed in range(6):
        torch.manual_seed(seed)
        attention = CellAttention(EveryStatistic(16), backend=backend)
        plain = CellAttention(copy.deepcopy(attention.cell), backend="reference")
        norm = nn.BatchNorm2d(16)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        z, s, dy = (LAYOUTS[layout](t.to(dtype)) for t in torch.randn(3, 6, 16, 4, 6))
        z = z + 2
        # The largest value of each channel stays the largest where the norm's result is rounded.
        places = z.float().flatten(2).argmax(2), z.float().flatten(2).argmin(2)
        for place, change in zip(places, (0.5, -0.5), strict=True):
            z += change * nn.functional.one_hot(place, 24).view(z.shape).to(dtype)

        def block(module, own, z, s):
            own = own if kind == "batch" else None
            return module(z, norm=own, shortcut=s, activation="relu")[0]

        with torch.no_grad():  # away from the ReLU's kink
            before = copy.deepcopy(plain).double()(
                z.double(), norm=copy.deepcopy(norm).double() if kind == "batch" else None, shortcut=s.double()
            )[0]
        s = torch.where(before.abs() < 1 / 16, s + torch.where(before < 0, -1 / 8, 1 / 8).to(dtype), s)
        for into, module, wide in ((found, attention, None), (truth, plain, torch.float64), (eager, plain, None)):
            module, own = copy.deepcopy(module), copy.deepcopy(norm)
            module, own = (module, own) if wide is None else (module.double(), own.double())
            maps = [t.to(wide or dtype).detach().requires_grad_() for t in (z, s)]
            y = block(module, own, *maps)
            leaves = {"z": maps[0], "s": maps[1]} | dict(module.named_parameters())
            leaves |= dict(own.named_parameters()) if kind == "batch" else {}
            grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
            into.append({"y": y.detach()} | dict(zip(leaves, grads, strict=True)))
    for name in found[0]:
        ours, true, theirs = (torch.stack([of[name] for of in results]) for results in (found, truth, eager))
        assert_accurate(ours, true, theirs, name, 6 * 24)


@pytest.mark.parametrize("name", ["native", "simulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (3, 8, 3, 3), (2, 25, 7, 9), (2, 1, 33, 40), (1, 40, 16, 17)], ids=str)
def test_of_equal_values_the_first_counts(shape, layout, dtype, name):
    """Maps of few values, with infinities and NaN among them; channels of one value."""
    torch.manual_seed(0)
    z = torch.randint(-2, 3, shape).to(dtype)
    z[:, :, 0, 0] = -1
    special = [float("inf"), -float("inf"), float("nan"), -0.0]
    for k in range(shape[1]):
        z[0, k].flatten()[torch.randperm(z[0, k].numel())[: k % 3]] = special[k % 4]
    z[-1, shape[1] // 2] = -float("inf")
    z = LAYOUTS[layout](z)
    gamma = torch.randn(shape[1])
    gamma[0] = 0.0
    given = (torch.zeros(shape[1]), torch.ones(shape[1]))
    for weight in (gamma, None):
        call = (z, weight, None, *given, 0.0, 1, True, True, False)
        *_, extreme, where, _, _ = ops_of(name).norm_pool(*call)
        key = z.float() * (1 if weight is None else torch.where(weight < 0, -1.0, 1.0)[:, None, None])
        expected = key.flatten(2).argmax(2)
        assert torch.equal(where, expected)
        values = z.float().flatten(2).gather(2, expected[..., None]).squeeze(2)
        assert torch.equal(extreme.nan_to_num(77.0), values.nan_to_num(77.0))


@pytest.mark.parametrize("name", ["native", "simulated"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [True, False])
def test_samples_far_apart(layout, batch, name):
    """Each sample's variance keeps its digits where means lie further apart than samples deviate."""
    torch.manual_seed(0)
    z = LAYOUTS[layout]((3e4 * torch.randn(5, 8, 1, 1) + torch.randn(5, 8, 9, 9) / 16).float())
    given = (None, None) if batch else (torch.zeros(8), torch.ones(8))
    variance = ops_of(name).norm_pool(z, None, None, *given, 1e-5, 1, True, False, False)[4]
    wide = z.double()
    over = wide.var((0, 2, 3), correction=0) + 1e-5 if batch else 1 + 1e-5
    truth = wide.var((2, 3)) / over
    assert ((variance - truth).abs() <= 1e-5 * truth).all()


@pytest.mark.parametrize("kind", ["batch", "running", "none"])
def test_first_and_second_derivatives(kind):
    torch.manual_seed(0)
    blocks = stage_of(EveryStatistic(4), 4, kind).double()
    values = [torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(blocks, values)
    assert gradgradcheck(blocks, values, atol=1e-4)
    found = []
    for apart in (False, True):
        y = blocks(*values, apart)
        (dx,) = torch.autograd.grad(y.square().sum(), values[0], create_graph=True)
        rest = [p for p in blocks.parameters() if kind != "none" or p is blocks.attention.cell.weight]
        found.append(torch.autograd.grad(dx.square().sum(), [*values, *rest], allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Pooled(nn.Module):
    """The statistics alone, which no rescaling follows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = CellAttention(EveryStatistic(6)), nn.BatchNorm2d(6)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        self.attention.backend = backend
        return self.attention(x, norm=self.norm)[1]


def test_a_pass_that_comes_by_the_pooling_alone():
    pooled = Pooled().double()
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    leaves = (x, *pooled.norm.parameters())
    found, expected = (torch.autograd.grad(pooled(x, b).pow(3).sum(), leaves) for b in (None, "reference"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 6, 4, 5), (3, 6, 0, 5)], ids=str)
@pytest.mark.parametrize("name", ["native", "simulated", "plain"])
def test_empty_maps(shape, name):
    ops = operators.plain if name == "plain" else ops_of(name)
    z = torch.randn(shape)
    p, tables, _, _, variance, extreme, where, *_ = ops.norm_pool(
        z, None, None, torch.zeros(6), torch.ones(6), 0.0, 1, True, True, False
    )
    for t in (variance, extreme):
        assert t.shape == (shape[0], 6)
        assert t.isnan().all()
    assert torch.equal(where, torch.zeros(shape[0], 6, dtype=torch.int64))
    handed = torch.zeros(3, shape[0], 6)
    dz, _, _ = ops.norm_pool_backward(
        z, handed, p, variance, variance, p, extreme, where, z, tables, None, 1, False, True
    )
    assert dz.shape == shape


def test_single_positions_deviate_by_nothing():
    attention = CellAttention(OneStatistic(6, "std"))
    x = torch.randn(3, 6, 1, 1, requires_grad=True)
    y, std = attention(x)
    torch.testing.assert_close(std, torch.full((3, 6), functional.STD_EPS**0.5))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.sigmoid(attention.cell.weight[0] * std).detach()[..., None, None])


@pytest.mark.parametrize("name", ["native", "simulated"])
def test_positions_that_are_none(name):
    """Whoever calls the operator may ask for any: nothing is read or written there."""
    ops, z, wide = ops_of(name), torch.randn(2, 3, 4, 4), (torch.zeros(3), torch.ones(3))
    p, tables, _, _, _, extreme, where, *_ = ops.norm_pool(z, None, None, *wide, 0.0, 1, False, True, False)
    rest = (z, tables, None, 1, False, True)
    handed = torch.ones(3, 2, 3)
    expected = ops.norm_pool_backward(z, handed, p, *(None,) * 5, *rest)[0]
    for place in (-1, 16, 1 << 40, -(1 << 62)):
        found = ops.norm_pool_backward(z, handed, p, None, None, p, extreme, torch.full_like(where, place), *rest)[0]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
@pytest.mark.parametrize("name", ["native", "simulated"])
def test_opcheck(name, layout, full):
    ops, dim = ops_of(name), -1 if layout == "tokens" else 1
    z, g = (LAYOUTS.get(layout, lambda t: t.movedim(1, -1).contiguous())(t) for t in torch.randn(2, 3, 8, 4, 4))
    gamma, beta = torch.randn(2, 8) if full else (None, None)
    mean, var = (None, None) if full else torch.rand(2, 8)
    opcheck = torch.library.opcheck
    buffers = torch.zeros(8), torch.ones(8), torch.tensor(0)
    for wanted in ((True, False), (False, True)) if full else ((True, True),):
        opcheck(ops.norm_pool, (z, gamma, beta, mean, var, 1e-5, dim, *wanted, False))
        opcheck(ops.norm_pool_tracking_, (z, gamma, beta, *buffers, 0.1, 1e-5, dim, *wanted, False))
    p, tables, _, _, variance, extreme, where, *_ = ops.norm_pool(
        z, gamma, beta, mean, var, 1e-5, dim, True, True, False
    )
    handed = torch.randn(3, 3, 8)
    for of_variance in ((variance, variance), (None, None)):
        for of_extreme in ((p, extreme, where), (None, None, None)) if full else ((p, extreme, where),):
            arguments = (g, handed, p, *of_variance, *of_extreme, z, tables, gamma, dim, full, True)
            opcheck(ops.norm_pool_backward, arguments)


def test_compiled():
    """Three training steps, of which the second and third find the buffers that the one before has moved."""
    torch.manual_seed(0)
    blocks = stage_of(EveryStatistic(6), 6, "batch", activation="relu")
    other = copy.deepcopy(blocks)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, s = torch.randn(2, 3, 6, 4, 5)
        found = []
        for module, call in ((blocks, blocks), (other, compiled)):
            leaves = [t.detach().clone().requires_grad_() for t in (x, s)]
            y = call(*leaves)
            found.append([y, *torch.autograd.grad(y.square().sum(), [*leaves, *module.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(blocks.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_kept():
    """Beside z and y there are tables; to the byte."""
    n, c = 4, 16
    attention, norm = CellAttention(EveryStatistic(c)), nn.BatchNorm2d(c, affine=False)
    z, s = (torch.randn(n, c, 24, 24, requires_grad=True) for _ in range(2))
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        attention(z, norm=norm, shortcut=s, activation="relu")
    kept.pop(attention.cell.weight.untyped_storage().data_ptr())
    # The norm's tables; p, std, extreme and the scale; in 64 bits the variance, its square, and the position.
    assert sum(kept.values()) == 2 * 4 * z.numel() + 4 * (n * c + 3 * c) + 4 * n * c * 4 + 8 * n * c * 3


@pytest.mark.parametrize(
    ("statistic", "norm", "forward", "backward"),
    [
        ("std", "batch", ["Reduce", "BatchStatistics", "NormFactors", "Spread"],
         ["Reduce", "ScaleGradients", "NormGradients", "Spread"]),
        ("std", "none", ["Reduce", "GivenStatistics", "NormFactors", "Spread"],
         ["Reduce", "ScaleGradients", "NormGradients", "Spread"]),
        ("max", "batch", ["Reduce", "BatchStatistics", "Extremes", "NormFactors", "Spread"],
         ["Reduce", "ScaleGradients", "NormGradients", "Spread", "SpreadExtremeGradient"]),
        ("max", "none", ["GivenStatistics", "Reduce", "Extremes", "NormFactors", "Spread"],
         ["Reduce", "ScaleGradients", "NormGradients", "Spread", "SpreadExtremeGradient"]),
    ],
)  # fmt: skip
def test_launches(statistic, norm, forward, backward):
    ops_of("simulated")
    x, s = (torch.randn(4, 8, 4, 4, requires_grad=True) for _ in range(2))
    module = nn.BatchNorm2d(8) if norm == "batch" else None
    with device():
        attention = CellAttention(OneStatistic(8, statistic), backend="simulated")
        y, _ = attention(x, norm=module, shortcut=s, activation="relu")
        assert launches() == forward
        y.sum().backward()
        assert launches() == backward


def test_transforms_and_other_backends_have_them_from_pytorch():
    attention, norm = CellAttention(EveryStatistic(6)).double(), nn.BatchNorm2d(6, track_running_stats=False).double()
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return attention(x, norm=norm, activation="relu")[0].square().sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    attention.backend = "reference"
    torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], expected)


def test_inplace():
    attention = create_attention("srm", 6).eval()
    x = torch.randn(3, 6, 4, 5)
    with torch.no_grad():
        expected = attention(x)[0]
        y, _ = attention(x, inplace=True)
    assert y is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("backend", [None, "simulated"])
@pytest.mark.parametrize("kind", ["batch", "running"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_far_from_zero(layout, kind, backend):
    """Results and gradients keep their digits: the mean is taken off in two parts, of which neither is lost."""
    ops_of("simulated")
    torch.manual_seed(0)
    attention, norm = CellAttention(EveryStatistic(8), backend=backend), nn.BatchNorm2d(8).train(kind == "batch")
    # No two of a channel alike: of equal ones either may count.
    values = torch.rand(3, 8, 25).argsort(2).view(3, 8, 5, 5) * torch.rand(3, 8, 1, 1).add(1) / 256
    z = LAYOUTS[layout](1e4 + torch.randn(8, 1, 1) / 3 + values)
    norm.running_mean.copy_(z.mean((0, 2, 3))), norm.running_var.fill_(1 / 64**2)
    dy, found = torch.randn(z.shape), []
    for wide in (False, True):
        module = copy.deepcopy(attention).double() if wide else attention
        module.backend = "reference" if wide else backend
        own, maps = (copy.deepcopy(norm).double(), (z.double(), dy.double())) if wide else (norm, (z, dy))
        leaves = (maps[0].requires_grad_(), *module.parameters(), *own.parameters())
        y, _ = module(maps[0], norm=own)
        found.append([y, *torch.autograd.grad(y, leaves, maps[1])])
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).abs().max() <= 2e-5 * truth.abs().max()


@pytest.mark.parametrize("name", ["native", "simulated"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [6, 16])
def test_deviations_tell_samples_apart(size, layout, name):
    """A norm over the samples, as SRM's, sees what deviations differ by: that is held to eager PyTorch's error."""
    ours, theirs = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        z, gamma = LAYOUTS[layout](torch.randn(4, 16, size, size)), torch.rand(16) + 0.5
        variance = ops_of(name).norm_pool(z, gamma, None, None, None, 1e-5, 1, True, False, False)[4]
        found = (variance * gamma.square() + functional.STD_EPS).sqrt().float()
        x = nn.functional.batch_norm(z, None, None, gamma, None, training=True)
        truth = nn.functional.batch_norm(z.double(), None, None, gamma.double(), None, training=True)
        by_torch, true = ((t.var((2, 3)) + functional.STD_EPS).sqrt() for t in (x, truth))
        for into, t in ((ours, found), (theirs, by_torch)):
            apart = (t.double() - t.double().mean(0)) - (true - true.mean(0))
            into.append(apart.square().mean())
    assert torch.stack(ours).mean().sqrt() <= 2 * torch.stack(theirs).mean().sqrt()
