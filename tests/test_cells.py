"""The cells as modules, and the attention around them: against the published formulas in plain PyTorch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from two_blocks import assert_as_accurate

from dia_kernels import CBAM, CELLS, DSU, ECA, SE, SRM, Cell, CellAttention, SharedAttention, create_attention

NAMES = ("dsu", "se", "eca", "srm", "cbam")
C, BLOCKS = 8, 3


def make(name: str, spatial: int = 2, **options) -> CellAttention:
    """With parameters that make every term matter."""
    torch.manual_seed(1)
    cells = {"dsu": lambda: DSU(C, 2), "se": lambda: SE(C, 2), "eca": lambda: ECA(C), "srm": lambda: SRM(C, BLOCKS)}
    cell = CBAM(C, 2, spatial=spatial) if name == "cbam" else cells[name]()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_(0.3, 0.6)
    return CellAttention(cell, **options)


# --- the formulas, with no code of the library -----------------------------------------------------


def plain_scale(name: str, w: dict[str, Tensor], x: Tensor, state, training: bool):
    """Scale (N, C) and state; ``w`` holds parameters and buffers."""
    flat = x.flatten(2)
    p = flat.mean(2)

    def linear(key: str, t: Tensor) -> Tensor:
        return t @ w[key + ".weight"].T + w[key + ".bias"]

    def mlp(t: Tensor) -> Tensor:
        return linear("expand", linear("reduce", t).relu())

    if name == "dsu":
        h, c = state or (torch.zeros_like(p), torch.zeros_like(p))
        u = linear("input_expand", linear("input_reduce", p).relu())
        u = u + linear("hidden_expand", linear("hidden_reduce", h).relu())
        c = u[:, C : 2 * C].sigmoid() * c + u[:, :C].sigmoid() * u[:, 2 * C :].tanh()
        return c.sigmoid(), (c.sigmoid(), c)
    if name == "se":
        return mlp(p).sigmoid(), None
    if name == "eca":
        kernel = w["conv.weight"].flatten()
        padded = F.pad(p, (1, 1))
        return sum(kernel[k] * padded[:, k : k + C] for k in range(3)).sigmoid(), None
    if name == "srm":
        k = state or 0
        std = (((flat - p[..., None]) ** 2).sum(2) / (flat.shape[2] - 1) + 1e-5).sqrt()
        z = p * w["style_weight"][:, 0] + std * w["style_weight"][:, 1]
        mean, var = w["running_mean"][k], w["running_var"][k]
        if training:
            n = len(z)
            mean, var = z.mean(0), z.var(0, correction=0)
            for name_, new in (("running_mean", mean), ("running_var", var * n / (n - 1))):
                w[name_] = w[name_].clone()
                w[name_][k] = 0.9 * w[name_][k] + 0.1 * new.detach()
        z = (z - mean) / (var + 1e-5).sqrt() * w["norm_weight"] + w["norm_bias"]
        return z.sigmoid(), k + 1
    return (mlp(p) + mlp(flat.amax(2))).sigmoid(), None


def plain_after(name: str, w: dict[str, Tensor], y: Tensor, training: bool) -> Tensor:
    if name != "cbam":
        return y
    seen = torch.cat((y.amax(1, keepdim=True), y.mean(1, keepdim=True)), 1)
    z = getattr(F, f"conv{y.ndim - 2}d")(seen, w["conv.weight"], padding=3)
    mean, var = w["running_mean"], w["running_var"]
    if training:
        mean, var = z.mean(), z.var(correction=0)
        w["running_mean"] = 0.99 * w["running_mean"] + 0.01 * mean.detach()
        w["running_var"] = 0.99 * w["running_var"] + 0.01 * (var * z.numel() / (z.numel() - 1)).detach()
    return y * (((z - mean) / (var + 1e-5).sqrt()) * w["norm_weight"] + w["norm_bias"]).sigmoid()


def plain(name: str, w: dict[str, Tensor], training: bool, channel_dim: int):
    """Called as the module is; statistics and cell in the dtype of ``w``."""

    def call(x, state, shortcut=None, relu=False, sample_scale=None):
        dtype, map_dtype = w["dtype"].dtype, x.dtype
        wide = x.to(dtype).movedim(channel_dim, 1)
        scale, state = plain_scale(name, w, wide, state, training)
        scale = scale if sample_scale is None else scale * sample_scale.to(dtype)[:, None]
        y = wide * scale.reshape(*scale.shape, *(1,) * (x.ndim - 2))
        if name == "cbam":  # two modules in eager PyTorch, the map between them in its own dtype
            y = plain_after(name, w, y.to(map_dtype).to(dtype), training).to(map_dtype).to(dtype)
        y = y.movedim(1, channel_dim)
        y = y if shortcut is None else y + shortcut.to(dtype)
        return (y.relu() if relu else y).to(map_dtype), state

    return call


def results(call, leaves: dict[str, Tensor], blocks: int, norm=None, sample_scale=None) -> dict[str, Tensor]:
    """Of blocks that share one module: maps, last state, and the gradient of every leaf."""
    state, loss, of = None, torch.zeros((), dtype=torch.float64), {}
    for k in range(blocks):
        x = leaves[f"x{k}"] if norm is None else norm(leaves[f"x{k}"])
        y, state = call(x, state, leaves["s"], k > 0, sample_scale)
        of[f"y{k}"] = y
        loss = loss + (y.double() * (1 + torch.arange(y.numel()).reshape(y.shape) % 5)).sum()
    if isinstance(state, tuple):
        of |= {"h": state[0], "c": state[1]}
        loss = loss + state[0].double().square().sum() + state[1].double().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return of | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True) if g is not None}


def ours(attention: CellAttention):
    return lambda x, state, shortcut=None, relu=False, sample_scale=None: attention(
        x, state, shortcut=shortcut, activation="relu" if relu else None, sample_scale=sample_scale
    )


def leaves_of(attention: CellAttention, maps: dict[str, Tensor]) -> dict[str, Tensor]:
    return maps | dict(attention.cell.named_parameters())


def plain_of(name: str, attention: CellAttention, dtype: torch.dtype, training: bool):
    """The plain module, its weights' leaves and its weights, which will hold the new buffers."""
    w = {k: v.detach().clone().to(dtype) for k, v in attention.cell.state_dict().items()}
    leaves = {k: w[k].requires_grad_() for k, _ in attention.cell.named_parameters()}
    w["dtype"] = torch.empty(0, dtype=dtype)
    return plain(name, w, training, attention.channel_dim), leaves, w


def draw_maps(shape, dtype=torch.float64, view=lambda t: t, blocks=BLOCKS) -> dict[str, Tensor]:
    torch.manual_seed(2)
    names = (*(f"x{k}" for k in range(blocks)), "s")
    return {k: view(torch.randn(shape, dtype=torch.float64).to(dtype) + 0.3).requires_grad_() for k in names}


LAYOUTS = {
    "NCHW": ((3, C, 5, 4), 1, lambda t: t),
    "channels_last": ((3, C, 5, 4), 1, lambda t: t.contiguous(memory_format=torch.channels_last)),
    "strided": ((3, C, 5, 4), 1, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    "tokens": ((3, 9, C), -1, lambda t: t),
    "1d": ((3, C, 9), 1, lambda t: t),
    "3d": ((3, C, 2, 3, 2), 1, lambda t: t),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_three_blocks_equal_the_formula(name, layout, training, backend):
    shape, channel_dim, view = LAYOUTS[layout]
    attention = make(name, len(shape) - 2, channel_dim=channel_dim, backend=backend).double().train(training)
    maps = draw_maps(shape, view=view)
    call, leaves, w = plain_of(name, attention, torch.float64, training)
    sample_scale = torch.tensor([0.0, 2.0, 1.25])
    expected = results(call, maps | leaves, BLOCKS, sample_scale=sample_scale)
    found = results(ours(attention), leaves_of(attention, maps), BLOCKS, sample_scale=sample_scale)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    for key, buffer in attention.cell.named_buffers():
        torch.testing.assert_close(buffer, w[key], rtol=1e-9, atol=1e-12)


def errors_of(name: str, attention: CellAttention, dtype: torch.dtype, seed: int):
    torch.manual_seed(seed)
    # Drawn far from the ReLU's edge, where a rounding decides a gradient: 2 blocks of maps of their own.
    maps = {k: (1 + torch.randn(6, C, 7, 5)).to(dtype).requires_grad_() for k in ("x0", "x1", "s")}
    with torch.no_grad():
        maps["s"].copy_(torch.where(maps["s"] > 1, maps["s"] + 8, maps["s"] - 9))
    found = results(ours(attention), leaves_of(attention, maps), 2)
    eager, weights, _ = plain_of(name, attention, torch.float32, True)
    yardstick = results(eager, maps | weights, 2)
    exact, weights, _ = plain_of(name, attention, torch.float64, True)
    true = results(exact, {k: t.detach().double().requires_grad_() for k, t in maps.items()} | weights, 2)
    of = {}
    for key, value in true.items():
        assert found[key].dtype == yardstick[key].dtype, key
        a, b = ((t[key].double() - value).abs().max().item() for t in (found, yardstick))
        of[key] = a, b, value.abs().max().item()
    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_accurate_as_eager(name, dtype, backend):
    attention = make(name, backend=backend)
    assert_as_accurate([errors_of(name, attention, dtype, seed) for seed in range(3)], dtype)


@pytest.mark.parametrize("name", NAMES)
def test_triton(name, one_thread, interpreted):
    attention = make(name, backend="interpreted")
    assert_as_accurate([errors_of(name, attention, torch.float32, seed) for seed in range(2)], torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    attention = make(name).double()

    def call(x, s, scale, *parameters):
        named = dict(zip((k for k, _ in attention.named_parameters()), parameters, strict=True))
        attention.cell.train(False)
        state, out = None, []
        for _ in range(2):
            y, state = torch.func.functional_call(
                attention, named, (x, state), {"shortcut": s, "sample_scale": scale, "activation": "relu"}
            )
            x = y * 0.5 + x
            out.append(y)
        return tuple(out)

    torch.manual_seed(3)
    x, s = (torch.randn(2, C, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, s, scale, *attention.parameters()), fast_mode=True)


@pytest.mark.parametrize("affine", [False, True], ids=["module", "pair"])
@pytest.mark.parametrize("name", CELLS)
def test_a_norm_comes_first(name, affine):
    attention, x = create_attention(name, C, 2), torch.randn(3, C, 4, 4)
    pair = (torch.rand(C) + 0.5, torch.randn(C))
    norm = pair if affine else nn.GroupNorm(2, C)
    first = x * pair[0].view(C, 1, 1) + pair[1].view(C, 1, 1) if affine else norm(x)
    expected = copy.deepcopy(attention)(first, activation="relu")[0]
    torch.testing.assert_close(attention(x, norm=norm, activation="relu")[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name, backend):
    attention, x = make(name, backend=backend).eval(), torch.randn(0, C, 3, 3, requires_grad=True)
    y, state = attention(x)
    y, _ = attention(y, state, shortcut=x, activation="relu")
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, C, 3, 3)


@pytest.mark.parametrize("name", NAMES)
def test_shortcut_of_another_dtype_and_parameters_of_another(name):
    attention, x, s = make(name).bfloat16(), torch.randn(3, C, 4, 4).bfloat16(), torch.randn(3, C, 4, 4)
    y, _ = attention(x, shortcut=s, activation="relu")
    assert y.dtype == torch.float32
    wide = copy.deepcopy(make(name).bfloat16()).float()
    torch.testing.assert_close(y, torch.relu(wide(x)[0] + s))
    for key, buffer in attention.cell.named_buffers():
        assert buffer.dtype == torch.bfloat16
        torch.testing.assert_close(buffer.float(), dict(wide.cell.named_buffers())[key], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_the_cell_alone(name):
    attention, x = make(name).eval(), torch.randn(3, C, 4, 4)
    expected = attention(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(x)[0], expected)


@pytest.mark.parametrize("name", CELLS)
def test_in_place_is_for_inference(name, backend):
    attention = create_attention(name, C, 2, backend=backend).eval()
    x, s = torch.randn(3, C, 4, 4), torch.randn(3, C, 4, 4)
    before = x.clone()
    with pytest.raises(ValueError, match=r"^inplace: expected False where a gradient is needed"):
        attention(x, inplace=True)
    assert torch.equal(x, before)
    with torch.no_grad():
        expected = attention(x, shortcut=s, activation="relu")[0]
        y, _ = attention(x, shortcut=s, activation="relu", inplace=True)
    assert y is x
    torch.testing.assert_close(y, expected)


def test_in_place_refuses_a_state_that_wants_a_gradient():
    attention, x = make("dsu").requires_grad_(False), torch.randn(2, C, 4, 4)
    state, before = (torch.rand(2, C, requires_grad=True), torch.rand(2, C)), x.clone()
    with pytest.raises(ValueError, match=r"^inplace: expected False where a gradient"):
        attention(x, state, inplace=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("move", ["state dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", CELLS)
def test_a_copy_computes_the_same(name, move):
    attention, x = create_attention(name, C, 2, blocks=2), torch.randn(4, C, 4, 4)
    attention(x)  # moves running statistics
    if move == "state dict":
        other = create_attention(name, C, 2, blocks=2)
        other.load_state_dict(attention.state_dict())
    else:
        other = copy.deepcopy(attention) if move == "deepcopy" else pickle.loads(pickle.dumps(attention))
    assert torch.equal(other.eval()(x)[0], attention.eval()(x)[0])


class Net(nn.Module):
    """Two blocks that share one attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(2))
        self.norm = nn.BatchNorm2d(C)
        self.attention = attention
        self.last = nn.Conv2d(C, 1, 1)

    def forward(self, x):
        state, norm = None, self.norm
        for convolution in self.convolutions:
            x, state = self.attention(convolution(x), state, shortcut=x, activation="relu", norm=norm)
            norm = None
        return self.last(x)


@pytest.mark.parametrize("name", CELLS)
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    net = Net(create_attention(name, C, 2, blocks=2))
    compiled, x = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager"), torch.randn(3, C, 4, 4)
    y, expected = compiled(x), net(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for (key, found), (_, p) in zip(compiled.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, p.grad, rtol=1e-4, atol=1e-4, msg=key)
    for (key, found), (_, buffer) in zip(compiled.named_buffers(), net.named_buffers(), strict=True):
        torch.testing.assert_close(found, buffer, msg=key)


@pytest.mark.parametrize("name", [*CELLS, "halving"])
def test_traces_symbolically(name):
    attention = CellAttention(Halving(C)) if name == "halving" else create_attention(name, C, 2, blocks=2)
    net, x = Net(attention), torch.randn(3, C, 4, 4)
    graph = fx.symbolic_trace(copy.deepcopy(net))
    if name.startswith("lstm"):
        called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
        assert sum(getattr(t, "__name__", "") == "step" for t in called) == 2
    for moved in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), graph):
        other = copy.deepcopy(net)
        torch.testing.assert_close(moved(x), other(x))
        expected = dict(other.named_buffers())
        for key, buffer in moved.named_buffers():
            torch.testing.assert_close(buffer, expected[key], msg=key)
    extractor = create_feature_extractor(net.eval(), ["attention"])
    features = extractor(x)["attention"]
    torch.testing.assert_close(net.last(features), net(x))


# --- a user's own cell, as docs/cells.md shows it --------------------------------------------------


class Halving(Cell):
    statistics = ("max", "mean")
    position_statistics = ("mean",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, pooled, state):
        largest, mean = pooled
        memory = mean if state is None else (mean + state) / 2
        return torch.sigmoid(self.weight * largest + memory), memory

    def position_scale(self, mean):
        return torch.sigmoid(mean)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_a_users_cell(channel_dim, backend):
    attention = create_attention(Halving, C, channel_dim=channel_dim, backend=backend)
    assert isinstance(attention, CellAttention)
    x = torch.randn(2, C, 5).movedim(1, channel_dim).requires_grad_()
    y, state = attention(x)
    z, state = attention(y, state, shortcut=x, activation="relu")
    dim = 2 if channel_dim == 1 else 1

    def by_hand(x, memory):
        mean = x.mean(dim)
        memory = mean if memory is None else (mean + memory) / 2
        y = x * (x.amax(dim) + memory).sigmoid().unsqueeze(dim)
        return y * y.mean(channel_dim, keepdim=True).sigmoid(), memory

    first, memory = by_hand(x, None)
    second, memory = by_hand(first, memory)
    torch.testing.assert_close(z, torch.relu(second + x))
    torch.testing.assert_close(state, memory)
    found, expected = (torch.autograd.grad(t.square().sum(), x) for t in (z, torch.relu(second + x)))
    torch.testing.assert_close(found, expected)


def test_the_docs_show_this_cell():
    page = (Path(__file__).resolve().parent.parent / "docs" / "cells.md").read_text()
    code = next(block for block in page.split("```python\n") if "class Halving" in block).split("```")[0]
    names = {}
    exec(code.replace("channels=64", f"channels={C}"), names)
    x = torch.randn(2, C, 3, 3)
    assert torch.equal(names["attention"](x)[0], create_attention(Halving, C)(x)[0])


def test_a_function_may_make_a_whole_module():
    made = create_attention(lambda channels: SharedAttention(channels, 2, output="tanh"), C)
    assert isinstance(made, SharedAttention)
    assert made.output == "tanh"


def test_names_make_what_they_say():
    assert create_attention("lstm", C).output == "sigmoid"
    assert create_attention("lstm_tanh", C).output == "tanh"
    kinds = {"dsu": DSU, "se": SE, "eca": ECA, "srm": SRM, "cbam": CBAM}
    assert all(type(create_attention(name, C, 2).cell) is kind for name, kind in kinds.items())
    assert create_attention("srm", C, blocks=4).cell.running_mean.shape == (4, C)
    assert create_attention("dsu", C, 4).cell.input_reduce.weight.shape == (2, C)


@pytest.mark.parametrize(("channels", "kernel"), [(1, 1), (8, 3), (32, 3), (64, 3), (128, 5), (512, 5), (2048, 7)])
def test_ecas_kernel_is_the_authors(channels, kernel):
    assert ECA(channels).conv.weight.shape == (1, 1, kernel)


def test_one_position_has_a_standard_deviation_of_zero():
    seen = []

    class Spy(Cell):
        statistics = ("std",)

        def forward(self, pooled, state):
            seen.append(pooled)
            return pooled, None

    CellAttention(Spy())(torch.randn(2, C, 1))
    torch.testing.assert_close(seen[0], torch.full((2, C), 1e-5).sqrt())


def wrong_cell(**attributes) -> Cell:
    return type("Wrong", (Cell,), attributes)()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"cell: expected one of lstm", lambda: create_attention("gru", C)),
        (TypeError, r"cell: expected a name or a function", lambda: create_attention(SE(C, 2), C)),
        (TypeError, r"cell: expected a name or a function", lambda: create_attention(3, C)),
        (TypeError, r"cell: expected it to make", lambda: create_attention(lambda channels: 3, C)),
        (ValueError, r"channels: expected at least 1", lambda: create_attention(Halving, 0)),
        (ValueError, r"blocks: expected at least 1", lambda: create_attention("srm", C, blocks=0)),
        (ValueError, r"reduction: expected at most", lambda: create_attention("se", C, 9)),
        (ValueError, r"reduction: expected at most", lambda: create_attention("dsu", C, 9)),
        (ValueError, r"reduction: expected at most", lambda: create_attention("cbam", C, 9)),
        (ValueError, r"channel_dim: expected 1 or -1", lambda: create_attention("se", C, channel_dim=2)),
        (ValueError, r"backend: expected None or one of", lambda: create_attention("se", C, backend="abacus")),
        (ValueError, r"spatial: expected 1, 2 or 3", lambda: CBAM(C, 2, spatial=4)),
        (ValueError, r"kernel: expected an odd", lambda: CBAM(C, 2, kernel=4)),
        (TypeError, r"cell: expected a dia_kernels.Cell", lambda: CellAttention(nn.Linear(2, 2))),
        (ValueError, r"cell: expected statistics", lambda: CellAttention(wrong_cell(statistics=("median",)))),
        (ValueError, r"cell: expected statistics", lambda: CellAttention(wrong_cell(statistics="mean"))),
        (NotImplementedError, r"Wrong has no forward", lambda: CellAttention(wrong_cell())(X)),
        (
            ValueError,
            r"cell scale: expected shape \(2, 8\)",
            lambda: CellAttention(wrong_cell(forward=lambda self, p, s: (p[:, :1], None)))(X),
        ),
        (
            ValueError,
            r"cell after: expected shape",
            lambda: CellAttention(
                wrong_cell(forward=lambda self, p, s: (p, None), after=lambda self, y: y.mean(1, keepdim=True))
            )(X),
        ),
        (ValueError, r"x: expected 2 spatial dimensions", lambda: make("cbam")(torch.ones(2, C, 5))),
        (ValueError, r"state h: expected shape", lambda: make("dsu")(X, (torch.ones(3, C), torch.ones(3, C)))),
        (TypeError, r"state: expected None or a pair", lambda: make("dsu")(X, torch.ones(2, C))),
        (ValueError, r"state: block 3 of an SRM", lambda: make("srm")(X, 3)),
        (TypeError, r"state: expected None or the index", lambda: make("srm")(X, X)),
        (TypeError, r"x: expected a torch.Tensor", lambda: make("se")([1.0])),
        (ValueError, r"shortcut: expected shape", lambda: make("se")(X, shortcut=X[:1])),
        (ValueError, r"activation: expected None", lambda: make("se")(X, activation="gelu")),
        (ValueError, r"sample_scale: expected shape \(2,\)", lambda: make("se")(X, sample_scale=torch.ones(3))),
        (TypeError, r"norm: expected a norm module", lambda: make("se")(X, norm=3)),
    ],
)
def test_what_is_wrong_is_named(error, message, call):
    with pytest.raises(error, match=rf"^{message}"):
        call()


X = torch.ones(2, C, 5, 5)
