"""A batch norm folded into pooling and rescaling around a cell of any kind, against the norm called by itself."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import simulated_backend
import torch
from accuracy import assert_accurate
from functorch.compile import make_boxed_func
from normed_stages import LAYOUTS, Stage, assert_equal_in_float64, folds, gradients
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dia_kernels import (
    Cell,
    CellAttention,
    SharedAttention,
    backends,
    create_attention,
    operators,
    use_backend,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        operators.library_error is not None,
        reason=f"without kernels a norm is called by itself: {operators.library_error}",
    ),
]


def attention_of(cell: str, c: int, **options) -> nn.Module:
    if cell == "stacked":
        return SharedAttention(c, min(c, 2), num_layers=2, **options)
    if cell == "lstm":
        return SharedAttention(c, min(c, 2), **options)
    return create_attention(cell, c, min(c, 2), **options)


def stage_of(cell: str, c: int, kind: str = "batch", **options) -> Stage:
    torch.manual_seed(c)
    return Stage(attention_of(cell, c), c, kind, **options)


OPERATORS = pytest.mark.parametrize("backend", ["fallback", "cpu"], indirect=True)


@OPERATORS
@pytest.mark.parametrize("kind", ["batch", "running", "bare", "pair"])
@pytest.mark.parametrize("cell", ["dsu", "se", "eca", "stacked"])
@pytest.mark.parametrize("shape", [(3, 12, 7, 7), (2, 25, 9), (2, 6, 3, 2, 4), (5, 102, 1, 1)], ids=str)
def test_cells_and_norms(cell, kind, shape, backend):
    stage = stage_of(cell, shape[1], kind, dims=len(shape) - 2, activation="relu")
    x, s, dy = torch.randn(3, *shape, dtype=torch.float64)
    expected = gradients(stage, x, s, dy, apart=True)
    # The gradient behind a norm whose values lie about their mean loses what the deviation takes from it.
    assert_equal_in_float64(gradients(stage, x, s, dy), expected, 16 * shape[0] * shape[1])


@OPERATORS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options(layout, with_shortcut, relu, training, backend):
    stage = stage_of("se", 25, "batch" if training else "running", activation="relu" if relu else None)
    x, s, dy = torch.randn(3, 3, 25, 6, 5, dtype=torch.float64)
    x, s = LAYOUTS[layout](x), LAYOUTS[layout](s) if with_shortcut else None
    assert_equal_in_float64(gradients(stage, x, s, dy), gradients(stage, x, s, dy, apart=True), 1200)


@pytest.mark.parametrize("backend", [None, "simulated"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_contract(dtype, layout, training, backend):
    """Against float64, with the norm and the attention as they are in PyTorch as the yardstick."""
    if backend == "simulated":
        simulated_backend.library()
    found, truth, eager = [], [], []
    for seed in range(6):
        torch.manual_seed(seed)
        attention = create_attention("dsu", 16, 4, backend=backend)
        plain = copy.deepcopy(attention)
        plain.backend = "reference"
        norm = nn.BatchNorm2d(16).train(training)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        z, s, dy = (LAYOUTS[layout](t.to(dtype)) for t in torch.randn(3, 6, 16, 4, 6))
        z = z + 2
        with torch.no_grad():  # away from the ReLU's kink
            before = copy.deepcopy(plain).double()(z.double(), norm=copy.deepcopy(norm).double(), shortcut=s.double())[
                0
            ]
        s = torch.where(before.abs() < 1 / 16, s + torch.where(before < 0, -1 / 8, 1 / 8).to(dtype), s)
        for into, module, wide in ((found, attention, None), (truth, plain, torch.float64), (eager, plain, None)):
            module, own = copy.deepcopy(module), copy.deepcopy(norm)
            module, own = (module, own) if wide is None else (module.double(), own.double())
            maps = [t.to(wide or dtype).detach().requires_grad_() for t in (z, s)]
            y, _ = module(maps[0], norm=own, shortcut=maps[1], activation="relu")
            assert folds(y) is (into is found)
            leaves = {"z": maps[0], "s": maps[1]} | dict(own.named_parameters()) | dict(module.named_parameters())
            grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
            into.append({"y": y.detach()} | dict(zip(leaves, grads, strict=True)))
    for name in found[0]:
        ours, true, theirs = (torch.stack([of[name] for of in results]) for results in (found, truth, eager))
        assert_accurate(ours, true, theirs, name, 6 * 24)


def test_tokens_take_an_affine():
    attention = create_attention("dsu", 6, 2, channel_dim=-1).double()
    x, scale, bias = (
        t.requires_grad_() for t in (torch.randn(3, 7, 6).double(), torch.rand(6).double(), torch.randn(6).double())
    )
    y, expected = attention(x, norm=(scale, bias))[0], attention(x * scale + bias)[0]
    assert folds(y)
    torch.testing.assert_close(y, expected)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (x, scale, bias)) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", ["lstm", "stacked", "dsu"])
@pytest.mark.parametrize("training", [True, False])
def test_a_sample_scale(cell, training):
    """Stochastic depth folds the norm too; a dropped sample still counts in its statistics."""
    k = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)
    stage = stage_of(cell, 12, "batch" if training else "running", activation="relu", sample_scale=k)
    x, s, dy = torch.randn(3, 3, 12, 5, 5, dtype=torch.float64)
    assert_equal_in_float64(gradients(stage, x, s, dy), gradients(stage, x, s, dy, apart=True), 600)


@pytest.mark.parametrize("relu", [True, False])
def test_only_what_is_asked_for(relu):
    stage = stage_of("dsu", 6, activation="relu" if relu else None).double()
    x, s, dy = torch.randn(3, 3, 6, 4, 5, dtype=torch.float64)
    every = gradients(stage, x, s, dy)
    for name in ("x", "shortcut", *dict(stage.named_parameters())):
        alone = copy.deepcopy(stage)
        leaves = {"x": x.clone(), "shortcut": s.clone()} | dict(alone.named_parameters())
        for key, t in leaves.items():
            t.requires_grad_(key == name)
        y = alone(leaves["x"], leaves["shortcut"])
        (found,) = torch.autograd.grad(y, leaves[name], dy)
        assert torch.equal(found, every[f"d {name}"]), name
        # The same of a graph in which all require grad.
        alone = copy.deepcopy(stage)
        leaves = {"x": x.clone().requires_grad_(), "shortcut": s.clone().requires_grad_()} | dict(
            alone.named_parameters()
        )
        (found,) = torch.autograd.grad(alone(leaves["x"], leaves["shortcut"]), leaves[name], dy)
        assert torch.equal(found, every[f"d {name}"]), name


@pytest.mark.parametrize("kind", ["batch", "running", "bare"])
@pytest.mark.parametrize("relu", [True, False])
def test_first_and_second_derivatives(kind, relu):
    stage = stage_of("se", 4, kind, activation="relu" if relu else None).double()
    values = [torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(stage, values)
    assert gradgradcheck(stage, values, atol=1e-4)
    # With respect to the parameters: a derivative of the gradient of the maps, against that of the norm by itself.
    found = []
    for apart in (False, True):
        y = stage(*values, apart)
        (dx,) = torch.autograd.grad(y.square().sum(), values[0], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [*values, *stage.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Constant(Cell):
    """A scale that no map has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, pooled, state):
        return self.scale.expand(pooled.shape[0], 6), state


def test_a_cell_that_looks_at_no_map():
    attention, norm = CellAttention(Constant()).double(), nn.BatchNorm2d(6).double()
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    leaves = (x, norm.weight, norm.bias, attention.cell.scale)
    found, expected = (
        torch.autograd.grad(y.pow(3).sum(), leaves) for y in (attention(x, norm=norm)[0], attention(norm(x))[0])
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_state_alone():
    """A pass that comes by the pooling, and by no rescaling."""
    attention, norm = create_attention("dsu", 6, 2).double(), nn.BatchNorm2d(6).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    leaves = (x, norm.weight, norm.bias)
    found, expected = (
        torch.autograd.grad(state[1].pow(3).sum(), leaves)
        for state in (attention(x, norm=norm)[1], attention(norm(x))[1])
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_passes_do_not_meet():
    """Several through one graph, one that fails among them, and some of several threads."""
    stage = stage_of("dsu", 6, activation="relu").double()
    x, s = (t.requires_grad_() for t in torch.randn(2, 3, 6, 4, 5, dtype=torch.float64))
    y = stage(x, s)
    every = [torch.autograd.grad((k * y).sum(), x, retain_graph=True)[0] for k in (1, 2)]
    torch.testing.assert_close(every[1], 2 * every[0])

    def fail(_):
        raise ValueError("on the way")

    hook = stage.attention.cell.input_reduce.weight.register_hook(fail)
    with pytest.raises(ValueError, match="on the way"):
        y.sum().backward(retain_graph=True)
    hook.remove()
    assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], every[0])
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(torch.autograd.grad(y.sum(), x, retain_graph=True)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(f, every[0]) for f in found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    stage = stage_of("dsu", 6, activation="relu").double()
    x, s = (t.requires_grad_() for t in torch.randn(2, 3, 6, 4, 5, dtype=torch.float64))
    expected = [*torch.autograd.grad(copy.deepcopy(stage)(x, s).sum(), (x, s))]
    checkpoint(stage, x, s, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(s.grad, expected[1])


@pytest.mark.parametrize("relu", [True, False])
def test_what_is_kept(relu):
    """Beside the convolution's result z there is y, for its ReLU, and tables; to the byte."""
    n, c, m = 4, 16, 4
    attention, norm = create_attention("se", c, c // m), nn.BatchNorm2d(c)
    z, s = (torch.randn(n, c, 24, 24, requires_grad=True) for _ in range(2))
    parameters = {p.untyped_storage().data_ptr() for p in (*attention.parameters(), *norm.parameters())}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = attention(z, norm=norm, shortcut=s, activation="relu" if relu else None)[0]
    assert folds(y)
    found = sum(size for place, size in kept.items() if place not in parameters)
    maps, tables, of_cell = (1 + relu) * z.numel(), 2 * n * c + 3 * c, n * c + n * m
    assert found == 4 * (maps + tables + of_cell)


@pytest.mark.parametrize("backend", [None, "simulated"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_buffers(mode, momentum, backend):
    if backend == "simulated":
        simulated_backend.library()
    attention = create_attention("se", 6, 2, backend=backend)
    norm, other = nn.BatchNorm2d(6, momentum=momentum), nn.BatchNorm2d(6, momentum=momentum)
    before = norm.running_mean._version
    for _ in range(2):
        x = torch.randn(3, 6, 4, 5)
        with torch.inference_mode() if mode == "inference" else torch.set_grad_enabled(mode == "grad"):
            attention(x, norm=norm)
            other(x)
    assert norm.running_mean._version > before
    for (name, a), b in zip(norm.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_what_is_dispatched():
    attention, norm = create_attention("se", 6, 2, backend="cpu"), nn.BatchNorm2d(6)
    x = torch.randn(3, 6, 4, 5, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        attention(x, norm=norm, activation="relu")[0].sum().backward()
    names = [
        event.name for event in seen.events() if event.name.startswith(("dia_kernels::", "aten::native_batch_norm"))
    ]
    assert names == [
        "dia_kernels::norm_pool_tracking_",
        "dia_kernels::norm_rescale",
        "dia_kernels::norm_rescale_backward",
        "dia_kernels::norm_pool_backward",
    ]


class Hooked(nn.BatchNorm2d):
    pass


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(6)
    norm.register_forward_hook(lambda *_: None)
    return norm


@pytest.mark.parametrize(
    ("cell", "norm", "backend"),
    [
        ("se", hooked, None),
        ("se", lambda: nn.GroupNorm(2, 6), None),
        ("se", lambda: Hooked(6), None),
        ("se", lambda: nn.BatchNorm2d(6), "reference"),
    ],
)
def test_what_is_called_by_itself(cell, norm, backend):
    attention, norm = create_attention(cell, 6, 2, backend=backend), norm()
    x = torch.randn(3, 6, 4, 5, requires_grad=True)
    y = attention(x, norm=norm)[0]
    assert not folds(y)
    torch.testing.assert_close(y, attention(norm(x))[0])


def test_transformed_calls_call_the_norm_by_itself():
    attention, norm = create_attention("dsu", 6, 2).double(), nn.BatchNorm2d(6, track_running_stats=False).double()
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return attention(x, norm=norm, activation="relu")[0].square().sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    running = nn.BatchNorm2d(6).double().eval()
    mapped = torch.func.vmap(lambda x: attention(x, norm=running)[0])(torch.stack([x, x + 1]))
    torch.testing.assert_close(mapped[1], attention(x + 1, norm=running)[0])
    y, tangent = torch.func.jvp(lambda x: attention(x, norm=norm)[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(y, attention(x, norm=norm)[0])
    torch.testing.assert_close(tangent, torch.zeros_like(x), rtol=0, atol=1e-12)  # a norm takes a constant off again


@pytest.mark.parametrize("kind", ["batch", "running"])
@pytest.mark.parametrize("cell", ["se", "dsu", pytest.param("stacked", marks=pytest.mark.slow)])
def test_compiled(cell, kind):
    """As one graph, the norm folded; the same gradients and buffers."""
    stage = stage_of(cell, 6, kind, activation="relu").double()
    x, s, dy = torch.randn(3, 3, 6, 4, 5, dtype=torch.float64)
    expected = gradients(stage, x, s, dy)
    torch._dynamo.reset()
    again, graphs = copy.deepcopy(stage), []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    leaves = {"x": x.clone().requires_grad_(), "shortcut": s.clone().requires_grad_()} | dict(again.named_parameters())
    compiled = torch.compile(again, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    y = compiled(leaves["x"], leaves["shortcut"])
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[f"d {name}"])
    for name, buffer in again.named_buffers():
        torch.testing.assert_close(buffer.double(), expected[name])
    assert not any(buffer.requires_grad for buffer in again.buffers())
    # The next step, from the buffers that this one moved; and one of another size.
    for shape in (x.shape, (2, 6, 5, 3)):
        other = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        compiled(other, other.detach()).sum().backward()
        (dx,) = torch.autograd.grad(copy.deepcopy(again)(other, other.detach()).sum(), other)
        torch.testing.assert_close(other.grad, dx)
    graphs = graphs[:2]
    called = [
        str(node.target).split(".")[1]
        for graph in graphs
        for node in graph.graph.nodes
        if "dia_kernels" in str(node.target)
    ]
    assert called == ["norm_pool", "norm_rescale"] * 2 + ["norm_rescale_backward", "norm_pool_backward"] * 2


def test_compiled_autograd():
    stage = stage_of("dsu", 6, activation="relu").double()
    x, s = (t.requires_grad_() for t in torch.randn(2, 3, 6, 4, 5, dtype=torch.float64))
    expected = torch.autograd.grad(copy.deepcopy(stage)(x, s).sum(), (x, s))
    y = stage(x, s).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward()
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(s.grad, expected[1])


@pytest.mark.parametrize("relu", [True, False])
def test_gradients_mapped_over(relu):
    stage = stage_of("se", 6, activation="relu" if relu else None).double()
    x, s = (t.requires_grad_() for t in torch.randn(2, 2, 6, 2, 3, dtype=torch.float64))
    y = stage(x, s)
    many = torch.randn(3, *y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, (x, s), many, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        for a, b in zip(found, torch.autograd.grad(y, (x, s), many[k], retain_graph=True), strict=True):
            torch.testing.assert_close(a[k], b)


def test_a_shortcut_of_another_dtype():
    attention, norm = create_attention("se", 6, 2), nn.BatchNorm2d(6)
    x, s = torch.randn(2, 3, 6, 4, 5, requires_grad=True)
    y = attention(x, norm=norm, shortcut=s.double(), activation="relu")[0]
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, attention(norm(x), shortcut=s.double(), activation="relu")[0], rtol=1e-5, atol=1e-5)


def test_a_norm_of_another_dtype_is_cast():
    attention, norm = create_attention("se", 6, 2), nn.BatchNorm2d(6).to(torch.bfloat16).eval()
    x = torch.randn(3, 6, 4, 5)
    torch.testing.assert_close(attention(x, norm=norm)[0], attention(x, norm=norm.float())[0])


@pytest.mark.parametrize("shape", [(0, 6, 4, 5), (3, 6, 0, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_maps(shape, training):
    attention, norm = create_attention("se", 6, 2), nn.BatchNorm2d(6).train(training)
    x = torch.randn(shape, requires_grad=True)
    y = attention(x, norm=norm, activation="relu")[0]
    assert y.shape == shape
    for gradient in torch.autograd.grad(y.sum(), (x, norm.weight, norm.bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("mean", [1e4, -300.0])
def test_a_mean_far_from_zero(mean):
    """Nothing cancels where the mean is large and the deviation small."""
    attention, norm = create_attention("se", 6, 2), nn.BatchNorm2d(6)
    x = (mean + torch.randn(4, 6, 8, 8) / 100).float()
    truth = copy.deepcopy(attention).double()(x.double(), norm=copy.deepcopy(norm).double())[0]
    y = attention(x, norm=norm)[0]
    assert (y - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["native", "simulated"])
def test_an_infinite_value_has_an_infinite_mean(name, layout):
    """And no NaN, wherever in the map it lies, unless it is of the statistics that it goes through."""
    if name == "simulated":
        simulated_backend.library()
    ops = operators.native if name == "native" else backends._backends["simulated"].operators
    z = torch.randn(2, 8, 6, 7)
    z[0, 0, 0, 0] = z[1, 1, 5, 6] = z[0, 2].view(-1)[42 * 66 // 128] = math.inf
    z = LAYOUTS[layout](z)
    for statistics in ((torch.zeros(8), torch.ones(8)), (None, None)):
        arguments = (z, None, None, *statistics, 1e-5, 1, True, False, False)
        found, expected = ops.norm_pool(*arguments), operators.plain.norm_pool(*arguments)
        for place in (0, 7):  # p, and the mean of the batch
            assert torch.equal(found[place].isinf(), expected[place].isinf())
            assert torch.equal(found[place].isnan(), expected[place].isnan())
        assert found[0 if statistics[0] is not None else 7].isinf().sum() == 3


@pytest.mark.parametrize("layout", [*LAYOUTS, "tokens"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", ["native", "simulated"])
def test_opcheck(name, layout, full):
    if name == "simulated":
        simulated_backend.library()
        ops = backends._backends["simulated"].operators
    else:
        ops = operators.native
    dim = -1 if layout == "tokens" else 1
    z, s, dy = (LAYOUTS.get(layout, lambda t: t.movedim(1, -1).contiguous())(t) for t in torch.randn(3, 3, 8, 4, 4))
    gamma, beta = torch.randn(2, 8) if full else (None, None)
    mean, var = (None, None) if full else torch.rand(2, 8)
    opcheck = torch.library.opcheck
    opcheck(ops.norm_pool, (z, gamma, beta, mean, var, 1e-5, dim, False, False, False))
    # The values of tokens are anyone's: nothing is compared.
    without_values = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.norm_pool, (z, gamma, beta, mean, var, 1e-5, dim, False, False, True), test_utils=without_values)
    buffers = torch.zeros(8), torch.ones(8), torch.tensor(0)
    opcheck(ops.norm_pool_tracking_, (z, gamma, beta, *buffers, 0.1, 1e-5, dim, False, False, False))
    opcheck(
        ops.norm_pool_tracking_,
        (z, gamma, beta, *buffers, 0.1, 1e-5, dim, False, False, True),
        test_utils=without_values,
    )
    p, tables, *tokens = ops.norm_pool(z, gamma, beta, mean, var, 1e-5, dim, False, False, True)[:4]
    assert [t.shape for t in tokens] == [z.shape, (3, 3, 8)]
    assert [t.untyped_storage().nbytes() for t in tokens] == [4, 4]
    scale, s = torch.rand(3, 8), s if full else None
    opcheck(ops.norm_rescale, (z, scale, s, tables, *tokens, gamma, beta, dim, full, False))
    y, _ = ops.norm_rescale(z, scale, s, tables, None, None, gamma, beta, dim, full, False)
    y = y if full else None
    opcheck(ops.norm_rescale_backward, (dy, y, z, scale, tables, gamma, beta, dim, full))
    _, handed, g = ops.norm_rescale_backward(dy, y, z, scale, tables, gamma, beta, dim, full)
    for need_z in (True, False):
        opcheck(
            ops.norm_pool_backward, (g if full else dy, handed, p, *(None,) * 5, z, tables, gamma, dim, full, need_z)
        )


def test_a_backend_named_around_the_call():
    attention, norm = create_attention("se", 6, 2), nn.BatchNorm2d(6)
    x = torch.randn(3, 6, 4, 5, requires_grad=True)
    with use_backend("reference"):
        assert not folds(attention(x, norm=norm)[0])
    assert folds(attention(x, norm=norm)[0])
