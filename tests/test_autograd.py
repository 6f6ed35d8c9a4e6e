"""The autograd rule: which path a call takes, and that every derivative is right."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import dia_kernels as dk
from dia_kernels import autograd, functional, operators


def problem(**options) -> tuple[dk.SharedAttention, tuple[torch.Tensor, ...]]:
    """A small float64 layer, and (x, shortcut, h, c) that require gradients."""
    generator = torch.Generator().manual_seed(0)
    layer = dk.SharedAttention(6, 2, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    maps = [torch.randn(2, 6, 3, 2, dtype=torch.float64, generator=generator) for _ in range(2)]
    tables = [torch.rand(2, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    return layer, tuple(t.requires_grad_() for t in (*maps, *tables))


def as_function(layer: dk.SharedAttention, activation: str | None = "relu"):
    """The step as a function of x, shortcut, h, c and the parameters."""

    def function(x, shortcut, h, c, *parameters):
        y, state = functional.step(
            x,
            dk.LSTMParameters(*parameters),
            (h, c),
            shortcut=shortcut,
            activation=activation,
            output=layer.output,
            backend=layer.backend,
        )
        return y, *state

    return function


@pytest.fixture
def path(monkeypatch):
    """Records which way ``autograd.step`` went: function, operator or reference."""
    taken = []

    def spy(name, original):
        def wrapped(*args):
            taken.append(name)
            return original(*args)

        return wrapped

    monkeypatch.setattr(autograd.Step, "apply", spy("function", autograd.Step.apply))
    monkeypatch.setattr(operators, "step", spy("operator", operators.step))
    monkeypatch.setattr(autograd, "_reference_step", spy("reference", autograd._reference_step))
    return taken


def test_case_1_onnx_export_takes_the_reference(path, monkeypatch):
    layer, (x, *_) = problem()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    layer(x)
    assert path == ["reference"]


def test_case_2_forward_mode_takes_the_reference(path):
    layer, (x, *_) = problem()
    jvp(lambda x: layer(x)[0], (x.detach(),), (torch.ones_like(x),))
    assert path == ["reference"]


@pytest.mark.parametrize("transformed", [True, False])
def test_cases_3_and_4_compiling(path, monkeypatch, transformed):
    layer, (x, *_) = problem()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(autograd, "transforms_active", lambda: transformed)
    layer(x)
    assert path == ["reference" if transformed else "operator"]


def test_case_5_a_gradient_takes_the_function(path):
    layer, (x, *_) = problem()
    layer(x.detach())
    assert path[0] == "function"


def test_case_5_a_functorch_transform_takes_the_function(path):
    layer, (x, *_) = problem()
    layer.requires_grad_(False)
    grad(lambda x: layer(x)[0].sum())(x.detach())
    assert path[0] == "function"


def test_case_6_no_gradient_takes_the_operator(path):
    layer, (x, *_) = problem()
    with torch.no_grad():
        layer(x)
    assert path == ["operator"]


@pytest.mark.parametrize("output", ["sigmoid", "tanh"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_every_derivative_matches_finite_differences(output, activation):
    layer, inputs = problem(output=output)
    function, arguments = as_function(layer, activation), (*inputs, *layer.lstm_parameters())
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_stacked_layers_match_finite_differences():
    layer, (x, shortcut, *_) = problem(num_layers=2)

    def function(x, shortcut):
        y, state = layer(x, shortcut=shortcut, activation="relu")
        return y, *state

    assert torch.autograd.gradcheck(function, (x, shortcut), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, shortcut))


def gradients_of(layer, inputs, wanted):
    for tensor in (*inputs, *layer.parameters()):
        tensor.grad = None
    x, shortcut, h, c = inputs
    y, (h, c) = layer(x, (h, c), shortcut=shortcut, activation="relu")
    (y.square().sum() + h.sum() + c.square().sum()).backward()
    return [t.grad for t in wanted]


@pytest.mark.parametrize("frozen", ["x", "shortcut", "state", "parameters"])
def test_a_gradient_nobody_asked_for_is_none_and_the_rest_is_the_same(frozen):
    layer, inputs = problem()
    tensors = [*inputs, *layer.parameters()]
    everything = gradients_of(layer, inputs, tensors)
    off = {"x": [0], "shortcut": [1], "state": [2, 3], "parameters": range(4, 12)}[frozen]
    for k in off:
        tensors[k].requires_grad_(False)
    for k, (some, whole) in enumerate(zip(gradients_of(layer, inputs, tensors), everything, strict=True)):
        assert some is None if k in off else torch.equal(some, whole)


@pytest.mark.parametrize("used", ["y", "h", "c"])
def test_one_used_result_gives_the_gradients_of_the_reference(used):
    layer, inputs = problem()
    results = []
    for backend in (None, "reference"):
        layer.backend = backend
        x, shortcut, h, c = inputs
        y, (h, c) = layer(x, (h, c), shortcut=shortcut, activation="relu")
        result = {"y": y, "h": h, "c": c}[used].square().sum()
        results.append(torch.autograd.grad(result, (*inputs, *layer.parameters()), materialize_grads=True))
    for ours, reference in zip(*results, strict=True):
        # The longest sum has 24 terms (4 C); 4 sqrt(n) ulp of the largest value.
        bound = 4 * 24**0.5 * torch.finfo(torch.float64).eps * reference.abs().max().clamp(min=1e-300)
        assert (ours - reference).abs().max() <= bound


def test_per_sample_gradients_are_those_of_single_samples():
    layer, (x, *_) = problem()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample[None],))[0].square().sum()

    batched = vmap(grad(loss), (None, 0))(parameters, x.detach())
    for k in range(len(x)):
        single = grad(loss)(parameters, x[k].detach())
        for name in parameters:
            torch.testing.assert_close(batched[name][k], single[name], rtol=1e-12, atol=1e-14)


def test_a_jacobian_is_that_of_the_reference():
    layer, (x, *_) = problem()
    layer.requires_grad_(False)
    jacobians = []
    for backend in (None, "reference"):
        layer.backend = backend
        jacobians.append(jacrev(lambda x: layer(x, activation="relu")[0])(x.detach()))
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-14)


def test_a_gradient_penalty_is_that_of_the_reference():
    layer, (x, *_) = problem()
    penalties = []
    for backend in (None, "reference"):
        layer.backend = backend
        layer.zero_grad()
        y, _ = layer(x, activation="relu")
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        penalties.append([p.grad.clone() for p in layer.parameters()])
    for ours, reference in zip(*penalties, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-13)


def test_checkpointing_changes_nothing():
    layer, inputs = problem()
    plain = gradients_of(layer, inputs, inputs)
    again = copy.deepcopy(layer)

    def forward(x, shortcut, h, c):
        y, state = again(x, (h, c), shortcut=shortcut, activation="relu")
        return y, *state

    for tensor in inputs:
        tensor.grad = None
    y, h, c = checkpoint(forward, *inputs, use_reentrant=False)
    (y.square().sum() + h.sum() + c.square().sum()).backward()
    assert all(torch.equal(a.grad, b) for a, b in zip(inputs, plain, strict=True))


def test_a_second_backward_through_a_kept_graph_adds_the_same():
    layer, (x, *_) = problem()
    y, _ = layer(x)
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * once)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_the_map_keeps_its_dtype_and_the_state_is_float32(low, weights):
    layer = dk.SharedAttention(6, 2, dtype=weights)
    x = torch.randn(2, 6, 3, 2, dtype=low, requires_grad=True)
    for backend in (None, "reference"):
        layer.backend = backend
        with torch.autocast("cpu", dtype=low):
            y, state = layer(x, shortcut=x, activation="relu")
            y, state = layer(y, state)
        assert [t.dtype for t in (y, *state)] == [low, torch.float32, torch.float32]
        y.float().sum().backward()
        assert x.grad.dtype == low
        assert all(p.grad.dtype == weights for p in layer.parameters())
