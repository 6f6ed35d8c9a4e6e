"""The step's results and gradients against float64 truth: shapes, strides, dtypes, threads, extremes.

Every test runs on each implementation (see ``backend`` in conftest.py); accuracy.py says how large an
error may be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import (
    Problem,
    assert_contract,
    compute_dtype,
    formula_step,
    library_step,
    lstm_parameters,
    make_problem,
    run,
    run_forward,
    same_bits,
)
from torch import Tensor

from dia_kernels import LSTMParameters, functional

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# (shape, bottleneck, channel_dim); the bottlenecks of reductions 4 and 20 where C allows, odd ones among them
SHAPES = {
    "7x7, C=12, r=4": ((2, 12, 7, 7), 3, 1),
    "7x7, C=102, r=20": ((3, 102, 7, 7), 5, 1),
    "C=25, r=4": ((2, 25, 5, 3), 6, 1),
    "C=64, 16x16": ((2, 64, 16, 16), 16, 1),
    "C=1, r=1": ((3, 1, 4, 4), 1, 1),
    "one position": ((5, 12, 1, 1), 3, 1),
    "one sample": ((1, 12, 9, 8), 3, 1),
    "one value": ((1, 1, 1), 1, 1),
    "1-D": ((2, 12, 33), 3, 1),
    "3-D": ((2, 12, 3, 5, 2), 3, 1),
    "tokens": ((2, 17, 12), 3, -1),
    "tokens, C=25": ((2, 9, 25), 6, -1),
    "channels last by name": ((2, 4, 3, 12), 3, -1),
    "long rows": ((2, 4, 57, 61), 4, 1),
}


@cache
def draws(shape: tuple[int, ...], bottleneck: int, **options) -> list[Problem]:
    """Enough problems that the smallest tensor, a bias of the bottleneck, has 96 values in all of them.

    The contract compares worst cases (see accuracy.assert_accurate): a few values would leave it to luck.
    """
    return [make_problem(shape, bottleneck, seed=seed, **options) for seed in range(96 // bottleneck)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_dtypes(backend, name, dtype):
    shape, bottleneck, channel_dim = SHAPES[name]
    assert_contract(backend, draws(shape, bottleneck, dtype=dtype, channel_dim=channel_dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shortcut", "relu"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("output", ["sigmoid", "tanh"])
def test_options(backend, output, state, shortcut, relu, dtype):
    options = {"output": output, "state": state, "shortcut": shortcut, "relu": relu}
    assert_contract(backend, draws((3, 20, 6, 5), 5, dtype=dtype, **options))


# --- layouts -----------------------------------------------------------------------------------------


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[t.ndim])


def every_other_column(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


def inner_channels(t: Tensor) -> Tensor:
    wide = t.new_full((t.shape[0], t.shape[1] + 2, *t.shape[2:]), float("nan"))
    wide[:, 1:-1] = t
    return wide[:, 1:-1]


def inner_channels_of_channels_last(t: Tensor) -> Tensor:
    wide = channels_last(t.new_full((t.shape[0], t.shape[1] + 2, *t.shape[2:]), float("nan")))
    wide[:, 1:-1] = t
    return wide[:, 1:-1]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def samples_inside(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def one_element_off(t: Tensor) -> Tensor:
    memory = t.new_full((t.numel() + 1,), float("nan"))
    memory[1:] = t.flatten()
    return memory[1:].view(t.shape)


def channels_last_one_element_off(t: Tensor) -> Tensor:
    memory = one_element_off(channels_last(t).permute(0, 2, 3, 1))
    return memory.permute(0, 3, 1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        torch.Tensor.contiguous,
        channels_last,
        every_other_column,
        inner_channels,
        inner_channels_of_channels_last,
        transposed,
        samples_inside,
        one_element_off,
        channels_last_one_element_off,
    )
}


def is_channels_last(t: Tensor) -> bool:
    if t.ndim not in (4, 5) or t.is_contiguous():
        return False
    return t.is_contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)


def assert_layout(result: Tensor, x: Tensor, name: str) -> None:
    """The contract's layout: channels_last if x is so and not contiguous, else contiguous."""
    expected = channels_last(torch.empty(x.shape)) if is_channels_last(x) else torch.empty(x.shape)
    assert result.stride() == expected.stride(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shortcut", ["contiguous", "channels_last", "every_other_column"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_shortcut(backend, layout, shortcut, dtype):
    plain = make_problem((3, 12, 6, 5), 3, dtype=dtype)
    problem = replace(plain, x=LAYOUTS[layout](plain.x), shortcut=LAYOUTS[shortcut](plain.shortcut))
    found, expected = run(library_step(backend), problem), run(library_step(backend), plain)
    assert found["y"].dtype == found["dx"].dtype == found["dshortcut"].dtype == dtype
    assert found["h"].dtype == found["c"].dtype == torch.float32
    assert_layout(found["y"], problem.x, "y")
    if backend != "reference":  # there PyTorch's own gradient chooses the strides
        assert_layout(found["dx"], problem.x, "dx")
        assert_layout(found["dshortcut"], problem.x, "dshortcut")
    for name in ("h", "c", "y", "dx", "dshortcut"):
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_accuracy(backend, layout):
    assert_contract(backend, draws((3, 12, 6, 5), 3, dtype=torch.float32, view=LAYOUTS[layout]))


@pytest.mark.parametrize("layout", ["channels_last", "every_other_column", "inner_channels", "samples_inside"])
def test_layouts_of_volumes(backend, layout):
    problems = draws((2, 12, 3, 4, 5), 3, view=LAYOUTS[layout])
    assert_contract(backend, problems)
    y = run_forward(library_step(backend), problems[0])["y"]
    assert_layout(y, problems[0].x, "y")


@pytest.mark.parametrize("view", [every_other_column, transposed, samples_inside, one_element_off])
def test_layouts_of_tokens(backend, view):
    problems = draws((3, 11, 12), 3, channel_dim=-1, view=view)
    assert_contract(backend, problems)
    assert run_forward(library_step(backend), problems[0])["y"].is_contiguous()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_an_expanded_map_is_read_as_it_is(backend, dim):
    plain = make_problem((3, 12, 6, 5), 3)
    x = plain.x.narrow(dim, 0, 1).expand(plain.x.shape)
    expanded, dense = replace(plain, x=x, shortcut=None), replace(plain, x=x.contiguous(), shortcut=None)
    found, expected = run(library_step(backend), expanded), run(library_step(backend), dense)
    assert found["y"].is_contiguous()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", [(3, 1, 6, 5), (3, 12, 1, 1), (1, 12, 1, 1)])
def test_a_map_in_both_formats_counts_as_contiguous(backend, shape):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    y, _ = functional.step(x, lstm_parameters(shape[1], 1), backend=backend)
    assert y.is_contiguous()


def test_a_state_and_parameters_of_any_strides(backend):
    plain = make_problem((4, 12, 5, 5), 3)
    wide = torch.stack([plain.h, plain.c], dim=2)
    strided = [torch.stack([p, -p], dim=-1)[..., 0] for p in plain.parameters]
    turned = [p.t().contiguous().t() if p.ndim == 2 else p for p in strided]
    problem = replace(plain, h=wide[..., 0], c=wide[..., 1], parameters=LSTMParameters(*turned))
    found, expected = run(library_step(backend), problem), run(library_step(backend), plain)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_x_as_its_own_shortcut(backend):
    plain = make_problem((3, 12, 6, 5), 3, shortcut=False)
    step = library_step(backend)
    ours = run(lambda problem, x, _, *rest: step(problem, x, x, *rest), plain)
    truth = run(lambda problem, x, _, *rest: formula_step(problem, x, x, *rest), plain.double())
    torch.testing.assert_close(ours["y"].double(), truth["y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["dx"].double(), truth["dx"], rtol=0, atol=1e-5)


# --- incoming gradients ------------------------------------------------------------------------------

INCOMING: dict[str, Callable[[Tensor], Tensor]] = LAYOUTS | {
    "sum": lambda t: t.new_ones(()).expand(t.shape),
    "expanded": lambda t: t[:, :, :1, :1].expand(t.shape),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "inner_channels", "every_other_column"])
@pytest.mark.parametrize("incoming", INCOMING)
def test_strides_of_the_incoming_gradient(backend, incoming, layout, relu):
    plain = make_problem((3, 12, 6, 5), 3, relu=relu)
    problem = replace(plain, x=LAYOUTS[layout](plain.x), dy=INCOMING[incoming](plain.dy))
    truth = run(formula_step, problem.double())
    found = run(library_step(backend), problem)
    for name, expected in truth.items():
        assert not found[name].isnan().any()
        torch.testing.assert_close(
            found[name].double(), expected, rtol=0, atol=1e-6 * max(1, expected.abs().max().item()), msg=name
        )


@pytest.mark.parametrize("used", ["y", "h", "c", "yh", "yc", "hc"])
@pytest.mark.parametrize("relu", [False, True])
def test_some_results_are_not_used(backend, used, relu):
    problems = [
        replace(problem, **{f"d{name}": None for name in "yhc" if name not in used})
        for problem in draws((3, 12, 6, 5), 3, relu=relu)
    ]
    step = library_step(backend)
    found, truth = run(step, problems[0]), run(formula_step, problems[0].double())
    assert ("dshortcut" in found) == ("y" in used) == ("dshortcut" in truth)
    for name in truth:
        found.setdefault(name, torch.zeros_like(truth[name]))  # None and zeros are both "no gradient"
        torch.testing.assert_close(
            found[name].double(), truth[name], rtol=0, atol=1e-6 * max(1, truth[name].abs().max().item()), msg=name
        )


# --- the same bits ------------------------------------------------------------------------------------


NATIVE_ONLY = pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # the others run PyTorch's kernels


@NATIVE_ONLY
@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize(("shape", "bottleneck"), [((5, 12, 7, 7), 3), ((3, 40, 30, 30), 10), ((1, 70, 40, 40), 17)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_number_of_threads_keeps_the_accuracy(backend, layout, shape, bottleneck, threads):
    problems = draws(shape, bottleneck, view=LAYOUTS[layout])
    torch.set_num_threads(threads)  # the fixture `backend` restores it
    assert_contract(backend, problems)


@NATIVE_ONLY
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_twenty_runs_give_the_same_bits(backend, layout, dtype, threads):
    problem = make_problem((3, 40, 31, 30), 10, dtype=dtype, view=LAYOUTS[layout])
    torch.set_num_threads(threads)
    first = run(library_step(backend), problem)
    for _ in range(19):
        again = run(library_step(backend), problem)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_does_not_see_the_others(backend, layout):
    problem = make_problem((4, 12, 6, 5), 3, view=LAYOUTS[layout])
    others = torch.arange(4) != 1
    changed = {}
    for name in ("x", "shortcut", "h", "c", "dy", "dh", "dc"):
        changed[name] = getattr(problem, name).clone()
        changed[name][others] = torch.randn_like(changed[name][others]) * 100
    found, expected = run(library_step(backend), replace(problem, **changed)), run(library_step(backend), problem)
    for name in ("y", "h", "c", "dx", "dshortcut", "dh", "dc"):
        assert torch.equal(found[name][1], expected[name][1]), name


def test_the_callers_tensors_stay_as_they_were(backend):
    problem = make_problem((3, 12, 6, 5), 3, view=channels_last)
    incoming = {"dy": problem.dy, "dh": problem.dh, "dc": problem.dc}
    tensors = problem.leaves() | incoming
    before = {name: (t.detach().clone(), t._version) for name, t in tensors.items()}
    run(library_step(backend), problem)
    for name, (value, version) in before.items():
        assert torch.equal(tensors[name], value), name
        assert tensors[name]._version == version, name


# --- empty maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((0, 12, 6, 5), 1), ((0, 12, 4), 1), ((0, 6, 12), -1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"state": False}, {"shortcut": False}, {"relu": False}], ids=str)
def test_no_samples(backend, options, shape, channel_dim, dtype):
    problem = make_problem(shape, 3, dtype=dtype, channel_dim=channel_dim, **options)
    found, expected = run(library_step(backend), problem), run(formula_step, problem)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name  # the parameters' gradients are zero, all else is empty


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 12, 0, 5), 1), ((2, 12, 0), 1), ((2, 0, 12), -1)], ids=str)
@pytest.mark.parametrize("state", [False, True])
def test_no_positions(backend, state, shape, channel_dim, dtype):
    problem = make_problem(shape, 3, dtype=dtype, channel_dim=channel_dim, state=state)
    found, expected = run(library_step(backend), problem), run(formula_step, problem)
    assert found["h"].isnan().all()
    assert found["y"].shape == shape
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


# --- values at the edge -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", ["x", "shortcut", "h", "c", "dy", "dh", "dc"])
def test_values_that_are_not_finite_propagate_as_in_eager(backend, name, relu, layout, value):
    plain = make_problem((3, 12, 6, 7), 3, relu=relu, view=LAYOUTS[layout])
    tensor = getattr(plain, name).clone()
    tensor.select(0, 1).select(0, 5).fill_(1.0)
    tensor[(1, 5, 2, 3) if tensor.ndim == 4 else (1, 5)] = value
    problem = replace(plain, **{name: tensor})
    found, eager = run(library_step(backend), problem), run(formula_step, problem)
    for key, expected in eager.items():
        assert torch.equal(found[key].isnan(), expected.isnan()), key
        assert torch.equal(found[key].isposinf(), expected.isposinf()), key
        assert torch.equal(found[key].isneginf(), expected.isneginf()), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_relu_keeps_nan_and_masks_zero(backend, dtype):
    problem = make_problem((1, 1, 5), 1, dtype=dtype, state=False)
    zeros = LSTMParameters(*(torch.zeros_like(p) for p in problem.parameters))
    nan = float("nan")
    x = torch.zeros(1, 1, 5, dtype=dtype)
    shortcut = torch.tensor([[[nan, 0.0, -1.0, 1.0, -0.0]]], dtype=dtype)
    found = run(
        library_step(backend),
        replace(problem, x=x, shortcut=shortcut, parameters=zeros, dy=torch.ones_like(x), dh=None, dc=None),
    )
    assert same_bits(found["y"], torch.tensor([[[nan, 0.0, 0.0, 1.0, 0.0]]], dtype=dtype))
    assert torch.equal(found["dshortcut"], torch.tensor([[[1.0, 0.0, 0.0, 1.0, 0.0]]], dtype=dtype))


def test_a_large_mean_does_not_cost_accuracy(backend):
    problems = [replace(p, x=p.x * 1e-2 + 1e4) for p in draws((3, 12, 28, 28), 3, relu=False)]
    assert_contract(backend, problems)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [1e30, -1e30])
def test_huge_maps_stay_finite(backend, magnitude, dtype):
    plain = make_problem((2, 4, 3, 3), 1, dtype=dtype, shortcut=False)
    parameters = plain.parameters._replace(input_reduce_weight=plain.parameters.input_reduce_weight * 1e-30)
    problem = replace(plain, x=torch.full_like(plain.x, magnitude), parameters=parameters, dy=plain.dy * 1e-30)
    found, truth = run(library_step(backend), problem), run(formula_step, problem.double())
    tolerance = 8 * torch.finfo(dtype).eps
    for name, expected in truth.items():
        assert found[name].isfinite().all(), name
        scale = expected.abs().max().clamp_min(torch.finfo(dtype).tiny)
        torch.testing.assert_close(found[name].double() / scale, expected / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
@pytest.mark.parametrize("gate", range(4))
@pytest.mark.parametrize("output", ["sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_saturated_gates(backend, dtype, output, gate, logit):
    plain = make_problem((2, 12, 4, 4), 3, dtype=dtype, output=output)
    bias = plain.parameters.input_expand_bias.clone()
    bias[12 * gate : 12 * (gate + 1)] = logit
    problem = replace(plain, parameters=plain.parameters._replace(input_expand_bias=bias))
    problem = replace(problem, shortcut=None)
    found, truth = run(library_step(backend), problem), run(formula_step, problem.double())
    for name, expected in truth.items():
        assert found[name].isfinite().all(), name
        atol = 32 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=atol, msg=name)


# --- in place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shortcut", [None, "contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_gives_the_same_bits(backend, layout, shortcut, dtype):
    problem = make_problem((3, 12, 6, 5), 3, dtype=dtype, shortcut=shortcut is not None)
    if shortcut is not None:
        problem = replace(problem, shortcut=LAYOUTS[shortcut](problem.shortcut))
    expected = run_forward(library_step(backend), replace(problem, x=LAYOUTS[layout](problem.x)))
    x = LAYOUTS[layout](problem.x.clone())
    strides, version = x.stride(), x._version
    found = run_forward(library_step(backend, inplace=True), replace(problem, x=x))
    assert found["y"].data_ptr() == x.data_ptr()
    assert x.stride() == strides
    assert x._version > version
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("view", [every_other_column, inner_channels])
def test_in_place_leaves_the_gaps_of_a_view(backend, view):
    problem = make_problem((3, 12, 6, 5), 3)
    x = view(problem.x)
    memory = torch.empty(0).set_(x.untyped_storage())
    run_forward(library_step(backend, inplace=True), replace(problem, x=x))
    assert memory.isnan().sum() == memory.numel() - x.numel()
    assert not x.isnan().any()


@pytest.mark.parametrize("shape", [(0, 12, 6, 5), (2, 12, 0, 5)])
def test_in_place_on_empty_maps(backend, shape):
    problem = make_problem(shape, 3)
    found = run_forward(library_step(backend, inplace=True), problem)
    assert found["y"].shape == shape


def test_in_place_on_x_as_its_own_shortcut(backend):
    problem = make_problem((3, 12, 6, 5), 3, shortcut=False)
    expected = run_forward(library_step(backend), replace(problem, shortcut=problem.x))
    x = problem.x.clone()
    found = run_forward(library_step(backend, inplace=True), replace(problem, x=x, shortcut=x))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_in_place_with_a_shortcut_that_overlaps_x(backend):
    memory = torch.randn(3, 13, 6, 5)
    problem = make_problem((3, 12, 6, 5), 3)
    expected = run_forward(library_step(backend), replace(problem, x=memory[:, :-1], shortcut=memory[:, 1:]))
    found = run_forward(library_step(backend, inplace=True), replace(problem, x=memory[:, :-1], shortcut=memory[:, 1:]))
    assert torch.equal(found["y"], expected["y"])


# --- any shape ----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(1, 9),
    channels=st.integers(1, 70),
    reduction=st.integers(1, 20),
    spatial=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("shortcut", "state", "relu")}),
    tokens=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(backend, samples, channels, reduction, spatial, dtype, options, tokens, seed):
    shape = (samples, *spatial, channels) if tokens else (samples, channels, *spatial)
    bottleneck = max(channels // reduction, 1)
    problem = make_problem(shape, bottleneck, dtype=dtype, channel_dim=-1 if tokens else 1, seed=seed, **options)
    found, truth = run(library_step(backend), problem), run(formula_step, problem.double())
    assert found.keys() == truth.keys()
    # A single draw, so no comparison with eager: each value may be off by its worst case, a sum of
    # `terms` products of values near 1.
    table = compute_dtype(dtype)
    for name, expected in truth.items():
        eps = torch.finfo(found[name].dtype).eps + 4 * problem.terms * torch.finfo(table).eps
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found[name].double() / scale, expected / scale, rtol=0, atol=eps, msg=name)
