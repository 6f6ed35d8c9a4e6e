"""torch.func on whole networks and on the folded tail: functional_call, vmap, grad, Jacobians, second derivatives.

The step's own derivatives are held against finite differences in test_autograd.py and test_tail.py. Here what users do
with a network is held against PyTorch's own derivatives of the reference formula, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn import functional as F

from dia_kernels import CELLS, SharedAttention, create_attention
from dia_kernels.models import Options, PreResNet, ResNet

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float64).eps

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "folded": lambda backend: ResNet(14, 4, options=Options("dia", backend=backend)),
    "norm called by itself": lambda backend: ResNet(14, 4, options=Options("dia", backend=backend, fold_norm=False)),
    "pre-activation": lambda backend: PreResNet(20, 4, options=Options("dia", backend=backend)),
}
MODES = {"training": True, "evaluation": False}


@pytest.fixture(params=NETWORKS)
def networks(request) -> tuple[nn.Module, nn.Module]:
    """A network, and the same through the reference formula."""
    ours, reference = (NETWORKS[request.param](backend).double() for backend in (None, "reference"))
    _settle(ours)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def _settle(network: nn.Module) -> None:
    """Running statistics other than 0 and 1, and norms that do something."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and ("running" in name or ".bn" in name):
            tensor.add_(torch.rand_like(tensor) / 2)


def images(n: int = 3, side: int = 6) -> Tensor:
    return torch.randn(n, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([1, 3, 2])


def assert_close(found, expected, name: str = "") -> None:
    """But for rounding: some hundreds of float64 operations deep, and as large as the largest of the tensor."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=4096 * EPS, msg=lambda m: f"{name}: {m}")


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, name)


def detached(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers, as tensors of their own."""
    named = (network.named_parameters(), network.named_buffers())
    return tuple({name: t.detach().clone() for name, t in pairs} for pairs in named)  # type: ignore[return-value]


def gradients(network: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss(), list(named.values())), strict=True))


# --- row 20: functional_call, vmap, per-sample gradients ----------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_trial_20_functional_call_and_its_gradient(networks, mode):
    ours, reference = (network.train(MODES[mode]) for network in networks)
    parameters, buffers = detached(ours)

    def loss(parameters, buffers):
        return F.cross_entropy(functional_call(ours, (parameters, buffers), (images(),)), LABELS)

    before = copy.deepcopy(ours.state_dict())
    found = grad(loss)(parameters, buffers)
    assert_all_close(found, gradients(reference, lambda: F.cross_entropy(reference(images()), LABELS)))
    assert_all_close({k: v.double() for k, v in buffers.items()}, {k: v.double() for k, v in reference.named_buffers()})
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items()), "only the given buffers change"


def test_trial_20_gradients_of_each_sample(networks):
    ours, reference = (network.eval() for network in networks)
    parameters, buffers = detached(ours)

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(ours, (parameters, buffers), (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images(), LABELS)
    for n in range(len(LABELS)):
        expected = gradients(reference, lambda n=n: F.cross_entropy(reference(images()[n : n + 1]), LABELS[n : n + 1]))
        assert_all_close({name: g[n] for name, g in found.items()}, expected)


def test_trial_20_vmap_over_samples(networks):
    ours, reference = (network.eval() for network in networks)
    assert_close(vmap(lambda image: ours(image[None])[0])(images()), reference(images()))


@pytest.mark.parametrize("mode", MODES)
def test_trial_20_vmap_over_an_ensemble(networks, mode):
    """Results, gradients and, in training, the running statistics of each member."""
    ours, reference = (network.train(MODES[mode]) for network in networks)
    members = [copy.deepcopy(ours) for _ in range(3)]
    for k, member in enumerate(members):
        for p in member.parameters():
            p.data.mul_(1 + 0.02 * k)
    parameters, buffers = stack_module_state(members)
    x = images()

    def loss(parameters, buffers):
        logits = functional_call(ours, (parameters, buffers), (x,))
        return F.cross_entropy(logits, LABELS), logits

    found, logits = vmap(grad(loss, has_aux=True))({k: p.detach() for k, p in parameters.items()}, buffers)
    for k, member in enumerate(members):
        reference.load_state_dict(member.state_dict())
        expected = gradients(reference, lambda: F.cross_entropy(reference(images()), LABELS))
        assert_all_close({name: g[k] for name, g in found.items()}, expected)
        stacked = {name: b[k].double() for name, b in buffers.items()}
        assert_all_close(stacked, {name: b.double() for name, b in reference.named_buffers()})
        reference.load_state_dict(member.state_dict())
        assert_close(logits[k], reference(images()))


@pytest.mark.parametrize("cell", CELLS)
def test_trial_20_gradients_of_each_sample_through_every_cell(cell):
    attention = create_attention(cell, 4, 2, blocks=2).double().eval()
    parameters, buffers = detached(attention)
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64)

    def loss(parameters, x):
        def call(*args):
            return functional_call(attention, (parameters, buffers), args, {"shortcut": x, "activation": "relu"})

        y, state = call(x, None)
        return call(y, state)[0].square().sum()

    found = vmap(lambda x: grad(loss)(parameters, x[None]))(x)
    for n in range(len(x)):
        expected = gradients(attention, lambda n=n: loss(dict(attention.named_parameters()), x[n : n + 1]))
        assert_all_close({name: g[n] for name, g in found.items()}, expected)


class Tail(nn.Module):
    """Two blocks' tails, the norm folded into each."""

    def __init__(self, backend: str | None = None, **options) -> None:
        super().__init__()
        self.norm, self.attention = nn.BatchNorm2d(4, **options), SharedAttention(4, 2, backend=backend)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.attention(x, norm=self.norm, shortcut=x, activation="relu")
        return self.attention(y, state, norm=self.norm)[0]


def maps(*size: int) -> Tensor:
    return torch.randn(*size, 2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_trial_20_running_statistics_of_many_batches_at_once_are_refused(backend):
    """As nn.BatchNorm2d does; nothing has changed then."""
    with pytest.raises(RuntimeError, match="not batched"):
        vmap(nn.BatchNorm2d(4).double())(maps(3))
    tail = Tail(backend)
    before = copy.deepcopy(tail.state_dict())
    with pytest.raises(RuntimeError, match=r"norm: in training its running statistics cannot be updated under .*vmap"):
        vmap(tail)(maps(3))
    assert all(torch.equal(t, before[name]) for name, t in tail.state_dict().items())


@pytest.mark.parametrize("tracked", [True, False])
def test_trial_20_batch_statistics_under_vmap_are_those_of_each_batch(tracked):
    tail = Tail(track_running_stats=tracked)
    if tracked:
        torch.func.replace_all_batch_norm_modules_(tail)
    assert_close(vmap(tail)(maps(3)), torch.stack([tail(x) for x in maps(3)]))


def test_running_statistics_of_a_captured_norm_under_grad_are_refused_as_pytorch_refuses():
    for module in (nn.BatchNorm2d(4).double(), Tail()):
        with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
            grad(lambda x, module=module: module(x).sum())(maps())


# --- first derivatives of whole networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians_of_a_network(networks, transform):
    ours, reference = (network.eval() for network in networks)
    x = images(2)
    expected = torch.autograd.functional.jacobian(reference, x)
    assert_close(transform(ours)(x), expected)


def test_forward_mode_of_a_network(networks):
    ours, reference = (network.eval() for network in networks)
    x, tangent = images(2), torch.randn_like(images(2))
    expected = torch.einsum("abncij,ncij->ab", torch.autograd.functional.jacobian(reference, x), tangent)
    assert_close(jvp(ours, (x,), (tangent,))[1], expected, "jvp")
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent))).tangent
    assert_close(found, expected, "a dual number")


def test_linearized():
    tail = Tail().eval()
    x, tangent = maps(), torch.randn_like(maps())
    value, pushed = linearize(tail, x)
    assert_close(value, tail(x))
    assert_close(pushed(tangent), jvp(tail, (x,), (tangent,))[1])


@pytest.mark.parametrize("what", ["x", "parameters"])
def test_forward_mode_of_a_tail_in_training(what):
    """Dual numbers through the batch's own statistics; those that run get no tangent."""
    tail, x = Tail(), maps()
    parameters, buffers = detached(tail)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def of(x, parameters):
        return functional_call(tail, (parameters, copy.deepcopy(buffers)), (x,))

    if what == "x":
        direction = torch.randn_like(x)
        _, pull = vjp(lambda x: of(x, parameters), x)
        (_, found) = jvp(lambda x: of(x, parameters), (x,), (direction,))
        incoming = torch.randn_like(found)
        expected = (pull(incoming)[0] * direction).sum()
    else:
        _, pull = vjp(lambda p: of(x, p), parameters)
        (_, found) = jvp(lambda p: of(x, p), (parameters,), (tangents,))
        incoming = torch.randn_like(found)
        expected = sum((gradient * tangents[name]).sum() for name, gradient in pull(incoming)[0].items())
    assert_close((found * incoming).sum(), expected)
    with forward_ad.dual_level():
        tail(forward_ad.make_dual(x, torch.ones_like(x)))
    assert all(b.is_leaf and not b.requires_grad for b in tail.buffers())


# --- row 14: second derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_trial_14_a_gradient_penalty_of_a_network_equals_the_references(networks, mode):
    ours, reference = (network.train(MODES[mode]) for network in networks)

    def penalty(network):
        x = images().requires_grad_()
        (slope,) = torch.autograd.grad(network(x).logsumexp(1).sum(), x, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().sum() + F.cross_entropy(network(x), LABELS)

    assert_all_close(gradients(ours, lambda: penalty(ours)), gradients(reference, lambda: penalty(reference)))


@pytest.mark.parametrize("mode", MODES)
def test_trial_14_a_penalty_on_the_gradients_of_parameters(networks, mode):
    """What meta-learning and sharpness-aware training differentiate: the gradient of a step that was taken."""
    ours, reference = (network.train(MODES[mode]) for network in networks)

    def after_a_step(network):
        named = dict(network.named_parameters())
        loss = F.cross_entropy(network(images()), LABELS)
        slopes = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        moved = {name: p - 0.1 * slope for (name, p), slope in zip(named.items(), slopes, strict=True)}
        return F.cross_entropy(functional_call(network, moved, (images() / 2,)), LABELS)

    found = gradients(ours, lambda: after_a_step(ours))
    assert_all_close(found, gradients(reference, lambda: after_a_step(reference)))


@pytest.mark.parametrize("transform", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))])
@pytest.mark.parametrize("mode", MODES)
def test_trial_14_hessian_of_a_tail(mode, transform):
    tail, reference = (module.train(MODES[mode]) for module in (Tail(), Tail("reference")))
    reference.load_state_dict(tail.state_dict())
    _, buffers = detached(tail)
    x = maps()[:, :, :2, :1]

    def ours(x):
        return functional_call(tail, copy.deepcopy(buffers), (x,)).square().sum()

    expected = torch.autograd.functional.hessian(lambda x: reference(x).square().sum(), x)
    assert_close(transform(ours)(x), expected)


def test_trial_14_hessian_vector_products_of_a_network(networks):
    ours, reference = (network.eval() for network in networks)
    x, direction = images(2), torch.randn_like(images(2))
    _, expected = torch.autograd.functional.hvp(lambda x: reference(x).logsumexp(1).sum(), x, direction)
    gradient = grad(lambda x: ours(x).logsumexp(1).sum())
    assert_close(jvp(gradient, (x,), (direction,))[1], expected, "forward over reverse")
    assert_close(vjp(gradient, x)[1](direction)[0], expected, "reverse over reverse")


def test_trial_14_a_third_derivative():
    tail, reference = (module.eval() for module in (Tail(), Tail("reference")))
    reference.load_state_dict(tail.state_dict())
    x = maps()[:1, :, :1, :1]

    def third(function):
        return grad(lambda x: grad(lambda x: grad(lambda x: function(x).square().sum())(x).square().sum())(x).sum())

    value = third(reference)(x)
    assert value.abs().max() > 1e-3
    assert_close(third(tail)(x), value)
