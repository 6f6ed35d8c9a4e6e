"""``backend="simulated"``: the operators and whole networks through the GPU kernels, held to the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import simulated
import simulated_backend
import torch
from simulated_backend import Settings, settings
from torch import nn
from torch.nn import functional as F

from dia_kernels import SharedAttention, backends, models, operators

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["on chip", "sweeps", "products"]


@pytest.fixture(autouse=True)
def backend() -> str:
    simulated.machine()  # skips where it cannot be built
    simulated_backend.add()
    return "simulated"


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    settings.mode = request.param
    yield request.param
    for name, value in asdict(Settings()).items():
        setattr(settings, name, value)


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
def test_every_gradient(mode, norm, channels_last, relu):
    x, s = maps((5, 6, 5, 5), channels_last=channels_last)
    module = None
    if norm != "none":
        module = nn.BatchNorm2d(6, affine="without" not in norm).train("batch" in norm)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(6))
    assert_gradients_agree(SharedAttention(6, 2, backend="simulated"), module, x, s, relu)


def test_no_shortcut_and_tanh(mode):
    x, _ = maps((3, 6, 4, 4))
    assert_gradients_agree(SharedAttention(6, 2, output="tanh", backend="simulated"), nn.BatchNorm2d(6), x, None)


@pytest.mark.parametrize("dim", [1, -1])
def test_tokens(mode, dim):
    x, s = maps((3, 6, 6))
    assert_gradients_agree(SharedAttention(6, 2, channel_dim=dim, backend="simulated"), None, x, s)


def test_stacked_layers():
    x, s = maps((3, 6, 4, 4))
    assert_gradients_agree(SharedAttention(6, 2, num_layers=2, backend="simulated"), None, x, s)


@pytest.mark.parametrize("norm", [False, True])
def test_bfloat16(mode, norm):
    x, s = maps((3, 6, 4, 4), torch.bfloat16)
    assert_gradients_agree(SharedAttention(6, 2, backend="simulated"), nn.BatchNorm2d(6) if norm else None, x, s)


def test_tiles_and_teams_do_not_matter(mode):
    x, s = maps((5, 6, 5, 5))
    for changes in ({"tile": (1, 7)}, {"ranks": 1, "teams": 3, "group": 1}, {"ranks": 3, "group": 4, "threads": 96}):
        for name, value in changes.items():
            setattr(settings, name, value)
        assert_gradients_agree(SharedAttention(6, 2, backend="simulated"), nn.BatchNorm2d(6), x, s)


def test_digits_of_a_mean_far_from_zero(mode):
    """A channel of mean 1e4 and deviation 1e-2, against the step in float64 (DESIGN, section 11)."""
    z = 1e4 + 0.01 * torch.randn(4, 6, 8, 8)
    norm, attention = nn.BatchNorm2d(6), SharedAttention(6, 2, backend="simulated")
    wide = copy.deepcopy(attention).double()
    wide.backend = "reference"
    truth, _ = wide(z.double(), norm=copy.deepcopy(norm).double())
    y, _ = attention(z, norm=norm)
    assert (y.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_empty_and_double_maps_go_to_the_reference():
    attention = SharedAttention(6, 2, backend="simulated")
    y, (h, _) = attention(torch.zeros(0, 6, 4, 4))
    assert y.shape == (0, 6, 4, 4)
    assert h.shape == (0, 6)
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
    kernel = backends.operators_of("simulated")

    def spy(graph, example):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    y, _ = torch.compile(attention, backend=spy, fullgraph=True)(x)
    y.sum().backward()
    assert kernel.step in called
    assert operators.native.step not in called
    assert x.grad is not None


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
def test_a_network_trains_through_the_gpu_kernels(mode, fold_norm):
    found, weights = trained(3, "simulated", fold_norm)
    expected, others = trained(3, "reference", fold_norm)
    assert found == pytest.approx(expected, rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4, msg=name)
