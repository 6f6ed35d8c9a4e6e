"""Result dtypes for every mix of map, parameters, state and shortcut, with autocast and without it."""

from __future__ import annotations

import pytest
import torch
from problems import assert_contract, compute_dtype, lstm_parameters, make_problem

from dia_kernels import LSTMParameters, SharedAttention, functional

N, C, M = 2, 12, 3
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
UP_TO_SINGLE = DTYPES[1:]


def step(backend, x, parameters, state, shortcut=None, activation=None):
    y, (h, c) = functional.step(x, parameters, state, shortcut=shortcut, activation=activation, backend=backend)
    return y, h, c


@pytest.mark.parametrize("given_state", [*UP_TO_SINGLE, None], ids=str)
@pytest.mark.parametrize("weights", UP_TO_SINGLE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients(backend, dtype, weights, given_state):
    x = torch.randn(N, C, 4, 5).to(dtype).requires_grad_()
    parameters = LSTMParameters(*(p.requires_grad_() for p in lstm_parameters(C, M, weights)))
    state = None
    if given_state is not None:
        state = tuple(torch.rand(N, C).to(given_state).requires_grad_() for _ in range(2))
    y, h, c = step(backend, x, parameters, state, shortcut=x, activation="relu")
    assert (y.dtype, h.dtype, c.dtype) == (dtype, compute_dtype(dtype), compute_dtype(dtype))
    (y.sum() + h.sum() + c.sum()).backward()
    assert x.grad.dtype == dtype
    assert {p.grad.dtype for p in parameters} == {weights}
    assert state is None or {t.grad.dtype for t in state} == {given_state}


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", UP_TO_SINGLE, ids=str)
def test_low_parameters_are_read_as_they_are(backend, dtype, weights):
    x, low = torch.randn(N, C, 4, 5).to(dtype), lstm_parameters(C, M, weights)
    wide = LSTMParameters(*(p.float() for p in low))
    for found, expected in zip(step(backend, x, low, None), step(backend, x, wide, None), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shortcut_of_another_dtype_is_added_by_pytorch(backend, dtype, other, activation):
    x = torch.randn(N, C, 4, 5).to(dtype).requires_grad_()
    shortcut = torch.randn(N, C, 4, 5).to(other).requires_grad_()
    parameters = lstm_parameters(C, M, compute_dtype(dtype))
    y, _, _ = step(backend, x, parameters, None, shortcut, activation)
    assert y.dtype == torch.result_type(x, shortcut)
    y.sum().backward()
    assert (x.grad.dtype, shortcut.grad.dtype) == (dtype, other)
    if other != dtype:
        scaled, _, _ = step(backend, x, parameters, None)
        expected = scaled + shortcut
        assert torch.equal(y, expected.relu() if activation else expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", UP_TO_SINGLE, ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", ["float32 state", "state of a step", "no state"])
@pytest.mark.parametrize("layers", [1, 2])
def test_autocast_changes_nothing(backend, layers, given, cast, dtype, weights):
    attention = SharedAttention(C, 4, num_layers=layers, backend=backend).to(weights)
    x = torch.randn(N, C, 4, 5).to(dtype).requires_grad_()
    shape = (N, C) if layers == 1 else (layers, N, C)
    start = (torch.rand(shape), torch.randn(shape)) if given == "float32 state" else None

    def stage():
        attention.zero_grad()
        x.grad = None
        y, state = attention(x, start, shortcut=x, activation="relu")
        if given == "state of a step":
            y, state = attention(y, state, shortcut=x, activation="relu")
        return [y, *state]

    def gradients(results):
        sum(r.float().sum() for r in results).backward()
        return [x.grad, *(p.grad for p in attention.parameters())]

    plain = stage()
    plain_gradients = gradients(plain)
    with torch.autocast("cpu", dtype=cast):
        cast_results = stage()
    cast_gradients = gradients(cast_results)
    assert [t.dtype for t in cast_results] == [dtype, torch.float32, torch.float32]
    assert [g.dtype for g in cast_gradients] == [dtype, *(weights for _ in attention.parameters())]
    for found, expected in zip(cast_results + cast_gradients, plain + plain_gradients, strict=True):
        assert torch.equal(found, expected)


# Not the reference: PyTorch's own gradients of plain ATen follow an autocast around the backward.
@pytest.mark.parametrize("backend", ["fallback", "cpu"], indirect=True)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_a_backward_inside_autocast_keeps_the_accuracy(backend, cast):
    problems = [make_problem((3, C, 5, 5), M, seed=seed) for seed in range(32)]
    with torch.autocast("cpu", dtype=cast):
        assert_contract(backend, problems)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_a_network_under_autocast_trains_float32_parameters(cast):
    attention = SharedAttention(C, 4)
    convolution = torch.nn.Conv2d(C, C, 3, padding=1)
    x = torch.randn(N, C, 6, 6)
    with torch.autocast("cpu", dtype=cast):
        y, state = attention(convolution(x), shortcut=convolution(x), activation="relu")
        y, (h, c) = attention(convolution(y), state, shortcut=y, activation="relu")
    assert (y.dtype, h.dtype, c.dtype) == (cast, torch.float32, torch.float32)
    y.float().sum().backward()
    assert {p.grad.dtype for p in attention.parameters()} == {torch.float32}


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_a_scaled_loss_in_float16_overflows_to_inf_not_to_nonsense(backend, scale):
    problem = make_problem((2, C, 4, 4), M, dtype=torch.float16, shortcut=False)
    x = problem.x.detach().requires_grad_()
    parameters = LSTMParameters(*(p.detach().requires_grad_() for p in problem.parameters))
    y, _, _ = step(backend, x, parameters, (problem.h, problem.c), x, "relu")
    y.backward(torch.full_like(y, 2.0) * scale)
    finite = scale == 1.0
    assert bool(x.grad.isfinite().all()) == finite
    assert bool(all(p.grad.isfinite().all() for p in parameters)) == finite


def test_a_low_state_is_read_as_it_is(backend):
    problem = make_problem((2, C, 4, 4), M)
    h, c = problem.h.half(), problem.c.bfloat16()
    low = step(backend, problem.x, problem.parameters, (h, c))
    wide = step(backend, problem.x, problem.parameters, (h.float(), c.float()))
    for found, expected in zip(low, wide, strict=True):
        assert torch.equal(found, expected)
