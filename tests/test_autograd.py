"""Which path a call takes, and every kind of derivative along it."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from problems import LEAVES, formula_step, library_step, make_problem, run
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from dia_kernels import LSTMParameters, SharedAttention, StackedLayer, autograd, functional

EPS = torch.finfo(torch.float64).eps


def assert_same(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Equal but for the rounding of a few hundred float64 operations on values near 1."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=256 * EPS, msg=lambda t: f"{name}: {t}")


# --- the routing rule ---------------------------------------------------------------------------------


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that calls took, in order: the rule itself decides, between recorders."""
    taken: list[str] = []
    rule, apply = autograd.route, autograd.apply

    def recorded(name, target):
        def call(*args):
            taken.append(name)
            return target(*args)

        return call

    def route(function, operator, reference_of, args, *first):
        return rule(
            SimpleNamespace(apply=recorded("function", function.apply), outside_of_transforms=function),
            recorded("operator", operator),
            recorded("reference", reference_of),
            args,
            *first,
        )

    def shortest_way(function, *args):
        return recorded("function", apply)(getattr(function, "outside_of_transforms", function), *args)

    monkeypatch.setattr(autograd, "route", route)
    monkeypatch.setattr(autograd, "apply", shortest_way)
    return taken


@pytest.fixture
def attention() -> SharedAttention:
    return SharedAttention(6, 2)


X = (2, 6, 3, 4)


def test_export_to_onnx_takes_the_reference(paths, attention, monkeypatch):
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    attention(torch.randn(X))
    assert paths == ["reference"]


def test_forward_mode_takes_the_reference(paths, attention):
    with forward_ad.dual_level():
        attention(forward_ad.make_dual(torch.randn(X), torch.randn(X)))
        with torch.no_grad():
            attention(torch.randn(X))
    jvp(lambda x: attention(x)[0], (torch.randn(X),), (torch.randn(X),))
    assert paths == ["reference"] * 3


@pytest.mark.parametrize("needed", ["x", "shortcut", "h", "c", *LSTMParameters._fields])
def test_a_gradient_takes_the_function(paths, needed):
    leaves = {name: leaf.requires_grad_(name == needed) for name, leaf in make_problem(X, 3).leaves().items()}
    parameters = LSTMParameters(*(leaves[name] for name in LSTMParameters._fields))
    functional.step(leaves["x"], parameters, (leaves["h"], leaves["c"]), shortcut=leaves["shortcut"])
    with torch.no_grad():
        functional.step(leaves["x"], parameters, (leaves["h"], leaves["c"]), shortcut=leaves["shortcut"])
    assert paths == ["function", "operator"]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_no_gradient_takes_the_operator(paths, attention, guard):
    with guard():
        attention(torch.randn(X))
    attention.requires_grad_(False)(torch.randn(X))
    assert paths == ["operator", "operator"]


def test_a_transform_takes_the_function(paths, attention):
    with torch.no_grad():
        vmap(lambda x: attention(x)[0])(torch.randn(3, *X))
    grad(lambda x: attention(x)[0].sum())(torch.randn(X))
    assert paths == ["function", "function"]


def operators_in_graph(function, *args) -> list[str]:
    """Names of the library's operators in the graphs that compiling ``function`` gives."""
    found = []

    def backend(graph, _inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if "dia_kernels" in str(node.target))
        return graph

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found


@pytest.mark.parametrize("gradient", [True, False])
def test_compiling_takes_the_operator(attention, gradient):
    with torch.set_grad_enabled(gradient):
        assert operators_in_graph(lambda x: attention(x)[0], torch.randn(X)) == ["dia_kernels.step.default"]


def test_compiling_inside_a_transform_takes_the_reference(attention):
    assert operators_in_graph(grad(lambda x: attention(x)[0].sum()), torch.randn(X)) == []


def test_a_backend_named_reference_never_meets_an_operator(paths):
    attention = SharedAttention(6, 2, backend="reference")
    attention(torch.randn(X))
    with torch.no_grad():
        attention(torch.randn(X))
    assert paths == []
    assert operators_in_graph(lambda x: attention(x)[0], torch.randn(X)) == []


@pytest.mark.parametrize("inplace", [False, True])
def test_a_backend_named_reference_runs_no_kernel_of_the_library(inplace, monkeypatch):
    def refused(*args):
        raise AssertionError("an operator ran though the reference was asked for")

    for name in ("step", "step_", "pool", "rescale"):
        monkeypatch.setattr(autograd.operators.native, name, refused)
    attention = SharedAttention(6, 2, backend="reference").requires_grad_(False)
    x = torch.randn(X)
    expected = functional.reference.step(x, None, None, None, attention.lstm_parameters(), 1, False, "sigmoid")[0]
    y, _ = attention(x, inplace=inplace)
    assert torch.equal(y, expected)
    assert (y.data_ptr() == x.data_ptr()) == inplace


# --- derivatives against finite differences -----------------------------------------------------------


def as_function(backend, problem):
    """The step as a function of the problem's tensors in the order of their names."""
    step, names = library_step(backend), list(problem.leaves())

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        parameters = LSTMParameters(*(given[name] for name in LSTMParameters._fields))
        return step(problem, *(given.get(name) for name in LEAVES[:4]), parameters)

    return function, tuple(problem.leaves().values())


OPTIONS = [
    {},
    {"output": "tanh"},
    {"relu": False},
    {"shortcut": False},
    {"state": False},
    {"state": False, "shortcut": False, "relu": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 3, 2, 2), 1), ((2, 3, 2), -1)], ids=str)
def test_first_derivatives(backend, shape, channel_dim, options):
    problem = make_problem(shape, 2, dtype=torch.float64, channel_dim=channel_dim, **options)
    function, tensors = as_function(backend, problem)
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True, check_undefined_grad=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives(backend, options):
    problem = make_problem((2, 2, 2, 1), 1, dtype=torch.float64, **options)
    function, tensors = as_function(backend, problem)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("relu", [False, True])
def test_derivatives_of_stacked_layers(backend, relu):
    problem = make_problem((2, 2, 2, 2), 1, dtype=torch.float64, relu=relu)
    layer = StackedLayer(*(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((8, 2), 8) * 2))
    h, c = torch.rand(2, 2, 2, 2, dtype=torch.float64).requires_grad_()

    def function(x, shortcut, h, c, *parameters):
        y, (h, c) = functional.step(
            x,
            LSTMParameters(*parameters[:8]),
            (h, c),
            stacked=[StackedLayer(*parameters[8:])],
            shortcut=shortcut,
            activation="relu" if relu else None,
            backend=backend,
        )
        return y, h, c

    leaves = problem.leaves()
    tensors = (leaves["x"], leaves["shortcut"], h.detach().requires_grad_(), c.detach().requires_grad_())
    tensors += (*(leaves[name] for name in LSTMParameters._fields), *layer)
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, tensors)


def test_a_gradient_penalty_equals_that_of_the_formula(backend):
    problem = make_problem((3, 6, 4, 4), 3, dtype=torch.float64)

    def penalty(step):
        leaves = problem.leaves()
        parameters = LSTMParameters(*(leaves[name] for name in LSTMParameters._fields))
        y, h, c = step(problem, leaves["x"], leaves["shortcut"], leaves["h"], leaves["c"], parameters)
        (dx,) = torch.autograd.grad((y.square().sum() + h.sum() + c.sum()), leaves["x"], create_graph=True)
        loss = (dx.square().sum().sqrt() - 1).square() + y.mean()
        return torch.autograd.grad(loss, list(leaves.values()))

    for name, found, expected in zip(
        problem.leaves(), penalty(library_step(backend)), penalty(formula_step), strict=True
    ):
        assert_same(found, expected, name)


# --- only some gradients ------------------------------------------------------------------------------

SUBSETS = {
    "frozen parameters": LEAVES[:4],
    "frozen map": LEAVES[1:],
    "parameters only": LSTMParameters._fields,
    "biases only": tuple(name for name in LSTMParameters._fields if name.endswith("bias")),
    **{f"{name} only": (name,) for name in LEAVES},
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("subset", SUBSETS)
def test_only_the_gradients_asked_for(backend, subset, relu):
    problem = make_problem((3, 6, 4, 4), 3, dtype=torch.float64, relu=relu)
    expected = run(formula_step, problem)
    leaves = problem.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in SUBSETS[subset])
    parameters = LSTMParameters(*(leaves[name] for name in LSTMParameters._fields))
    results = library_step(backend)(problem, *(leaves[name] for name in LEAVES[:4]), parameters)
    used = [(r, g) for r, g in zip(results, (problem.dy, problem.dh, problem.dc), strict=True) if r.requires_grad]
    torch.autograd.backward(*zip(*used, strict=True))
    for name, leaf in leaves.items():
        if name in SUBSETS[subset]:
            assert_same(leaf.grad, expected[f"d{name}"], name)
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("relu", [False, True])
def test_the_backward_operator_is_asked_only_for_what_is_needed(monkeypatch, relu):
    asked = []
    backward = autograd.operators.native.step_backward
    monkeypatch.setattr(
        autograd.operators.native, "step_backward", lambda *args: asked.append(args[-5:-1]) or backward(*args)
    )
    problem = make_problem((3, 6, 4, 4), 3, relu=relu, state=False)
    for needed in ("x", "shortcut", "input_expand_bias"):
        leaves = {name: leaf.requires_grad_(name == needed) for name, leaf in problem.leaves().items()}
        parameters = LSTMParameters(*(leaves[name] for name in LSTMParameters._fields))
        y, _, _ = library_step(None)(problem, leaves["x"], leaves["shortcut"], None, None, parameters)
        y.sum().backward()
    shortcut = [(False, True, False, False)] if relu else []  # without a ReLU it is the incoming gradient itself
    assert asked == [(True, False, False, False), *shortcut, (False, False, False, True)]


# --- transforms ---------------------------------------------------------------------------------------


def module_and_batch(channel_dim: int = 1) -> tuple[SharedAttention, torch.Tensor, torch.Tensor]:
    attention = SharedAttention(6, 2, channel_dim=channel_dim).double()
    shape = (4, 6, 3, 3) if channel_dim == 1 else (4, 9, 6)
    return attention, torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_vmap_equals_a_loop(channel_dim, activation):
    attention, x, shortcut = module_and_batch(channel_dim)
    maps, shortcuts = torch.stack([x, x * 2, -x]), torch.stack([shortcut, x, -shortcut])

    def block(x, shortcut):
        y, state = attention(x, shortcut=shortcut, activation=activation)
        return attention(y, state)[0]

    expected = torch.stack([block(a, b) for a, b in zip(maps, shortcuts, strict=True)])
    assert_same(vmap(block)(maps, shortcuts), expected)
    assert_same(vmap(block, in_dims=(0, None))(maps, shortcut)[1], block(maps[1], shortcut))
    assert_same(vmap(block, in_dims=(2, 2))(maps.movedim(0, 2), shortcuts.movedim(0, 2)), expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_of_each_sample(layers):
    attention, x, shortcut = module_and_batch()
    if layers > 1:
        attention = SharedAttention(6, 2, num_layers=layers).double()
    parameters = dict(attention.named_parameters())

    def loss(parameters, x, shortcut):
        given = {"shortcut": shortcut[None], "activation": "relu"}
        y, state = functional_call(attention, parameters, (x[None],), given)
        y, state = functional_call(attention, parameters, (y, state), given)
        return y.square().sum() + state[1].sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))({k: p.detach() for k, p in parameters.items()}, x, shortcut)
    for n in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[n], shortcut[n]), list(parameters.values()))
        for (name, found), gradient in zip(each.items(), expected, strict=True):
            assert_same(found[n], gradient, name)


def flat_step(backend, problem):
    """y as a vector, as a function of x and of one weight."""
    step = library_step(backend)

    def function(x, weight):
        parameters = problem.parameters._replace(input_expand_weight=weight)
        return step(problem, x, problem.shortcut, problem.h, problem.c, parameters)[0].flatten()

    return function


@pytest.mark.parametrize("relu", [False, True])
def test_jacobians_and_directional_derivatives_equal_the_formulas(relu):
    problem = make_problem((2, 3, 2, 2), 2, dtype=torch.float64, relu=relu)
    inputs = (problem.x, problem.parameters.input_expand_weight)
    ours, reference = flat_step(None, problem), flat_step("reference", problem)
    expected = torch.autograd.functional.jacobian(
        lambda x, w: formula_step(
            problem, x, problem.shortcut, problem.h, problem.c, problem.parameters._replace(input_expand_weight=w)
        )[0].flatten(),
        inputs,
    )
    for function in (ours, reference):
        for transform in (jacrev, jacfwd):
            for found, jacobian in zip(transform(function, argnums=(0, 1))(*inputs), expected, strict=True):
                assert_same(found, jacobian)
    tangents = (torch.randn_like(inputs[0]), torch.randn_like(inputs[1]))
    _, found = jvp(ours, inputs, tangents)
    directional = sum(
        (jacobian.flatten(1) @ tangent.flatten()) for jacobian, tangent in zip(expected, tangents, strict=True)
    )
    assert_same(found, directional)


def test_hessian_by_transforms_equals_the_reference():
    problem = make_problem((1, 2, 2), 1, dtype=torch.float64)

    def hessian(backend):
        function = flat_step(backend, problem)
        return jacrev(jacrev(lambda x: function(x, problem.parameters.input_expand_weight).square().sum()))(problem.x)

    assert_same(hessian(None), hessian("reference"))


# --- graphs that live longer, or shorter --------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_state_of_an_earlier_pass_is_explained(attention, activation):
    x = torch.randn(X)
    y, state = attention(x, activation=activation)
    y.sum().backward()
    stale, _ = attention(x, state, activation=activation)
    with pytest.raises(RuntimeError, match=r"dia_kernels: .*carried over from an earlier forward pass.*state=None"):
        stale.sum().backward()


def test_a_stacked_state_of_an_earlier_pass_is_explained():
    attention = SharedAttention(6, 2, num_layers=2)
    x = torch.randn(X)
    y, state = attention(x)
    y.sum().backward()
    stale, _ = attention(x, state)
    with pytest.raises(RuntimeError, match=r"dia_kernels: .*carried over from an earlier forward pass.*state=None"):
        stale.sum().backward()


def test_a_detached_state_of_an_earlier_pass_is_fine(attention):
    x = torch.randn(X)
    y, (h, c) = attention(x)
    y.sum().backward()
    attention(x, (h.detach(), c.detach()))[0].sum().backward()


def test_a_second_backward_adds_the_same_gradients(attention):
    y, _ = attention(torch.randn(X), shortcut=torch.randn(X), activation="relu")
    y.sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in attention.parameters()]
    y.sum().backward()
    for parameter, gradient in zip(attention.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("name", ["x", "shortcut", "h", "c"])
def test_an_input_changed_before_the_backward_is_noticed(name):
    problem = make_problem(X, 3)
    leaves = problem.leaves()
    inputs = {n: leaf * 1 for n, leaf in leaves.items()}
    parameters = LSTMParameters(*(inputs[n] for n in LSTMParameters._fields))
    y, _, _ = library_step(None)(problem, *(inputs[n] for n in LEAVES[:4]), parameters)
    inputs[name].add_(1)
    if name == "shortcut":  # not saved: the sum needs only y
        y.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_without_a_relu_the_caller_may_change_y(attention):
    x = torch.randn(X, requires_grad=True)
    y, _ = attention(x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    y, _ = attention(x)
    y += torch.randn(X)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


def run_blocks(attention, x, wrap):
    state = (torch.zeros(2, 6), torch.zeros(2, 6))
    for _ in range(3):
        x, state = wrap(lambda x, h, c: attention(x, (h, c), shortcut=x, activation="relu"), x, *state)
    return x


def test_checkpointed_blocks_give_the_same_bits(attention):
    def gradients(wrap):
        x = torch.randn(X, generator=torch.Generator().manual_seed(1)).requires_grad_()
        return torch.autograd.grad(run_blocks(attention, x, wrap).sum(), [x, *attention.parameters()])

    plain = gradients(lambda f, *args: f(*args))
    checkpointed = gradients(lambda f, *args: checkpoint(f, *args, use_reentrant=False))
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_a_copy_made_between_forward_and_backward_is_independent(attention):
    y, _ = attention(torch.randn(X))
    other = copy.deepcopy(attention)
    y.sum().backward()
    assert all(p.grad is not None for p in attention.parameters())
    assert all(p.grad is None for p in other.parameters())


def test_saved_bytes_are_those_of_the_map_and_small_tables(attention):
    x = torch.randn(8, 6, 32, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = attention(x)
    maps = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert maps == {x.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = attention(x, shortcut=torch.randn_like(x), activation="relu")
    maps = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert maps == {x.data_ptr(), y.data_ptr()}


def test_a_frozen_map_and_shortcut_still_train_the_cell(backend):
    problem = replace(make_problem((3, 6, 4, 4), 3, dtype=torch.float64), dh=None, dc=None)
    attention = SharedAttention(6, 2, backend=backend).double()
    y, _ = attention(problem.x, shortcut=problem.shortcut, activation="relu")
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
