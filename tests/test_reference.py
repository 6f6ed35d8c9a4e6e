"""The reference against the published formula and against pytorchcv's DIA unit, in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import formula
from problems import formula_step, library_step, lstm_parameters, make_problem, run
from pytorchcv.models.diaresnet import DIAAttention
from torch import Tensor

from dia_kernels import LSTMParameters, StackedLayer, functional, reference

# Both sides compute the same sums in float64: they differ by the rounding of at most this many terms.
TERMS = 256
TOLERANCE = {"rtol": 0.0, "atol": 4 * TERMS**0.5 * torch.finfo(torch.float64).eps}


def assert_equal_up_to_rounding(ours: Tensor, expected: Tensor, name: str) -> None:
    scale = expected.abs().max().clamp_min(1)
    torch.testing.assert_close(ours / scale, expected / scale, **TOLERANCE, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("output", ["sigmoid", "tanh"])
def test_the_step_is_the_published_formula(output, state, shortcut, relu, channel_dim):
    problem = make_problem(
        (3, 12, 4, 12) if channel_dim == -1 else (3, 12, 5, 4),
        5,
        dtype=torch.float64,
        output=output,
        state=state,
        shortcut=shortcut,
        relu=relu,
        channel_dim=channel_dim,
    )
    ours, expected = run(library_step("reference"), problem), run(formula_step, problem)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal_up_to_rounding(ours[name], tensor, name)


def gate_step(open_gate: int) -> tuple[Tensor, Tensor]:
    """(h', c') with every gate shut but one, from c = 0.5; a sigmoid is shut at -1000, a tanh at 0.

    The biases of the input path's expansion decide alone: all weights are zero.
    """
    channels = 2
    parameters = LSTMParameters(*(torch.zeros_like(p) for p in lstm_parameters(channels, 1, torch.float64)))
    shut = torch.tensor([-1000.0, -1000.0, 0.0, -1000.0], dtype=torch.float64)
    shut[open_gate] = 1000.0
    parameters.input_expand_bias.copy_(shut.repeat_interleave(channels))
    c = torch.full((1, channels), 0.5, dtype=torch.float64)
    x = torch.ones(1, channels, 3, dtype=torch.float64)
    _, h, c = reference.step(x, None, torch.zeros_like(c), c, parameters, 1, False, "sigmoid")
    return h, c


@pytest.mark.parametrize(
    ("gate", "h", "c"),
    [("input", 0.0, 0.0), ("forget", 0.0, 0.5), ("cell", 0.0, 0.0), ("output", 0.5, 0.0)],
)
def test_gates_lie_in_the_order_input_forget_cell_output(gate, h, c):
    found_h, found_c = gate_step(["input", "forget", "cell", "output"].index(gate))
    assert torch.equal(found_h, torch.full_like(found_h, h))
    assert torch.equal(found_c, torch.full_like(found_c, c))


def test_without_a_state_the_hidden_path_is_a_constant_whose_biases_learn():
    problem = make_problem((2, 8, 3, 3), 4, dtype=torch.float64, state=False)
    found = run(library_step("reference"), problem)
    assert found["dhidden_reduce_bias"].abs().max() > 0
    assert found["dhidden_expand_bias"].abs().max() > 0
    assert torch.equal(found["dhidden_reduce_weight"], torch.zeros(4, 8, dtype=torch.float64))


def test_a_map_without_positions_pools_to_nan():
    x = torch.empty(2, 4, 0, 5, dtype=torch.float64)
    assert reference.pool(x, 1).isnan().all()
    y, h, c = reference.step(x, None, None, None, lstm_parameters(4, 2, torch.float64), 1, True, "sigmoid")
    assert y.shape == x.shape
    assert h.isnan().all()
    assert c.isnan().all()


def test_a_step_written_out_backward_equals_the_automatic_gradient():
    problem = make_problem((3, 10, 4, 5), 3, dtype=torch.float64)
    expected = run(formula_step, problem)
    args = (problem.x, problem.shortcut, problem.h, problem.c, problem.parameters, 1, problem.relu, "sigmoid")
    y, p, trace = reference.traced_step(*args)
    dx, dshortcut, _, dh, dc, factors = reference.step_backward(
        problem.dy, problem.dh, problem.dc, problem.x, y, problem.h, problem.c, trace.c, p, trace,
        problem.parameters, 1, "sigmoid",
    )  # fmt: skip
    dparameters = reference.parameter_gradients(factors, p, trace.zx, trace.zh, problem.h)
    found = {"dx": dx, "dshortcut": dshortcut, "dh": dh, "dc": dc}
    found |= {f"d{name}": gradient for name, gradient in dparameters._asdict().items()}
    for name, gradient in found.items():
        assert_equal_up_to_rounding(gradient, expected[name], name)


# --- stacked layers ----------------------------------------------------------------------------------


def plain_layer(below: Tensor, h: Tensor, c: Tensor, layer: StackedLayer) -> tuple[Tensor, Tensor]:
    """A stacked layer with no bottleneck, gate by gate."""
    width = below.shape[1]
    gates = []
    for k in range(4):
        rows = slice(k * width, (k + 1) * width)
        u = below @ layer.input_weight[rows].T + layer.input_bias[rows]
        gates.append(u + h @ layer.hidden_weight[rows].T + layer.hidden_bias[rows])
    i, f, g, o = gates[0].sigmoid(), gates[1].sigmoid(), gates[2].tanh(), gates[3].sigmoid()
    c = f * c + i * g
    return o * c.sigmoid(), c


def stacked_layer(channels: int, seed: int) -> StackedLayer:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4 * channels, channels), (4 * channels,)) * 2
    draws = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return StackedLayer(*(t / channels**0.5 for t in draws))


@pytest.mark.parametrize("backend", ["reference", None])
def test_stacked_layers_scale_by_the_last_h(backend):
    channels, layers = 6, 3
    problem = make_problem((2, channels, 4, 4), 2, dtype=torch.float64, relu=False, shortcut=False)
    rest = [stacked_layer(channels, seed) for seed in range(layers - 1)]
    h, c = torch.rand(layers, 2, channels, dtype=torch.float64), torch.randn(layers, 2, channels, dtype=torch.float64)

    y, (new_h, new_c) = functional.step(problem.x, problem.parameters, (h, c), stacked=rest, backend=backend)

    _, below, first_c = formula(problem.x, None, h[0], c[0], problem.parameters)
    hs, cs = [below], [first_c]
    for k, layer in enumerate(rest, start=1):
        upper_h, upper_c = plain_layer(hs[-1], h[k], c[k], layer)
        hs.append(upper_h)
        cs.append(upper_c)
    assert_equal_up_to_rounding(new_h, torch.stack(hs), "h")
    assert_equal_up_to_rounding(new_c, torch.stack(cs), "c")
    assert_equal_up_to_rounding(y, problem.x * hs[-1][:, :, None, None], "y")


def test_dropout_acts_between_layers_only():
    channels = 4
    problem = make_problem((2, channels, 4, 4), 2, dtype=torch.float64)
    rest = [stacked_layer(channels, 0)]
    plain = functional.step(problem.x, problem.parameters, stacked=rest)[1]
    dropped = functional.step(problem.x, problem.parameters, stacked=rest, dropout=0.9)[1]
    assert torch.equal(plain[0][0], dropped[0][0])
    assert not torch.equal(plain[0][1], dropped[0][1])


# --- pytorchcv ---------------------------------------------------------------------------------------


def copy_from_pytorchcv(unit: DIAAttention) -> tuple[LSTMParameters, list[StackedLayer]]:
    """The unit's own parameters in the library's order: gradients arrive where the unit's would."""
    first = [
        tensor
        for amplifiers in (unit.lstm.x_amps, unit.lstm.h_amps)
        for linear in (amplifiers.amp1.fc1, amplifiers.amp1.fc2)
        for tensor in (linear.weight, linear.bias)
    ]
    rest = []
    for k in range(2, len(unit.lstm.x_amps) + 1):
        linears = (getattr(unit.lstm.x_amps, f"amp{k}"), getattr(unit.lstm.h_amps, f"amp{k}"))
        rest.append(StackedLayer(*(t for linear in linears for t in (linear.weight, linear.bias))))
    return LSTMParameters(*first), rest


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backend", ["reference", None])
def test_two_steps_equal_those_of_pytorchcv(backend, layers):
    channels = 16
    unit = DIAAttention(channels, channels, num_layers=layers).double().eval()  # eval: no dropout between layers
    parameters, rest = copy_from_pytorchcv(unit)
    x1 = torch.randn(3, channels, 6, 5, dtype=torch.float64, requires_grad=True)
    x2 = torch.randn(3, channels, 6, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x1, x2, *unit.parameters()]

    y1, hc = unit(x1)
    y2, hc = unit(x2, hc)
    expected = [y1, y2, *hc[0], *hc[1]]
    expected_gradients = torch.autograd.grad(sum(t.square().sum() for t in expected), inputs)

    y1, state = functional.step(x1, parameters, stacked=rest, backend=backend)
    y2, (h, c) = functional.step(x2, parameters, state, stacked=rest, backend=backend)
    found = [y1, y2, *(h if rest else [h]), *(c if rest else [c])]
    found_gradients = torch.autograd.grad(sum(t.square().sum() for t in found), inputs)

    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_equal_up_to_rounding(a, b, f"result {k}")
    for k, (a, b) in enumerate(zip(found_gradients, expected_gradients, strict=True)):
        assert_equal_up_to_rounding(a, b, f"gradient {k}")
