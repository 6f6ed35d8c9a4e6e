"""The CUDA backend on a card. Imports nothing but torch, pytest and the library, for a bare machine."""

from __future__ import annotations

import copy
import ctypes

import pytest
import sharing_processes
import torch
from torch import nn
from two_blocks import (
    assert_as_accurate,
    assert_at_once_is_one_by_one,
    assert_halves_are_the_whole_on_a_gpu,
    captured,
    errors,
    results,
    shared_gradients,
)

from dia_kernels import CELLS, SharedAttention, backends, create_attention, masks, models, operators, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.missing("cuda") is not None, reason=f"no CUDA backend: {backends.missing('cuda')}"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 64, 32, 32), (3, 102, 7, 7), (2, 25, 9, 5), (5, 12, 1, 1), (33, 256, 8, 8), (8, 512, 14, 14)]


@pytest.fixture(params=plan.LAYOUTS)
def layouts(request: pytest.FixtureRequest):
    """Each kind of plan (GpuLayouts of csrc/core/gpu_plan.h)."""
    library = ctypes.CDLL(str(operators.LIBRARY_PATH))
    library.dia_kernels_gpu_layouts(plan.LAYOUTS.index(request.param))
    yield request.param
    library.dia_kernels_gpu_layouts(0)


def maps(shape, dtype, channels_last: bool) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = [torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2)]
    if channels_last:
        drawn = [t.contiguous(memory_format=torch.channels_last) for t in drawn]
    return [t.requires_grad_() for t in drawn]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch", "running"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype, norm, channels_last, layouts):
    """Each result errs at most twice as much as eager PyTorch in the same dtype, plus an ulp of the largest value."""
    torch.manual_seed(0)
    attention = SharedAttention(shape[1], 4, backend="cuda").cuda()
    module = None if norm == "none" else nn.BatchNorm2d(shape[1]).cuda().train(norm == "batch")
    of, _ = errors(attention, module, *maps(shape, dtype, channels_last))
    assert_as_accurate([of], dtype)


def test_double_maps(layouts):
    attention = SharedAttention(6, 2).cuda().double()
    x = torch.randn(2, 6, 3, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x)[0], (x,))


@pytest.mark.parametrize("cell", ["lstm", "dsu"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_same_bits_every_time(norm, cell, layouts):
    attention = create_attention(cell, 128, 4, backend="cuda").cuda()
    module = nn.BatchNorm2d(128).cuda() if norm else None
    x, s = maps((16, 128, 16, 16), torch.bfloat16, True)
    first = results(attention, copy.deepcopy(module), x, s)
    for _ in range(19):
        for name, value in results(attention, copy.deepcopy(module), x, s).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.bfloat16, (128, 64, 32, 32)), (torch.bfloat16, (33, 256, 8, 8)), (torch.float32, (9, 102, 7, 7))],
)
def test_values_that_change_from_call_to_call(dtype, shape, norm, layouts):
    """Kernels that follow each other without a wait find in their tables' memory what earlier calls left there."""
    torch.manual_seed(0)
    attention = SharedAttention(shape[1], 4, backend="cuda").cuda()
    own = nn.BatchNorm2d(shape[1]).cuda() if norm else None
    pairs = [[t.detach().mul(k + 1).requires_grad_() for t in maps(shape, dtype, True)] for k in range(3)]
    expected = []
    for pair in pairs:
        expected.append(results(attention, copy.deepcopy(own), *pair))
        torch.cuda.synchronize()
    wrong = torch.zeros((), device="cuda")
    for k in torch.randint(3, (100,)).tolist():
        for name, value in results(attention, copy.deepcopy(own), *pairs[k]).items():
            wrong += (value != expected[k][name]).any()  # counted there: to ask would be to wait
    assert wrong.item() == 0


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape", "count"),
    [(torch.bfloat16, (128, 64, 32, 32), 18), (torch.float32, (33, 102, 7, 7), 5), (torch.float32, (4, 25, 9, 5), 66)],
    ids=str,
)
def test_blocks_that_share_parameters(dtype, shape, count, norm, layouts):
    torch.manual_seed(0)
    attention = SharedAttention(shape[1], 4, backend="cuda").cuda()
    own = nn.BatchNorm2d(shape[1]).cuda() if norm else None
    x, s = maps(shape, dtype, True)
    found, again = (shared_gradients(attention, own, x, s, count, at_once=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert_at_once_is_one_by_one(found, shared_gradients(attention, own, x, s, count, at_once=False))


def test_blocks_on_streams_in_turn(layouts):
    """The gradient that they share is made on one of them, from tables of the other."""
    attention = SharedAttention(64, 4, backend="cuda").cuda()
    x, s = maps((64, 64, 16, 16), torch.bfloat16, True)
    expected = shared_gradients(attention, None, x, s, 6, at_once=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        y, state = x, None
        before = torch.cuda.current_stream()
        for k in range(6):
            streams[k % 2].wait_stream(before)
            with torch.cuda.stream(streams[k % 2]):
                y, state = attention(y, state, shortcut=s, activation="relu")
            before = streams[k % 2]
        torch.cuda.current_stream().wait_stream(before)
        found = torch.autograd.grad(y.float().sum() + state[0].sum(), [*attention.parameters()])
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_a_side_stream(layouts):
    attention = SharedAttention(64, 4, backend="cuda").cuda()
    x, s = maps((8, 64, 32, 32), torch.float32, False)
    expected = results(attention, None, x, s)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # if a kernel ran on another stream it would be early
        later = [t.detach().mul(1).requires_grad_() for t in (x, s)]
        found = results(attention, None, *later)
    stream.synchronize()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("cell", ["lstm", "dsu"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_captured_graph(norm, cell, layouts):
    attention = create_attention(cell, 64, 4, backend="cuda").cuda().requires_grad_(False)
    module = nn.BatchNorm2d(64).cuda().requires_grad_(False) if norm else None
    x, s = (t.detach() for t in maps((8, 64, 16, 16), torch.float32, False))

    def call() -> torch.Tensor:
        y, state = attention(x, shortcut=s, activation="relu", norm=module)
        return attention(y, state, shortcut=s, activation="relu", norm=module)[0]

    graph, y = captured(call)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = y.clone()
        torch.testing.assert_close(replayed, call())


def test_two_models_on_two_streams(layouts):
    """Steps on two streams at once: neither meets the other's tables."""
    attentions = [SharedAttention(256, 4, backend="cuda").cuda() for _ in range(2)]
    pairs = [maps((16, 256, 28, 28), torch.bfloat16, False) for _ in range(2)]
    expected = [results(a, None, *pair) for a, pair in zip(attentions, pairs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        found = []
        for stream, attention, pair in zip(streams, attentions, pairs, strict=True):
            with torch.cuda.stream(stream):
                found.append(results(attention, None, *pair))
        torch.cuda.synchronize()
        for a, b in zip(found, expected, strict=True):
            for name, value in a.items():
                assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("norm", ["none", "batch", "running"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_of_several_times_the_second_level_cache(channels_last, norm, layouts):
    """As accurate as eager, and the same bits every time."""
    channels, side = 96, 40
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    shape = (3 * cache // (channels * side * side * 2) + 5, channels, side, side)
    attention = SharedAttention(channels, 4, backend="cuda").cuda()
    module = None if norm == "none" else nn.BatchNorm2d(channels).cuda().train(norm == "batch")
    tensors = maps(shape, torch.bfloat16, channels_last)
    of, _ = errors(attention, module, *tensors)
    assert_as_accurate([of], torch.bfloat16)
    first = results(attention, copy.deepcopy(module), *tensors)
    for _ in range(9):
        for name, value in results(attention, copy.deepcopy(module), *tensors).items():
            assert torch.equal(value, first[name]), name


def test_over_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    shape = (2**31 // (64 * 64 * 64) + 3, 64, 64, 64)
    if free < 5 * 2 * 2**31:
        pytest.skip(f"needs 20 GiB of GPU memory, {free / 2**30:.0f} are free")
    attention = SharedAttention(64, 4, backend="cuda").cuda().requires_grad_(False)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    y, (h, _) = attention(x, activation="relu")
    part = slice(-4, None)
    expected, (last, _) = attention(x[part].clone(), activation="relu")
    torch.testing.assert_close(h[part], last)
    assert torch.equal(y[part], expected)


@pytest.mark.parametrize("cell", ["lstm", "dsu"])
@pytest.mark.parametrize("norm", [False, True])
def test_in_place(norm, cell, layouts):
    attention = create_attention(cell, 64, 4, backend="cuda").cuda().requires_grad_(False)
    module = nn.BatchNorm2d(64).cuda().requires_grad_(False) if norm else None
    for channels_last in (False, True):
        x, s = (t.detach() for t in maps((8, 64, 16, 16), torch.float16, channels_last))
        expected, _ = attention(x, shortcut=s, activation="relu", norm=copy.deepcopy(module))
        y, _ = attention(x, shortcut=s, activation="relu", norm=module, inplace=True)
        assert y.data_ptr() == x.data_ptr()
        assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("cell", "norm"), [("lstm", "none"), ("lstm", "batch"), ("lstm", "running"), ("dsu", "batch"), ("dsu", "running")]
)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_from_a_mask(dtype, channels_last, cell, norm, layouts, monkeypatch):
    """The bits of the one from the result."""
    shape = (33, 64, 16, 16)
    attention = create_attention(cell, 64, 4, backend="cuda").cuda()
    module = None if norm == "none" else nn.BatchNorm2d(64).cuda().train(norm == "batch")
    found = results(attention, copy.deepcopy(module), *maps(shape, dtype, channels_last))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        attention(maps(shape, dtype, channels_last)[0], activation="relu", norm=copy.deepcopy(module))
    assert torch.uint8 in kept
    monkeypatch.setattr(operators.native, "masked_dtypes", {})
    for name, value in results(attention, copy.deepcopy(module), *maps(shape, dtype, channels_last)).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_halves_of_a_gradient_over_processes(dtype, channels_last, layouts):
    assert_halves_are_the_whole_on_a_gpu(operators.native, "cuda", dtype, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_mask_on_the_card(channels_last):
    x, s = (t.detach() for t in maps((5, 24, 9, 8), torch.bfloat16, channels_last))
    x[0, 0, 0, :3] = torch.tensor([0.0, float("nan"), -1.0])
    weights = [p.detach().cuda() for p in SharedAttention(24, 3).lstm_parameters()]
    y, *_, mask = operators.native.step(x, s, None, None, *weights, 1, True, False, True, True)
    assert torch.equal(mask, masks.make(y, 1))
    # Not with NaN, which is unequal to itself where results are compared.
    torch.library.opcheck(operators.native.step, (s, s, None, None, *weights, 1, True, False, True, True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_keep_their_promises(channels_last):
    x, s = maps((3, 12, 7, 7), torch.float32, channels_last)
    weights = [p.detach().cuda() for p in SharedAttention(12, 3).lstm_parameters()]
    torch.library.opcheck(operators.native.step, (x, s, None, None, *weights, 1, True, False, True, False))
    torch.library.opcheck(operators.native.pool, (x, 1))
    scale = torch.rand(3, 12, device="cuda")
    torch.library.opcheck(operators.native.rescale, (x, scale, s, 1, True))
    statistics = (None, None, None, None)
    torch.library.opcheck(operators.native.tail, (x, s, None, None, *statistics, 1e-5, *weights, 1, True, False, False))
    buffers = torch.zeros(12, device="cuda"), torch.ones(12, device="cuda"), torch.tensor(0, device="cuda")
    tracking = (x.detach(), s.detach(), *statistics, *buffers, 0.1, 1e-5, *weights, 1, True, False, False)
    torch.library.opcheck(operators.native.tail_tracking_, tracking)
    left = [[torch.randn(size, device="cuda") for _ in range(3)] for size in (3 * 54, 3 * 66, (3, 12))]
    torch.library.opcheck(operators.native.parameter_gradients, (*left, 3))
    z, s, dy = x.detach(), s.detach(), torch.randn_like(s)
    gamma, beta = torch.randn(2, 12, device="cuda")
    torch.library.opcheck(operators.native.norm_pool, (z, gamma, beta, None, None, 1e-5, 1, True, True, False))
    tracking = (z, gamma, beta, *buffers, 0.1, 1e-5, 1, True, True, False)
    torch.library.opcheck(operators.native.norm_pool_tracking_, tracking)
    pooled = operators.native.norm_pool(z, gamma, beta, None, None, 1e-5, 1, True, True, False)
    p, tables, _, _, variance, extreme, where, *_ = pooled
    rescale = (z, scale, s, tables, None, None, gamma, beta, 1, True, False)
    torch.library.opcheck(operators.native.norm_rescale, rescale)
    given = (dy, operators.native.norm_rescale(*rescale)[0], z, scale, tables, gamma, beta, 1, True)
    torch.library.opcheck(operators.native.norm_rescale_backward, given)
    _, handed, g = operators.native.norm_rescale_backward(*given)
    statistics = (p, variance, variance, p, extreme, where)
    torch.library.opcheck(
        operators.native.norm_pool_backward, (g, handed, *statistics, z, tables, gamma, 1, True, True)
    )


@pytest.mark.parametrize(
    ("cell", "norm"),
    [(cell, "none") for cell in CELLS]
    + [(c, norm) for c in ("dsu", "se", "eca", "srm", "cbam") for norm in ("batch", "running")],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cell(cell, dtype, norm):
    """Two blocks that share it; what pools and rescales are the operators."""
    torch.manual_seed(0)
    attention = create_attention(cell, 64, 4, blocks=2, backend="cuda").cuda()
    module = None if norm == "none" else nn.BatchNorm2d(64).cuda().train(norm == "batch")
    of, _ = errors(attention, module, *maps((4, 64, 16, 16), dtype, True))
    assert_as_accurate([of], dtype)


def test_a_converted_network():
    """Results and gradients of the CUDA backend and of the reference."""
    found = []
    for backend in ("cuda", "reference"):
        model = sharing_processes.network(backend).float().cuda()
        x = sharing_processes.images(0).float().cuda()
        y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        # A bias before a norm has no gradient but rounding.
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-6


def test_a_compiled_network_is_the_eager_one():
    torch.manual_seed(0)
    network = models.create("resnet20", num_classes=4, attention="dia").cuda().eval()
    images = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        expected = network(images)
        found = torch.compile(network, fullgraph=True)(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_network_trains_as_the_reference_does():
    losses = []
    for backend in ("cuda", "reference"):
        torch.manual_seed(0)
        network = models.create("resnet20", num_classes=4, attention="dia", backend=backend).cuda()
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        images, labels = torch.randn(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda") % 4
        of_backend = []
        for _ in range(5):
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            of_backend.append(loss.item())
        losses.append(of_backend)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
