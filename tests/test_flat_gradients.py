"""Blocks that share a cell have one gradient of its parameters, made at once, and nobody can tell but the clock."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dia_kernels import LSTMParameters, SharedAttention, autograd, operators
from dia_kernels.cells import join_parameters, parameter_count, split_parameters

C, REDUCTION, BLOCKS = 8, 2, 4
M = C // REDUCTION


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> SharedAttention:
    torch.manual_seed(seed)
    return SharedAttention(C, REDUCTION).to(dtype)


def make_map(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, C, 5, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)


def norms_of(kind: str, dtype: torch.dtype = torch.float32) -> list[nn.Module | None]:
    """A norm for each block: none, or one in training."""
    return [nn.BatchNorm2d(C).to(dtype) if kind == "tail" else None for _ in range(BLOCKS)]


def stage(attention: SharedAttention, x: Tensor, norms: list[nn.Module | None] | None = None) -> Tensor:
    """The loss of some blocks."""
    state = None
    for norm in norms or norms_of("step"):
        x, state = attention(x, state, shortcut=x, activation="relu", norm=norm)
    return x.square().sum() + state[1].sum()


def gradients(attention: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in attention.named_parameters()}


def assert_close(found: dict, expected: dict) -> None:
    """Up to the order of sums of a hundred float32 terms: of a block's samples, or of all blocks'."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-5 if value.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(found[name], value, rtol=0, atol=bound * value.abs().max().item(), msg=name)


def assert_same(found: dict, expected: dict, at_once: bool) -> None:
    """To the bits where each block's gradient is added up, as those of the eight parameters are."""
    (assert_close if at_once else assert_equal)(found, expected)


def assert_equal(found: dict, expected: dict, factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], factor * value), name


@pytest.fixture(autouse=True, params=[True, False], ids=["at once", "added up"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to the gradient, whatever would be faster."""
    monkeypatch.setattr(autograd, "_better_at_once", lambda *args: request.param)
    return request.param


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The tokens that steps took, in order."""
    taken: list[Tensor | None] = []
    token = autograd._token
    monkeypatch.setattr(autograd, "_token", lambda *args: taken.append(token(*args)) or taken[-1])
    return taken


def without_tokens(monkeypatch: pytest.MonkeyPatch, run) -> dict:
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "_token", lambda *args: None)
        return run()


def backward_of(attention: SharedAttention, kind: str = "step") -> dict:
    attention.zero_grad()
    stage(attention, make_map(), norms_of(kind)).backward()
    return gradients(attention)


# --- the layout -----------------------------------------------------------------------------------------


def test_splitting_undoes_joining():
    parameters = make().lstm_parameters()
    flat = join_parameters(parameters)
    assert flat.shape == (parameter_count(M, C),)
    split = split_parameters(flat, M, C)
    for name, part, whole in zip(LSTMParameters._fields, split, parameters, strict=True):
        assert torch.equal(part, whole), name
        assert part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), name
    places = [part.storage_offset() for part in split]
    assert all(place % 4 == 0 for place in places)


# --- which way ------------------------------------------------------------------------------------------


RULE = autograd._better_at_once


@pytest.mark.parametrize(
    ("n", "c", "m", "better"),
    [(8, 2048, 102, True), (8, 1024, 51, True), (32, 256, 64, True), (128, 256, 64, False), (32, 64, 16, False)],
)
def test_on_the_cpu_large_gradients_are_made_at_once(n, c, m, better):
    assert RULE(operators.native, torch.empty(n, c), m) == better
    assert RULE(operators.native, torch.empty(n, c, device="meta"), m)
    assert RULE(operators.plain, torch.empty(n, c), m)


# --- the same gradients by fewer products and additions ----------------------------------------------------


@pytest.mark.parametrize("kind", ["step", "tail"])
def test_the_same_as_eight_gradients(monkeypatch, tokens, kind, at_once):
    attention = make()
    found = backward_of(attention, kind)
    assert len(tokens) == BLOCKS
    assert tokens[0] is None
    assert tokens[1] is not None
    assert all(token is tokens[1] for token in tokens[1:])
    assert_same(found, without_tokens(monkeypatch, lambda: backward_of(attention, kind)), at_once)


class Counted(TorchDispatchMode):
    """The shapes of what is added, and the operators of ours, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.added: Counter[tuple[int, ...]] = Counter()
        self.called: Counter[str] = Counter()
        self.last_sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.added[tuple(args[0].shape)] += 1
        results = func(*args, **(kwargs or {}))
        if func.namespace == "dia_kernels":
            self.called[func.overloadpacket.__name__] += 1
            if isinstance(results, tuple):
                self.last_sizes.append(results[-1].numel())
        return results


@pytest.mark.parametrize("kind", ["step", "tail"])
def test_one_gradient_for_all_blocks(monkeypatch, kind, at_once):
    """Of the second and later blocks; the first one's eight and theirs meet at the end."""
    attention, norms = make(), norms_of(kind)
    flat = (parameter_count(M, C),)
    own = {tuple(p.shape) for p in attention.parameters()}

    def counted() -> Counted:
        attention.zero_grad()
        loss = stage(attention, make_map(), norms)
        with Counted() as counts:
            loss.backward()
        return counts

    counts = counted()
    assert counts.called == {f"{kind}_backward": BLOCKS} | ({"parameter_gradients": 1} if at_once else {})
    assert counts.added[flat] == (0 if at_once else BLOCKS - 2)
    assert sum(counts.added[shape] for shape in own) == 8
    counts = without_tokens(monkeypatch, counted)
    assert counts.called == {f"{kind}_backward": BLOCKS}
    assert sum(counts.added[shape] for shape in own) == 8 * (BLOCKS - 1)


@pytest.mark.parametrize("kind", ["step", "tail"])
def test_nothing_is_made_for_parameters_that_a_pass_does_not_come_by(kind):
    attention, norms, x = make(), norms_of(kind), make_map().requires_grad_()
    loss = stage(attention, x, norms)
    with Counted() as counts:
        (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert counts.called == {f"{kind}_backward": BLOCKS}
    assert counts.last_sizes == [0] * (BLOCKS - 1) + [parameter_count(M, C)]  # the first block's, which has no token
    loss.backward()
    assert torch.equal(x.grad, dx)
    expected = make()
    stage(expected, make_map(), norms_of(kind)).backward()
    assert_equal(gradients(attention), gradients(expected))


def test_a_pass_that_fails_leaves_nothing_to_the_next():
    attention = make()
    expected = backward_of(attention)
    attention.zero_grad()
    x, fail = make_map().requires_grad_(), [True]

    def hook(gradient: Tensor) -> None:
        if fail[0]:
            raise ValueError("of the hook")

    y, state = attention(x, None, shortcut=x, activation="relu")
    y, state = attention(y, state, shortcut=y, activation="relu")
    y.register_hook(hook)
    for _ in range(BLOCKS - 2):
        y, state = attention(y, state, shortcut=y, activation="relu")
    loss = y.square().sum() + state[1].sum()
    with pytest.raises(ValueError, match="of the hook"):
        loss.backward(retain_graph=True)
    attention.zero_grad()
    fail[0] = False
    loss.backward()
    assert_equal(gradients(attention), expected)


def test_more_blocks_than_one_launch_takes(monkeypatch, at_once):
    """A GPU's kernel takes the tables of sixty-four steps at a time."""
    attention = make()

    def run() -> dict:
        attention.zero_grad()
        x = y = make_map()
        state = None
        for _ in range(70):
            y, state = attention(y, state, shortcut=x)
        (y.sum() + state[0].sum()).backward()
        return gradients(attention)

    assert_same(run(), without_tokens(monkeypatch, run), at_once)


def test_two_modules_in_turn(monkeypatch, at_once):
    modules = nn.ModuleList([make(0), make(1)])

    def run() -> dict:
        modules.zero_grad()
        y, states = make_map(), [None, None]
        for k in (0, 1, 0, 1, 1):
            y, states[k] = modules[k](y, states[k], shortcut=y)
        y.square().sum().backward()
        return gradients(modules)

    assert_same(run(), without_tokens(monkeypatch, run), at_once)


def test_a_state_of_another_module(monkeypatch, tokens, at_once):
    """The state leads to a token of other parameters."""
    modules = nn.ModuleList([make(0), make(1)])

    def run() -> dict:
        modules.zero_grad()
        y, state = modules[0](make_map())
        for module in (*modules, *modules):
            y, state = module(y, state)
        (y.square().sum() + state[0].sum()).backward()
        return gradients(modules)

    found = run()
    assert len({id(token) for token in tokens}) == 5
    assert_same(found, without_tokens(monkeypatch, run), at_once)


def test_a_frozen_bias(monkeypatch, tokens):
    attention = make()
    attention.lstm_parameters().hidden_expand_bias.requires_grad_(False)
    stage(attention, make_map()).backward()
    assert tokens == [None] * BLOCKS
    frozen = [name for name, gradient in gradients(attention).items() if gradient is None]
    assert len(frozen) == 1


def test_a_bias_frozen_between_two_blocks(tokens):
    attention = make()
    bias = attention.lstm_parameters().hidden_expand_bias
    y, state = attention(*attention(make_map()))
    bias.requires_grad_(False)
    y, state = attention(y, state)
    assert tokens[1] is not None
    assert tokens[2] is None
    y.sum().backward()


def test_parameters_that_are_no_leaves(monkeypatch, tokens):
    attention = make()
    nn.utils.parametrizations.weight_norm(attention, next(iter(dict(attention.named_parameters()))))
    found = backward_of(attention)
    assert tokens == [None] * BLOCKS
    assert all(gradient is not None for gradient in found.values())


# --- several passes ------------------------------------------------------------------------------------------


def test_two_backward_passes_through_one_graph():
    attention = make()
    expected = backward_of(attention)
    attention.zero_grad()
    loss = stage(attention, make_map())
    loss.backward(retain_graph=True)
    loss.backward()
    assert_equal(gradients(attention), expected, 2.0)


def test_the_former_pass_is_alive(tokens):
    """Each pass has its own token: an older one would be reached last in the backward pass."""
    attention = make()
    expected = backward_of(attention)
    tokens.clear()
    attention.zero_grad()
    first = stage(attention, make_map())
    second = stage(attention, make_map())
    assert len({id(token) for token in tokens if token is not None}) == 2
    second.backward()
    assert_equal(gradients(attention), expected)
    first.backward()
    assert_equal(gradients(attention), expected, 2.0)


def test_the_gradient_of_the_parameters_does_not_come_last():
    """It is there before that of the layer before the stage, while an older pass lives too."""
    attention, layer = make(), nn.Conv2d(C, C, 1)
    order: list[str] = []
    attention.lstm_parameters()[0].register_hook(lambda _: order.append("attention"))
    layer.weight.register_hook(lambda _: order.append("layer"))
    losses = [stage(attention, layer(make_map())) for _ in range(2)]
    losses[-1].backward()
    assert order == ["attention", "layer"]


def test_a_state_carried_over_two_passes():
    attention = make()

    def run(parameters) -> tuple[Tensor, ...]:
        y, state = attention(make_map())
        y.sum().backward(retain_graph=True)
        y, state = attention(y, state)
        return torch.autograd.grad(y.square().sum(), parameters)

    found = run(list(attention.parameters()))
    y, state = attention(make_map())
    expected = torch.autograd.grad(attention(y, state)[0].square().sum(), list(attention.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_parameters_replaced_between_passes():
    attention = make()
    backward_of(attention)
    old = list(attention.parameters())
    before = [p.grad.clone() for p in old]
    for module in attention.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone()))
    loss = stage(attention, make_map())
    loss.backward()
    for p, was, new in zip(old, before, attention.parameters(), strict=True):
        assert torch.equal(p.grad, was)
        assert torch.equal(new.grad, was)


def test_parameters_cast_between_passes_whose_graphs_live():
    attention = make()
    first = stage(attention, make_map())
    attention.double()
    second = stage(attention, make_map(torch.float64))
    second.backward()
    assert all(p.grad.dtype == torch.float64 for p in attention.parameters())
    assert first.requires_grad


# --- other ways to a gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LSTMParameters._fields)
def test_the_gradient_of_one_parameter(monkeypatch, name, at_once):
    attention = make()
    parameter = getattr(attention.lstm_parameters(), name)

    def run() -> dict:
        return {name: torch.autograd.grad(stage(attention, make_map()), parameter)[0]}

    assert_same(run(), without_tokens(monkeypatch, run), at_once)


@pytest.mark.parametrize("kind", ["step", "tail"])
def test_second_derivatives(kind, tokens):
    attention, norms = make(dtype=torch.float64), norms_of(kind, torch.float64)
    x = make_map(torch.float64)[:2, :, :2, :2].clone().requires_grad_()

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return stage(attention, x, norms)

    inputs = (x, *attention.lstm_parameters())
    assert gradcheck(loss, inputs, fast_mode=True)
    assert gradgradcheck(loss, inputs, fast_mode=True)
    assert any(token is not None for token in tokens)


def test_a_penalty_on_the_gradient_of_the_parameters(monkeypatch):
    attention = make(dtype=torch.float64)

    def run() -> dict:
        attention.zero_grad()
        first = torch.autograd.grad(
            stage(attention, make_map(torch.float64)), list(attention.parameters()), create_graph=True
        )
        sum(g.square().sum() for g in first).backward()
        return gradients(attention)

    found, expected = run(), without_tokens(monkeypatch, run)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12 * value.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(monkeypatch, tokens, reentrant):
    attention = make()
    expected = backward_of(attention)
    tokens.clear()
    attention.zero_grad()
    checkpoint(stage, attention, make_map().requires_grad_(), use_reentrant=reentrant).backward()
    assert any(token is not None for token in tokens)
    assert_equal(gradients(attention), expected)


@pytest.mark.parametrize("compiler", [torch.compile(backend="eager"), lambda graph: graph], ids=["traced", "run"])
@pytest.mark.parametrize("kind", ["step", "tail"])
def test_compiled_autograd(kind, compiler):
    attention = make()
    expected = backward_of(attention, kind)
    attention.zero_grad()
    loss = stage(attention, make_map(), norms_of(kind))
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    assert_close(gradients(attention), expected)


def test_each_block_checkpointed():
    attention = make()
    expected = backward_of(attention)
    attention.zero_grad()
    y, state = make_map(), None
    for _ in range(BLOCKS):

        def block(y, state):
            return attention(y, state, shortcut=y, activation="relu")

        y, state = checkpoint(block, y, state, use_reentrant=False)
    (y.square().sum() + state[1].sum()).backward()
    assert_equal(gradients(attention), expected)


def test_hooks_fire_once_a_backward():
    attention = make()
    expected = backward_of(attention)
    attention.zero_grad()
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in attention.named_parameters()}
    accumulated: list[str] = []
    for name, p in attention.named_parameters():
        p.register_hook(lambda g, name=name: seen[name].append(g.clone()))
        p.register_post_accumulate_grad_hook(lambda p, name=name: accumulated.append(name))
    stage(attention, make_map()).backward()
    assert sorted(accumulated) == sorted(seen)
    assert all(len(found) == 1 for found in seen.values())
    assert_equal({name: found[0] for name, found in seen.items()}, expected)


def test_gradients_added_to_those_that_are_there():
    attention = make()
    expected = backward_of(attention)
    stage(attention, make_map()).backward()
    assert_equal(gradients(attention), expected, 2.0)


# --- what is left behind -----------------------------------------------------------------------------------------


def test_copies_and_pickles_of_a_module_in_use():
    attention = make()
    loss = stage(attention, make_map())
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert_equal(backward_of(other), backward_of(make()))
    loss.backward()
    assert_equal(gradients(attention), backward_of(make()))


def test_nothing_is_kept(tokens):
    attention = make()
    loss = stage(attention, make_map())
    token = weakref.ref(tokens[1])
    parameters = [weakref.ref(p) for p in attention.parameters()]
    tokens.clear()
    loss.backward()
    gc.disable()  # it must go without
    try:
        del loss
        assert token() is None
        attention.zero_grad()
        del attention
        assert all(p() is None for p in parameters)
    finally:
        gc.enable()


def test_a_pass_that_fails_keeps_nothing(tokens):
    """What blocks left meanwhile does not hold the graph that holds it."""
    attention, x = make(), make_map().requires_grad_()
    y, state = attention(x, None, shortcut=x)
    for k in range(BLOCKS):
        y, state = attention(y, state, shortcut=y)
        if k == 0:
            y.register_hook(lambda gradient: 1 / 0)
    token = weakref.ref(tokens[1])
    tokens.clear()
    gc.disable()  # it must go without
    try:
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
        del y, state
        assert token() is None
    finally:
        gc.enable()


def test_a_token_has_no_memory(tokens):
    loss = stage(make(), make_map())
    assert tokens[1].untyped_storage().nbytes() == tokens[1].element_size()
    assert loss.requires_grad


def test_threads():
    """Each thread has passes of its own through one module; their sum is everybody's."""
    attention = make(dtype=torch.float64)
    attention.zero_grad()
    stage(attention, make_map(torch.float64)).backward()
    expected, rounds, failures = gradients(attention), 5, []
    parameters = list(attention.parameters())

    def work() -> None:
        try:
            for _ in range(rounds):
                found = torch.autograd.grad(stage(attention, make_map(torch.float64)), parameters)
                for value, true in zip(found, expected.values(), strict=True):
                    torch.testing.assert_close(value, true)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_stage_begun_in_one_thread_and_ended_in_another():
    attention = make()
    expected = backward_of(attention)
    attention.zero_grad()
    given = [make_map(), None]

    def block() -> None:
        y, state = given
        given[:] = attention(y, state, shortcut=y, activation="relu")

    for _ in range(BLOCKS):
        thread = threading.Thread(target=block)
        thread.start()
        thread.join()
    (given[0].square().sum() + given[1][1].sum()).backward()
    assert_equal(gradients(attention), expected)
