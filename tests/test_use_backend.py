"""``use_backend``: which calls it rules, for how long, in which thread, and under the compiler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from dia_kernels import SharedAttention, create_attention, use_backend

X = torch.linspace(-1, 1, 2 * 8 * 4 * 4).view(2, 8, 4, 4)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Dispatched(TorchDispatchMode):
    """Keeps the names of our operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dia_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def operators_of(call: Callable) -> list[str]:
    """Names of our operators that ``call`` runs; those of the reference are none."""
    with Dispatched() as mode:
        call()
    return mode.names


def form(name: str, backend: str | None = None) -> Callable:
    """One call of each way through the library."""
    options = {"num_layers": 2} if name == "stacked" else {}
    attention = SharedAttention(8, 2, backend=backend, **options)
    if name == "tail":
        norm = nn.BatchNorm2d(8).eval()
        return lambda: attention(X, norm=norm)
    if name == "inplace":
        return torch.no_grad()(lambda: attention(X.clone(), inplace=True))
    if name == "sample_scale":
        return lambda: attention(X, sample_scale=torch.ones(2))
    if name == "se":
        attention = create_attention("se", 8, 2, backend=backend)
    return lambda: attention(X)


FORMS = {
    "step": ["step"],
    "tail": ["tail"],
    "inplace": ["step_"],
    "stacked": ["pool", "rescale"],
    "sample_scale": ["pool", "rescale"],
    "se": ["pool", "rescale"],
}


@pytest.mark.parametrize("name", FORMS)
def test_calls_that_name_no_backend_take_that_of_the_block(name):
    call = form(name)
    with use_backend("reference"):
        assert operators_of(call) == []
    assert operators_of(call) == FORMS[name]


@pytest.mark.parametrize("name", FORMS)
def test_a_backend_of_the_module_s_own_wins(name):
    call = form(name, "reference")
    with use_backend("triton"):
        assert operators_of(call) == []


def test_blocks_nest_and_end_with_an_error():
    call = form("step")

    def fails():
        with use_backend("reference"):
            raise KeyError

    with use_backend("reference"):
        with use_backend("triton"), pytest.raises(ValueError, match="backend: 'triton' serves cuda tensors"):
            call()
        assert operators_of(call) == []
        with pytest.raises(KeyError):
            fails()
        assert operators_of(call) == []
    with pytest.raises(KeyError):
        fails()
    assert operators_of(call) == ["step"]


def test_a_decorated_function_runs_in_a_block_of_its_own():
    call = form("step")
    assert operators_of(use_backend("reference")(call)) == []
    assert operators_of(call) == ["step"]


def test_an_unknown_name_is_refused_at_the_block():
    with (
        pytest.raises(ValueError, match=r"name: expected one of cpu, cuda, .*reference, got 'gpu'"),
        use_backend("gpu"),
    ):
        pytest.fail("the block was entered")


def test_a_backward_pass_stays_with_its_forward_pass():
    x = X.clone().requires_grad_()
    attention = SharedAttention(8, 2)
    with use_backend("reference"):
        inside = attention(x)[0].sum()
    outside = attention(x)[0].sum()
    assert operators_of(inside.backward) == []
    with use_backend("reference"):
        assert operators_of(outside.backward) == ["step_backward"]


def test_a_block_rules_its_own_thread_only():
    """Two blocks that overlap in time but do not nest: the first to be entered is the first to be left."""
    call, first_is_in, second_is_in, first_is_out = form("step"), *(threading.Event() for _ in range(3))

    def first():
        with use_backend("reference"):
            first_is_in.set()
            second_is_in.wait(60)
            found = operators_of(call)
        first_is_out.set()
        return found, operators_of(call)

    def second():
        first_is_in.wait(60)
        before = operators_of(call)
        with use_backend("reference"):
            second_is_in.set()
            first_is_out.wait(60)
            found = operators_of(call)
        return before, found, operators_of(call)

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(f) for f in (first, second)]
        assert results[0].result(120) == ([], ["step"])
        assert results[1].result(120) == (["step"], [], ["step"])


# --- under torch.compile -------------------------------------------------------------------------------


def our_operators(graphs: list[torch.fx.GraphModule]) -> list[list[str]]:
    return [[n.target._opname for n in g.graph.nodes if "dia_kernels" in str(n.target)] for g in graphs]


def test_a_compiled_function_is_compiled_anew_for_a_block_around_it(fresh_compiler):
    """In a thread that has entered no block before."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(form("step"), backend=counter, fullgraph=True)

    def calls():
        for _ in range(2):
            compiled()
            with use_backend("reference"):
                compiled()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(calls).result(120)
    assert our_operators(counter.graphs) == [["step"], []]


def test_a_compiled_function_sees_the_block_of_the_thread_that_calls_it(fresh_compiler):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(form("step"), backend=counter, fullgraph=True)
    with use_backend("reference"):
        compiled()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(compiled).result(120)
        compiled()
    assert our_operators(counter.graphs) == [[], ["step"]]


def test_blocks_inside_a_compiled_function(fresh_compiler):
    attention = SharedAttention(8, 2)

    def function(x):
        x = attention(x)[0]
        with use_backend("reference"):
            x = attention(x)[0]
            with use_backend("triton"):
                pass
            x = attention(x)[0]
        return attention(x)[0]

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), function(X))
    assert our_operators(counter.graphs) == [["step", "step"]]
    assert operators_of(lambda: attention(X)) == ["step"]


def test_a_graph_break_inside_a_block_does_not_end_it(fresh_compiler):
    attention = SharedAttention(8, 2)

    def function(x):
        with use_backend("reference"):
            x = attention(x)[0]
            torch._dynamo.graph_break()
            return attention(x)[0]

    counter = CompileCounterWithBackend("eager")
    torch.testing.assert_close(torch.compile(function, backend=counter)(X), function(X))
    assert counter.graphs
    assert not any(our_operators(counter.graphs))
    assert operators_of(lambda: attention(X)) == ["step"]


def test_a_graph_of_torch_fx_takes_the_backend_of_the_block_it_runs_in():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = SharedAttention(8, 2)

        def forward(self, x):
            return self.attention(x)[0]

    graph = torch.fx.symbolic_trace(Block())
    assert operators_of(lambda: graph(X)) == ["step"]
    with use_backend("reference"):
        assert operators_of(lambda: graph(X)) == []
