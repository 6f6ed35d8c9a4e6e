"""``sample_scale``: stochastic depth inside the step. It scales the scale, and leaves the state alone."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate, formula
from problems import lstm_parameters
from torch import nn

from dia_kernels import LSTMParameters, SharedAttention, functional

C, N = 8, 3
FACTORS = [0.0, 1.25, 2.5]


def by_formula(x, s, k, h, c, *w, dtype, channel_dim=1):
    """``(y, h', c')`` of one step with a ReLU, by the published formula on a map scaled once more in the end."""
    _, h, c = formula(x, s, h, c, w, channel_dim=channel_dim, dtype=dtype)
    scale = h * k.to(dtype)[:, None]
    dims = [n if d in (0, channel_dim % x.ndim) else 1 for d, n in enumerate(x.shape)]
    return torch.relu(x.to(dtype) * scale.reshape(dims) + s.to(dtype)).to(x.dtype), h, c


def by_step(x, s, k, h, c, *w, backend, channel_dim=1):
    y, (h, c) = functional.step(
        x, LSTMParameters(*w), (h, c), shortcut=s, activation="relu", sample_scale=k, backend=backend,
        channel_dim=channel_dim,
    )  # fmt: skip
    return y, h, c


def draw(dtype, shape, channel_dim, seed):
    torch.manual_seed(seed)
    table = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(shape) + 0.25).to(dtype)
    s = torch.randn(shape)
    s = torch.where(s > 0, s + 8, s - 8).to(dtype)  # the ReLU's edge, where rounding decides a gradient, is far
    state = torch.rand(N, C).to(table), torch.randn(N, C).to(table)
    return [x, s, torch.tensor(FACTORS, dtype=table), *state, *lstm_parameters(C, 2, table, seed)]


def solved(function, tensors, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    loss = sum((t.double() * (1 + torch.arange(t.numel()).reshape(t.shape) % 3)).sum() for t in out)
    return *(t.detach() for t in out), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((N, C, 6, 5), 1), ((N, 7, C), -1), ((N, C, 2, 3, 2), 1)])
def test_results_and_gradients_keep_the_contract(shape, channel_dim, dtype, backend):
    problems = [draw(dtype, shape, channel_dim, seed) for seed in range(4)]
    table = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"channel_dim": channel_dim}
    found = [solved(lambda *t: by_step(*t, backend=backend, **options), p) for p in problems]
    eager = [solved(lambda *t: by_formula(*t, dtype=table, **options), p) for p in problems]
    truth = [solved(lambda *t: by_formula(*t, dtype=torch.float64, **options), p, torch.float64) for p in problems]
    for index in range(len(truth[0])):
        stacked = (torch.stack([draw[index] for draw in draws]) for draws in (found, truth, eager))
        assert_accurate(*stacked, f"result {index}", 4 * 60)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_ones_change_nothing(num_layers, backend):
    attention, x = SharedAttention(C, 2, num_layers=num_layers, backend=backend), torch.randn(N, C, 5, 5)
    state = attention(x)[1]
    y, (h, c) = attention(x, state, shortcut=x, sample_scale=torch.ones(N))
    expected, (eh, ec) = attention(x, state, shortcut=x)
    for a, b in ((y, expected), (h, eh), (c, ec)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_zero_leaves_the_shortcut_and_the_state(num_layers, backend):
    attention, x, s = SharedAttention(C, 2, num_layers=num_layers, backend=backend), *torch.randn(2, N, C, 5, 5)
    y, (h, c) = attention(x, shortcut=s, activation="relu", sample_scale=torch.zeros(N))
    _, (eh, ec) = attention(x)
    assert torch.equal(y, torch.relu(s))
    torch.testing.assert_close((h, c), (eh, ec))


@pytest.mark.parametrize("kind", ["batch", "pair", "group"])
def test_a_norm_comes_first(kind, backend):
    attention, x, k = SharedAttention(C, 2, backend=backend), torch.randn(N, C, 5, 5), torch.tensor(FACTORS)
    pair = torch.rand(C) + 0.5, torch.randn(C)
    norm, other = (nn.BatchNorm2d(C), nn.BatchNorm2d(C)) if kind == "batch" else (nn.GroupNorm(2, C),) * 2
    first = x * pair[0].view(C, 1, 1) + pair[1].view(C, 1, 1) if kind == "pair" else other(x)
    y, _ = attention(x, norm=pair if kind == "pair" else norm, sample_scale=k)
    torch.testing.assert_close(y, attention(first)[0] * k.view(N, 1, 1, 1))
    if kind == "batch":
        torch.testing.assert_close(norm.running_var, other.running_var)
        assert norm.num_batches_tracked == 1


def test_gradcheck():
    w = lstm_parameters(C, 2, torch.float64)
    torch.manual_seed(0)
    x, k = torch.randn(2, C, 2, 2).double().requires_grad_(), torch.rand(2).double().requires_grad_()

    def call(x, k, *w):
        y, state = functional.step(x, LSTMParameters(*w), sample_scale=k)
        return functional.step(y, LSTMParameters(*w), state, shortcut=x, activation="relu", sample_scale=k)[0]

    leaves = (x, k, *(p.requires_grad_() for p in w))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_that_the_compute_dtype_holds(dtype):
    attention, x, k = SharedAttention(C, 2), torch.randn(N, C, 5, 5), torch.tensor(FACTORS)
    assert torch.equal(attention(x, sample_scale=k.to(dtype))[0], attention(x, sample_scale=k)[0])


def test_a_shortcut_of_another_dtype():
    attention, x, s, k = SharedAttention(C, 2), *torch.randn(2, N, C, 5, 5), torch.tensor(FACTORS)
    y, _ = attention(x.bfloat16(), shortcut=s, activation="relu", sample_scale=k)
    assert torch.equal(y, torch.relu(attention(x.bfloat16(), sample_scale=k)[0] + s))


def test_an_empty_batch(backend):
    x = torch.randn(0, C, 3, 3, requires_grad=True)
    y, (h, _) = SharedAttention(C, 2, backend=backend)(x, sample_scale=torch.ones(0))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert h.shape == (0, C)


def test_compiles_to_one_graph():
    attention, x, k = SharedAttention(C, 2), torch.randn(N, C, 5, 5), torch.tensor(FACTORS)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, sample_scale=k, norm=None)[0], attention(x, sample_scale=k)[0])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"sample_scale: expected shape \(3,\), got \(3, 1\)", {"sample_scale": torch.ones(N, 1)}),
        (ValueError, r"sample_scale: expected shape \(3,\), got \(\)", {"sample_scale": torch.ones(())}),
        (ValueError, "sample_scale: expected device", {"sample_scale": torch.ones(N, device="meta")}),
        (TypeError, "sample_scale: expected a floating dtype", {"sample_scale": torch.ones(N, dtype=torch.int64)}),
        (TypeError, "sample_scale: float64", {"sample_scale": torch.ones(N, dtype=torch.float64)}),
        (TypeError, "sample_scale: expected a torch.Tensor", {"sample_scale": 0.5}),
        (TypeError, "norm: expected a norm module", {"sample_scale": torch.ones(N), "norm": 3}),
    ],
)
def test_what_is_wrong_is_named(error, message, arguments):
    x = torch.ones(N, C, 4, 4)
    with torch.no_grad(), pytest.raises(error, match=rf"^{message}"):
        SharedAttention(C, 2)(x, **arguments)
    assert torch.equal(x, torch.ones(N, C, 4, 4))
