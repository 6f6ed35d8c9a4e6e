"""``backend="simulated"``: the operators and whole networks through the GPU kernels, held to the reference."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from simulated_backend import device, launches, library
from torch import nn
from torch.nn import functional as F
from two_blocks import (
    assert_a_far_first_value_spoils_no_variance,
    assert_at_once_is_one_by_one,
    assert_gradients_at_a_far_mean,
    assert_halves_are_the_whole_on_a_gpu,
    shared_gradients,
)

from dia_kernels import CELLS, SharedAttention, backends, create_attention, models, norms, operators

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = ["sweeps", "products", "clusters"]


@pytest.fixture(autouse=True)
def backend() -> None:
    library()


@pytest.fixture(params=LAYOUTS)
def layouts(request: pytest.FixtureRequest) -> Iterator[str]:
    with device(request.param):
        yield request.param


def two_blocks(attention: SharedAttention, norm: nn.Module | None, x, s, relu: bool):
    """Two steps of a stage, the second on the first one's state and map; every result that a gradient may come from."""
    activation = "relu" if relu else None
    y, state = attention(x, shortcut=s, activation=activation, norm=norm)
    z, (h, c) = attention(y * 0.5, state, shortcut=y, activation=activation, norm=norm)
    return [z, h, c]


def assert_gradients_agree(attention, norm, x, s, relu: bool = True) -> None:
    other = copy.deepcopy(attention)
    other.backend = "reference"
    leaves = [t for t in (x, s) if t is not None] + [*attention.parameters()]
    found, expected = [], []
    for module, into in ((attention, found), (other, expected)):
        own = None if norm is None else copy.deepcopy(norm)
        wanted = [t for t in (x, s) if t is not None] + [*module.parameters()] + ([*own.parameters()] if own else [])
        results = two_blocks(module, own, x, s, relu)
        into += [t.detach() for t in results]
        into += torch.autograd.grad(sum(t.float().square().sum() for t in results), wanted)
        into += [] if own is None else [b.clone() for b in own.buffers()]
    assert len(found) == len(expected) > len(leaves)
    # Each map between is rounded to its type: what follows differs by as much, in whatever type.
    share = 1e-4 if x.dtype == torch.float32 else 8 * torch.finfo(x.dtype).eps
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=share, atol=share * max(1.0, b.float().abs().max().item()))


def maps(shape, dtype=torch.float32, channels_last: bool = False) -> list[torch.Tensor]:
    drawn = (torch.randn(shape).to(dtype) for _ in range(2))
    if channels_last:
        drawn = (t.contiguous(memory_format=torch.channels_last) for t in drawn)
    return [t.requires_grad_() for t in drawn]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch", "running", "batch without affine"])
def test_every_gradient(layouts, norm, channels_last, relu):
    x, s = maps((5, 6, 5, 5), channels_last=channels_last)
    module = None
    if norm != "none":
        module = nn.BatchNorm2d(6, affine="without" not in norm).train("batch" in norm)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(6))
    assert_gradients_agree(SharedAttention(6, 2, backend="simulated"), module, x, s, relu)


def test_no_shortcut_and_tanh(layouts):
    x, _ = maps((3, 6, 4, 4))
    assert_gradients_agree(SharedAttention(6, 2, output="tanh", backend="simulated"), nn.BatchNorm2d(6), x, None)


@pytest.mark.parametrize("dim", [1, -1])
def test_tokens(layouts, dim):
    x, s = maps((3, 6, 6))
    assert_gradients_agree(SharedAttention(6, 2, channel_dim=dim, backend="simulated"), None, x, s)


def test_stacked_layers():
    x, s = maps((3, 6, 4, 4))
    assert_gradients_agree(SharedAttention(6, 2, num_layers=2, backend="simulated"), None, x, s)


@pytest.mark.parametrize("norm", [False, True])
def test_bfloat16(layouts, norm):
    x, s = maps((3, 6, 4, 4), torch.bfloat16)
    assert_gradients_agree(SharedAttention(6, 2, backend="simulated"), nn.BatchNorm2d(6) if norm else None, x, s)


@pytest.mark.parametrize(
    "limits",
    [
        {"multiprocessors": 1},
        {"multiprocessors": 16, "l2": 1 << 20},
        {"l2": 8 << 10},
        {"multiprocessors": 7, "flops": 1e10},
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["none", "batch", "running"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_gpu(limits, norm, channels_last):
    x, s = maps((9, 26, 7, 5), channels_last=channels_last)
    attention = SharedAttention(26, 2, backend="simulated")
    module = None if norm == "none" else nn.BatchNorm2d(26).train(norm == "batch")
    for kind in ("any", "sweeps"):
        with device(kind, **limits):
            assert_gradients_agree(attention, module, x, s)


@pytest.mark.parametrize("norm", ["none", "batch", "running"])
@pytest.mark.parametrize("kind", ["sweeps", "products"])
def test_chunks_of_samples(kind, norm):
    """A second-level cache that holds the maps of two samples, or of none."""
    x, s = maps((5, 8, 6, 6))
    module = None if norm == "none" else nn.BatchNorm2d(8).train(norm == "batch")
    for l2 in (10 << 10, 1 << 10):
        with device(kind, l2=l2, flops=3e12 + l2):
            attention = SharedAttention(8, 2, backend="simulated")
            assert_gradients_agree(attention, module, x, s)
            launches()
            attention(x, norm=module)
            chunks = launches().count("Reduce")
            assert chunks == (1 if norm == "batch" or l2 < 2048 else 3), chunks


def test_views_and_phases(layouts):
    """Maps that begin anywhere, and samples with gaps between."""
    memory = torch.randn(2, 5 * 7 * 3 * 3 + 11)
    x, s = (row[k + 1 : k + 1 + 5 * 7 * 9].view(5, 7, 3, 3)[:, 1:].requires_grad_() for k, row in enumerate(memory))
    assert_gradients_agree(SharedAttention(6, 2, backend="simulated"), nn.BatchNorm2d(6), x, s)
    permuted = torch.randn(5, 3, 6, 3).transpose(1, 2).requires_grad_()
    assert_gradients_agree(SharedAttention(6, 2, backend="simulated"), nn.BatchNorm2d(6), permuted, s)


def test_samples_an_odd_number_of_elements_apart(layouts):
    """The first sample begins at sixteen bytes and the others do not."""
    x, s = (torch.randn(4, 6 * 64 + 1)[:, : 6 * 64].view(4, 6, 8, 8).requires_grad_() for _ in range(2))
    for norm in (None, nn.BatchNorm2d(6).eval()):
        assert_gradients_agree(SharedAttention(6, 2, backend="simulated"), norm, x, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 12, 7, 7), (9, 25, 3, 3), (2, 102, 5, 5)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_shared_memory_as_planned(shape, dtype, channels_last):
    """Blocks of 256 threads, as on a card: the machine refuses what takes more than the plan has asked for."""
    x, s = maps(shape, dtype, channels_last)
    attention = SharedAttention(shape[1], 4, backend="simulated")
    for kind in LAYOUTS:
        for norm in (None, nn.BatchNorm2d(shape[1])):
            with device(kind, threads=256, multiprocessors=2):
                y, (h, _) = attention(x, norm=norm, shortcut=s, activation="relu")
                (y.float().sum() + h.sum()).backward()


def test_in_place(layouts):
    attention = SharedAttention(6, 2, backend="simulated").requires_grad_(False)
    for x in (torch.randn(4, 6, 5, 5), torch.randn(4, 5, 6, 5).transpose(1, 2), torch.randn(4, 5, 5, 6).movedim(-1, 1)):
        for shortcut in (None, torch.randn_like(x), x, x.roll(1, 0)):
            expected, state = attention(x, shortcut=shortcut, activation="relu")
            own = x.clone(memory_format=torch.preserve_format)
            y, (h, c) = attention(own, shortcut=own if shortcut is x else shortcut, activation="relu", inplace=True)
            assert y.data_ptr() == own.data_ptr()
            for a, b in zip((y, h, c), (expected, *state), strict=True):
                torch.testing.assert_close(a, b)


def test_in_place_over_a_part_of_the_shortcut(layouts):
    attention = SharedAttention(6, 2, backend="simulated").requires_grad_(False)
    memory = torch.randn(5, 6, 4, 4)
    expected, _ = attention(memory[:4].clone(), shortcut=memory[1:].clone())
    y, _ = attention(memory[:4], shortcut=memory[1:], inplace=True)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (3, 6, 0, 4)])
def test_no_elements(layouts, shape):
    attention = SharedAttention(6, 2, backend="simulated")
    other = copy.deepcopy(attention)
    other.backend = "reference"
    x, s = maps(shape)
    found, expected = [], []
    for module, into in ((attention, found), (other, expected)):
        y, (h, c) = module(x, shortcut=s, activation="relu")
        into += [y, h, c]
        if shape[0] > 0:
            continue  # every mean is NaN, and what a NaN times 0 is worth nobody asks
        into += torch.autograd.grad(y.sum() + h.nan_to_num().sum() + c.nan_to_num().sum(), [x, *module.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_only_what_is_asked_for(layouts):
    attention = SharedAttention(6, 2, backend="simulated").requires_grad_(False)
    other = copy.deepcopy(attention)
    other.backend = "reference"
    state = tuple(torch.randn(4, 6) for _ in range(2))
    for needed in ("x", "shortcut", "state"):
        grads = []
        for module in (attention, other):
            torch.manual_seed(1)
            x, s = (torch.randn(4, 6, 3, 3) for _ in range(2))
            h, c = (t.clone() for t in state)
            leaves = {"x": [x], "shortcut": [s], "state": [h, c]}[needed]
            for leaf in leaves:
                leaf.requires_grad_()
            y, (new_h, _) = module(x, (h, c), shortcut=s, activation="relu")
            grads.append(torch.autograd.grad(y.square().sum() + new_h.sum(), leaves))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 72, 264])
@pytest.mark.parametrize(
    ("norm", "forward", "backward"),
    [
        (None, ["Reduce", "BottleneckSums", "JoinParts", "CellStates", "Spread"],
         ["Reduce", "SplitGateGradients", "BottleneckGradientSums", "JoinParts", "CellGradients", "clear",
          "WeightGradients", "Spread"]),
        ("batch",
         ["Reduce", "BatchStatistics", "BottleneckSums", "JoinParts", "CellStates", "Spread"],
         ["Reduce", "SplitGateGradients", "BottleneckGradientSums", "JoinParts", "CellGradients", "NormGradients",
          "clear", "WeightGradients", "Spread"]),
        ("running",
         ["GivenStatistics", "Reduce", "BottleneckSums", "JoinParts", "CellStates", "Spread"],
         ["Reduce", "SplitGateGradients", "BottleneckGradientSums", "JoinParts", "CellGradients", "clear",
          "WeightGradients", "Spread", "NormGradients"]),
    ],
)  # fmt: skip
def test_launches(norm, forward, backward, channels):
    """Sums of up to 256 terms, C forward and 4 C backward, have no parts to join; without a state, what h multiplies
    has a gradient of zeros."""
    x, s = maps((4, channels, 4, 4))
    module = None if norm is None else nn.BatchNorm2d(channels).train(norm == "batch")
    with device("sweeps", l2=1 << 20, multiprocessors=8):
        y, _ = SharedAttention(channels, 2, backend="simulated")(x, norm=module, shortcut=s, activation="relu")
        assert launches() == [name for name in forward if name != "JoinParts" or channels > 256]
        y.sum().backward()
        assert launches() == [name for name in backward if name != "JoinParts" or 4 * channels > 256]


@pytest.mark.parametrize(
    ("norm", "forward", "backward"),
    [
        (None, ["ClusterStep"], ["ClusterGradient", "clear", "WeightGradients", "Spread"]),
        ("running", ["GivenStatistics", "ClusterStep"],
         ["ClusterGradient", "clear", "WeightGradients", "Spread", "NormGradients"]),
        ("batch", ["Reduce", "BatchStatistics", "ClusterStep"],
         ["ClusterGradient", "NormGradients", "clear", "WeightGradients", "Spread"]),
    ],
)  # fmt: skip
def test_launches_of_clusters(norm, forward, backward):
    """Weights beyond a block's memory need sweeps."""
    x, s = maps((4, 8, 4, 4))
    module = None if norm is None else nn.BatchNorm2d(8).train(norm == "batch")
    with device("clusters"):
        y, _ = SharedAttention(8, 2, backend="simulated")(x, norm=module, shortcut=s, activation="relu")
        assert launches() == forward
        y.sum().backward()
        assert launches() == backward
        SharedAttention(384, 2, backend="simulated")(torch.randn(2, 384, 2, 2))
        assert "Reduce" in launches()


@pytest.mark.parametrize(
    ("norm", "forward", "backward"),
    [
        ("batch", ["Reduce", "BatchStatistics", "NormFactors", "Spread"],
         ["Reduce", "ScaleGradients", "NormGradients", "Spread"]),
        ("running", ["GivenStatistics", "Reduce", "NormFactors", "Spread"],
         ["Reduce", "ScaleGradients", "NormGradients", "Spread"]),
    ],
)  # fmt: skip
def test_launches_around_a_cell_that_is_not_here(norm, forward, backward):
    x, s = maps((4, 8, 4, 4))
    module = nn.BatchNorm2d(8).train(norm == "batch")
    with device():
        y, _ = create_attention("dsu", 8, 2, backend="simulated")(x, norm=module, shortcut=s, activation="relu")
        assert launches() == forward
        y.sum().backward()
        assert launches() == backward


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 3), (torch.bfloat16, 4), pytest.param(torch.float32, 66, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("norm", [False, True])
def test_blocks_that_share_parameters(layouts, norm, dtype, count):
    """From the second block on the gradient of the parameters is one launch for all, of sixty-four at a time."""
    attention = SharedAttention(10, 3, backend="simulated")
    own = nn.BatchNorm2d(10) if norm else None
    x, s = maps((3, 10, 3, 2), dtype=dtype)
    launches()
    found = shared_gradients(attention, own, x, s, count, at_once=True)
    assert launches().count("WeightGradients") == 1 + -(-(count - 1) // 64)
    again = shared_gradients(attention, own, x, s, count, at_once=True)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    launches()
    expected = shared_gradients(attention, own, x, s, count, at_once=False)
    assert launches().count("WeightGradients") == count
    assert_at_once_is_one_by_one(found, expected)


@pytest.mark.parametrize(("name", "expected"), [("sweeps", "Reduce"), ("clusters", "ClusterStep"), ("teams", None)])
def test_plans_by_the_environment(name, expected):
    """``DIA_KERNELS_PLANS``, read at the first call of a process."""
    code = """
import torch
from simulated_backend import launches, library
from dia_kernels import SharedAttention
library()
SharedAttention(6, 2, backend="simulated")(torch.randn(2, 6, 3, 3))
print(launches()[0])
"""
    environment = os.environ | {"DIA_KERNELS_PLANS": name, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if expected is None:
        assert "DIA_KERNELS_PLANS: expected one of any, sweeps, products, clusters, got teams" in result.stderr
    else:
        assert result.stdout.split() == [expected], result.stderr


@pytest.mark.parametrize("samples", [1, 2, 7, 16, 33, 40])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_number_of_samples_by_clusters(samples, channels_last):
    """Two clusters at a time: of one sample to sixteen, and more than they take at once; the last one has fewer."""
    x, s = maps((samples, 24, 3, 3), channels_last=channels_last)
    with device("clusters", l2=1 << 20):
        assert_gradients_agree(SharedAttention(24, 3, backend="simulated"), None, x, s)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [pytest.param(False, marks=pytest.mark.slow), True])
def test_clusters_of_as_many_threads_as_on_a_card(channels_last, dtype):
    """The machine refuses what takes more shared memory than the plan asked for, most where a map comes in packs."""
    attention = SharedAttention(56, 3, backend="simulated")
    for norm in (None, nn.BatchNorm2d(56), nn.BatchNorm2d(56).eval()):
        for samples in (3, 33):
            x, s = maps((samples, 56, 5, 5), dtype, channels_last)
            with device("clusters", threads=512, l2=1 << 20):
                assert_gradients_agree(attention, norm, x, s)


def test_trial_22_no_block_waits_for_another(layouts):
    """Blocks run one after the other, each to its end, in an order drawn anew for each launch; whoever waited would do
    so for ever. Blocks of a cluster, which a card runs together, wait for each other and for no other cluster."""
    x, s = maps((5, 8, 6, 6))
    with device(layouts, multiprocessors=8):
        for norm in (None, nn.BatchNorm2d(8)):
            assert_gradients_agree(SharedAttention(8, 2, backend="simulated"), norm, x, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["none", "batch", "running"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_tasks_of_a_sample(channels_last, norm, dtype):
    """Samples large enough for several tasks of a sample in the second sweep."""
    x, s = maps((3, 64, 17, 16), dtype, channels_last)
    module = None if norm == "none" else nn.BatchNorm2d(64).train(norm == "batch")
    with device("sweeps", multiprocessors=8, l2=1 << 20):
        assert_gradients_agree(SharedAttention(64, 8, backend="simulated"), module, x, s)


def test_parameters_at_any_place_in_memory():
    """Rows of sixteen bytes that do not begin at sixteen bytes: views of one tensor, as sharded training has them."""
    attention, apart = SharedAttention(16, 2, backend="simulated"), SharedAttention(16, 2, backend="simulated")
    memory = torch.zeros(1 + sum(p.numel() for p in attention.parameters()))
    begin = 1
    for name, p in attention.named_parameters():
        view = memory[begin : begin + p.numel()].view(p.shape)
        view.copy_(p.detach())
        apart.get_parameter(name).data = view
        begin += p.numel()
    assert apart.input_reduce_weight.data_ptr() % 16 != 0
    x, s = maps((3, 16, 3, 3))
    found = [a(x, (torch.ones(3, 16), torch.ones(3, 16)), shortcut=s, activation="relu") for a in (attention, apart)]
    for (y, (h, _)), (yy, (hh, _)) in [found]:
        assert torch.equal(y, yy)
        assert torch.equal(h, hh)
    gradients = [
        torch.autograd.grad(y.sum() + h.sum(), [x, *a.parameters()])
        for a, (y, (h, _)) in zip((attention, apart), found, strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("phase", [0, 1])
def test_tasks_of_many_channels(phase):
    """More than threads where a map comes in packs; a view that does not takes fewer."""
    attention = SharedAttention(320, 80, backend="simulated")
    memory = torch.randn(2 * 320 * 6 + 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = memory[phase : phase + 2 * 320 * 6].view(2, 2, 3, 320).permute(0, 3, 1, 2).requires_grad_()
    s = torch.randn(2, 320, 2, 3).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    with device("sweeps", multiprocessors=1):
        assert_gradients_agree(attention, None, x, s)
        assert_gradients_agree(attention, nn.BatchNorm2d(320), x, s)


def test_bottlenecks_in_parts():
    """Channels enough for sums of both bottlenecks, forward and backward, that several blocks share."""
    x, s = maps((3, 130, 2, 3))
    for norm in (None, nn.BatchNorm2d(130)):
        with device("sweeps"):
            assert_gradients_agree(SharedAttention(130, 20, backend="simulated"), norm, x, s)


def test_a_far_first_value_spoils_no_variance():
    assert_a_far_first_value_spoils_no_variance("simulated")


def test_gradients_at_a_far_mean():
    assert_gradients_at_a_far_mean("simulated")


def test_wrong_arguments_of_the_operators():
    operator = backends._backends["simulated"].operators.step
    weights = SharedAttention(6, 2).lstm_parameters()
    for fault, message in (
        ({"x": torch.zeros(2, 5, 3, 3)}, "input_reduce_weight: wrong sizes"),
        ({"x": torch.zeros(2, 6, 3, 3, dtype=torch.float64)}, "unexpected dtype|float32"),
        ({"shortcut": torch.zeros(2, 6, 3, 4)}, "shortcut: expected sizes"),
        ({"h": torch.zeros(2, 6)}, "state: expected both"),
    ):
        given = {"x": torch.zeros(2, 6, 3, 3), "shortcut": None, "h": None, "c": None} | fault
        with pytest.raises(RuntimeError, match=message):
            operator(*given.values(), *(p.detach() for p in weights), 1, True, False, False, False)


def test_digits_of_a_mean_far_from_zero(layouts):
    """A channel of mean 1e4 and deviation 1e-2, against the step in float64 (DESIGN, section 11)."""
    z = 1e4 + 0.01 * torch.randn(4, 6, 8, 8)
    norm, attention = nn.BatchNorm2d(6), SharedAttention(6, 2, backend="simulated")
    wide = copy.deepcopy(attention).double()
    wide.backend = "reference"
    truth, _ = wide(z.double(), norm=copy.deepcopy(norm).double())
    y, _ = attention(z, norm=norm)
    assert (y.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_double_maps_go_to_the_reference():
    attention = SharedAttention(6, 2, backend="simulated")
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention.double()(x)[0], (x,))


def test_transforms_and_second_derivatives_know_the_backend():
    attention = SharedAttention(6, 2, backend="simulated")
    x = torch.randn(2, 6, 3, 3)
    together = torch.func.vmap(lambda x: attention(x[None])[0][0])(x)
    torch.testing.assert_close(together, attention(x)[0], rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(attention(x)[0].square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert ddx.isfinite().all()


def test_compiled_graphs_call_its_operators():
    attention = SharedAttention(6, 2, backend="simulated")
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    called = []
    kernel = backends.operators_of("simulated", x)

    def spy(graph, example):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    y, _ = torch.compile(attention, backend=spy, fullgraph=True)(x)
    y.sum().backward()
    assert kernel.step in called
    assert operators.native.step not in called
    assert x.grad is not None


@pytest.mark.parametrize("channels_last", [False, True])
def test_results_are_as_the_fakes_promise(layouts, channels_last):
    """Shapes, dtypes and strides, by opcheck: what a compiler will rely on."""
    simulated = backends._backends["simulated"].operators
    x, s = maps((3, 6, 5, 5), channels_last=channels_last)
    weights = [p.detach().requires_grad_() for p in SharedAttention(6, 2).lstm_parameters()]
    state = [torch.randn(3, 6) for _ in range(2)]
    opcheck = torch.library.opcheck
    opcheck(simulated.step, (x, s, *state, *weights, 1, True, False, True, False))
    frozen = [w.detach() for w in weights]
    x, s = x.detach(), s.detach()
    y, _, c, tables, _ = simulated.step(x, s, *state, *frozen, 1, True, False, True, False)
    given = (torch.randn_like(y), None, None, x, y, *state, c, tables, *frozen[::2], 1, True, False)
    opcheck(simulated.step_backward, (*given, True, True, True, True, False))
    opcheck(simulated.step_backward, (*given, True, False, False, False, False))
    for statistics in ((None, None), (torch.zeros(6), torch.ones(6))):
        norm = (torch.ones(6), torch.zeros(6), *statistics)
        y, _, c, tables, *_ = simulated.tail(x, s, *state, *norm, 1e-5, *frozen, 1, True, False, False)
        opcheck(simulated.tail, (x, s, *state, *norm, 1e-5, *frozen, 1, True, False, False))
        given = (torch.randn_like(y), None, None, x, y, *state, c, tables, *norm[:2], *frozen[::2], 1, True, False)
        opcheck(simulated.tail_backward, (*given, statistics[0] is None, True, True, True, True, True, False))
    buffers = torch.zeros(6), torch.ones(6), torch.tensor(0)
    opcheck(simulated.tail_tracking_, (x, s, *state, *norm[:2], *buffers, 0.1, 1e-5, *frozen, 1, True, False, False))
    opcheck(simulated.statistics, (x, 1))
    factors = simulated.tail_backward(*given, False, False, False, True, True, False, True)[6]
    opcheck(simulated.parameter_gradients, ([factors] * 2, [tables] * 2, [state[0]] * 2, 3))
    joined = (x, s, *state, *norm[:2], *simulated.statistics(x, 1), 1e-5, *frozen, 1, True, False, False)
    opcheck(simulated.tail_join, joined)
    opcheck(simulated.tail_reduce, (*given, True, True, True))
    sums, g, dp, *_ = simulated.tail_reduce(*given, True, True, True)
    opcheck(simulated.tail_spread, (g, None, x, torch.rand(3, 6), dp, tables, norm[0], sums, 1))
    opcheck(simulated.pool, (x, 1))
    opcheck(simulated.rescale, (x, torch.rand(3, 6), s, 1, True))
    opcheck(simulated.rescale_backward, (y, x, torch.rand(3, 6), y, 1, True, True, True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_halves_of_the_gradient_are_the_whole(layouts, dtype, channels_last):
    simulated = backends._backends["simulated"].operators
    assert_halves_are_the_whole_on_a_gpu(simulated, "cpu", dtype, channels_last)


@pytest.mark.parametrize("factor", [0.1, 0.9])
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 12, 3), (2, 25, 3), (3, 102, 1)])
def test_the_statistics_of_a_batch_move_the_buffers_as_pytorch_does(layouts, shape, factor):
    """To the bits, from the mean and the variance that the operator gives where it moves nothing."""
    simulated = backends._backends["simulated"].operators
    x, channels = torch.randn(shape), shape[1]
    weights = [p.detach() for p in SharedAttention(channels, min(channels, 4)).lstm_parameters()]
    before, after = (x, *(None,) * 5), (1e-5, *weights, 1, True, False, False)
    *results, mean, var, mask = simulated.tail(*before, None, None, *after)
    norm = nn.BatchNorm1d(channels, momentum=factor)
    norm.running_mean, norm.running_var = torch.randn(2, channels)
    buffers = norm.running_mean.clone(), norm.running_var.clone(), torch.tensor(7)
    norms.update_buffers(norm, mean, var, shape[0] * shape[2])
    found = simulated.tail_tracking_(*before, *buffers, factor, *after)
    assert all(map(torch.equal, found, (*results, mask)))
    assert torch.equal(buffers[0], norm.running_mean)
    assert torch.equal(buffers[1], norm.running_var)
    assert buffers[2] == 8


@pytest.mark.parametrize("name", ["simulated", "reference"])
def test_a_name_is_given_once(name):
    with pytest.raises(ValueError, match="name: there is a backend"):
        backends.add(name, "cpu", {})


def test_a_kernel_has_an_operator():
    with pytest.raises(ValueError, match="kernels: there are no operators leap"):
        backends.add("other", "cpu", {"leap": lambda: None})
    assert "other" not in backends.names()


# --- whole networks ------------------------------------------------------------------------------------------


def trained(steps: int, backend: str, fold_norm: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a small DIA network after a few steps."""
    torch.manual_seed(0)
    network = models.create("resnet20", num_classes=4, attention="dia", fold_norm=fold_norm, backend=backend)
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    images = torch.randn(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(network(images), torch.tensor([0, 1, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        losses.append(F.cross_entropy(network(images), torch.tensor([0, 1, 3])).item())
    return losses, {k: v.detach() for k, v in network.state_dict().items()}


@pytest.mark.parametrize("fold_norm", [False, True])
def test_a_network_trains_through_the_gpu_kernels(layouts, fold_norm):
    found, weights = trained(3, "simulated", fold_norm)
    expected, others = trained(3, "reference", fold_norm)
    assert found == pytest.approx(expected, rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell(cell):
    """What pools and rescales are kernels; with its sample scale the LSTM's second call goes that way, too."""
    attention = create_attention(cell, 12, 3, blocks=2, backend="simulated")
    other = copy.deepcopy(attention)
    other.backend = "reference"
    x, s = maps((3, 12, 5, 4), channels_last=True)
    scale = torch.tensor([0.0, 2.0, 1.0])
    found, expected, launched = [], [], []
    for module, into in ((attention, found), (other, expected)):
        launches()
        y, state = module(x, shortcut=s, activation="relu")
        y, _ = module(y, state, shortcut=y, sample_scale=scale)
        into += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, s, *module.parameters()])]
        launched.append({"Reduce", "Spread"} & set(launches()))
    assert launched == [{"Reduce", "Spread"}, set()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, b.abs().max().item()))
