"""Operators that write into maps of the caller's, and the compiler that makes these maps."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

import operator_fuzzing
import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck

from dia_kernels import SharedAttention, create_attention, inductor, models, operators
from dia_kernels.schemas import OVER, RESULT_MAPS

needs_native = pytest.mark.skipif(operators.library_error is not None, reason="the native library is not loaded")


def call_of(name: str, seed: int, dtype: torch.dtype = torch.float32) -> list:
    """The arguments of a call that is right."""
    arguments = operator_fuzzing.Maker(random.Random(f"{name}/{seed}"), dtype, False).arguments(name)
    return [arguments[argument] for argument in operator_fuzzing.names_of(name)]


def results_of(name: str, arguments: list) -> tuple[Tensor, ...]:
    results = getattr(operators.native, name)(*arguments)
    return results if isinstance(results, tuple) else (results,)


def maps_for(name: str, results: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Maps full of NaN to write into, for the ``results`` of the same call; None for those that are not wanted."""
    wanted = [results[place] for place in RESULT_MAPS[name]]
    return [torch.full_like(t, float("nan")) if t.ndim > 1 else None for t in wanted]


def joined(name: str, rest: object, maps: list[Tensor | None]) -> list[Tensor]:
    """Results as the operator itself returns them."""
    rest = [] if rest is None else list(rest) if isinstance(rest, tuple) else [rest]
    for place, t in zip(RESULT_MAPS[name], maps, strict=True):
        rest.insert(place, torch.empty(0) if t is None else t)
    return rest


@pytest.mark.parametrize("kernel", ["native", "copied"])
@pytest.mark.parametrize("name", RESULT_MAPS)
def test_the_same_bits_as_the_operator(name, kernel):
    into: Callable = operators.native_into[name]
    if kernel == "copied":
        into, _ = operators._into(getattr(operators.native, name), RESULT_MAPS[name])
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for seed in range(30):
        arguments = call_of(name, seed, dtypes[seed % 3])
        expected = results_of(name, arguments)
        maps = maps_for(name, expected)
        found = joined(name, into(*arguments, *maps), maps)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape, seed
            assert torch.equal(ours, theirs) or torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)), seed


@pytest.mark.parametrize("name", RESULT_MAPS)
def test_opcheck(name):
    arguments, maps = good_call(name)
    opcheck(operators.native_into[name], (*arguments, *maps))


def good_call(name: str, wanted: bool = True) -> tuple[list, list[Tensor | None]]:
    """A call on samples, channels and positions, and its maps, which are all wanted, or not all."""
    for seed in range(1000):
        arguments = call_of(name, seed)
        maps = maps_for(name, results_of(name, arguments))
        size = map_of(name, arguments).shape
        if len(size) == 4 and min(size) > 1 and all(t is not None for t in maps) == wanted:
            return arguments, maps
    raise AssertionError("no such call")


def map_of(name: str, arguments: list) -> Tensor:
    return next(a for n, a in zip(operator_fuzzing.names_of(name), arguments, strict=True) if n in ("x", "z"))


def strided(t: Tensor) -> Tensor:
    return torch.empty(*t.shape[:-1], 2 * t.shape[-1]).fill_(float("nan"))[..., ::2]


@needs_native
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda t: t[1:], "into: expected sizes"),
        (lambda t: t.double(), "into: unexpected dtype"),
        (lambda t: t.to("meta"), "on meta"),
        (strided, "into: result . ?: expected the strides"),
        (lambda t: None, "into: result . ?: expected a map"),
    ],
    ids=["sizes", "dtype", "device", "strides", "none"],
)
@pytest.mark.parametrize("name", RESULT_MAPS)
def test_a_wrong_map_is_refused(name, wrong, message):
    arguments, maps = good_call(name)
    for place, good in enumerate(maps):
        given = [*maps[:place], wrong(good), *maps[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            operators.native_into[name](*arguments, *given)
        assert all(t is None or t.is_meta or t.isnan().all() for t in given), "written into"


@needs_native
@pytest.mark.parametrize("name", [name for name in RESULT_MAPS if name.endswith("_backward")])
def test_a_map_that_is_not_asked_for_is_refused(name):
    arguments, maps = good_call(name, wanted=False)
    with pytest.raises(RuntimeError, match="that the flags do not ask for"):
        operators.native_into[name](*arguments, *(torch.empty_like(map_of(name, arguments)) for _ in maps))


@needs_native
@pytest.mark.parametrize("name", RESULT_MAPS)
def test_a_map_that_shares_memory_is_refused(name):
    """Else the second sweep would read what the first has written."""
    arguments, maps = good_call(name)
    size = maps[0].shape
    whole = torch.randn(maps[0].numel() + 1)
    place, old = next(
        (i, a) for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.shape == size and a.dtype == whole.dtype
    )
    arguments[place] = whole[:-1].view(size).copy_(old)
    maps[0] = whole[1:].as_strided(maps[0].shape, maps[0].stride())
    before = whole.clone()
    with pytest.raises(RuntimeError, match="shares memory with an argument"):
        operators.native_into[name](*arguments, *maps)
    assert torch.equal(whole, before)
    if len(maps) == 2:
        arguments[place] = old
        with pytest.raises(RuntimeError, match="maps that share memory"):
            operators.native_into[name](*arguments, maps[1], maps[1])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["map", "shortcut"])
@pytest.mark.parametrize("name", OVER)
def test_an_argument_may_be_written_over(name, which, dtype):
    place, calls = OVER[name][which == "shortcut"], 0
    for seed in range(40):
        arguments = call_of(name, seed, dtype)
        if arguments[place] is None:
            continue
        expected = results_of(name, arguments)
        over = torch.empty_like(expected[0]).copy_(arguments[place])
        arguments[place] = over
        rest = operators.native_into[name](*arguments, over)
        for ours, theirs in zip(joined(name, rest, [over]), expected, strict=True):
            assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)), seed
        calls += 1
    assert calls >= 10


@needs_native
@pytest.mark.parametrize("name", [name for name in RESULT_MAPS if name not in OVER])
def test_a_gradient_is_not_written_over_an_argument(name):
    arguments, maps = good_call(name)
    x = map_of(name, arguments)
    same = torch.empty_like(maps[0]).copy_(x)
    arguments = [same if argument is x else argument for argument in arguments]
    with pytest.raises(RuntimeError, match="shares memory with an argument"):
        operators.native_into[name](*arguments, same, *maps[1:])


# --- the compiler -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


class Stage(nn.Module):
    """Blocks with one attention; `norm`: each has a batch norm before it, which is folded in."""

    def __init__(self, attention: nn.Module, norm: bool, blocks: int = 3) -> None:
        super().__init__()
        self.attention = attention
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=not norm) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) if norm else None for _ in range(blocks))

    def forward(self, x):
        state = None
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            more = {} if norm is None else {"norm": norm}
            x, state = self.attention(convolution(x), state, shortcut=x, activation="relu", **more)
        return x


def assert_same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Gradients of a compiled stage and of the stage: equal but for the order of additions."""
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-5)


def called(code: list[str]) -> set[str]:
    """The names of our operators in what the inductor has written."""
    return set(re.findall(r"ops\.dia_kernels\.(\w+)\.default\(", "\n".join(code)))


def written_over(code: list[str]) -> tuple[int, int, int]:
    """How many calls write over the map that they read, how many over the shortcut, and how many over neither."""
    counts = [0, 0, 0]
    for name, call in re.findall(r"ops\.dia_kernels\.(\w+)_into\.default\((.*)\)", "\n".join(code)):
        arguments = call.split(", ")
        over = [arguments[place] == arguments[-1] for place in OVER.get(name, ())]
        counts[over.index(True) if True in over else 2] += 1
    return tuple(counts)


STAGES = {
    "step": (lambda: Stage(SharedAttention(8, 2), norm=False), {"step_into"}, {"step_into", "step_backward_into"}),
    "tail": (lambda: Stage(SharedAttention(8, 2), norm=True), {"tail_into"}, {"tail_into", "tail_backward_into"}),
    "cell": (
        lambda: Stage(create_attention("se", 8, 2), norm=True),
        {"norm_pool", "norm_rescale_into"},
        {"norm_pool", "norm_rescale_into", "norm_pool_backward_into", "norm_rescale_backward_into"},
    ),
}


#: A case of them takes some seconds.
CASES = [(kind, memory_format) for kind in STAGES for memory_format in (torch.contiguous_format, torch.channels_last)]
QUICK = {("tail", torch.channels_last), ("cell", torch.contiguous_format)}


@needs_native
@pytest.mark.parametrize(
    ("kind", "memory_format"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=f"{case[0]}-{case[1]}") for case in CASES],
)
def test_the_inductor_serves_and_trains_in_buffers_of_its_own(kind, memory_format):
    torch.manual_seed(0)
    make, serving, training = STAGES[kind]
    stage = make()
    x = torch.randn(3, 8, 6, 5).contiguous(memory_format=memory_format).requires_grad_()
    compiled = torch.compile(stage, fullgraph=True)
    with torch.no_grad():
        stage.eval()
        y, code = run_and_get_code(compiled, x)
        torch.testing.assert_close(y, stage(x), rtol=0, atol=1e-5)
        assert y.stride() == stage(x).stride()
    assert called(code) == serving
    assert written_over(code) == (1, 2, 0)  # the first shortcut is the caller's
    stage.train()
    wanted = [x, *stage.parameters()]
    found, code = run_and_get_code(lambda: torch.autograd.grad(compiled(x).square().sum(), wanted))
    assert called(code) == training
    *over, elsewhere = written_over(code)
    assert over == [0, 0]  # of each z the gradient is still to be taken, and the ReLU's mask of each y
    assert elsewhere == 3 * len([name for name in training if name.endswith("_into")])
    expected = torch.autograd.grad(stage(x).square().sum(), wanted)
    assert_same(found, expected)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "se", "cbam"])
def test_the_inductor_trains_where_sizes_are_symbols(cell):
    """A square map, of which height and width are one symbol."""
    torch.manual_seed(0)
    attention = SharedAttention(8, 2) if cell == "lstm" else create_attention(cell, 8, 2)
    stage = Stage(attention, norm=True)
    compiled = torch.compile(stage, fullgraph=True, dynamic=True)
    for samples, size in ((3, 6), (5, 9)):
        x = torch.randn(samples, 8, size, size)
        found = torch.autograd.grad(compiled(x).square().sum(), list(stage.parameters()))
        expected = torch.autograd.grad(stage(x).square().sum(), list(stage.parameters()))
        assert_same(found, expected)


@needs_native
@pytest.mark.slow
def test_a_torch_that_takes_no_symbols_gets_the_operators_own_maps(monkeypatch):
    monkeypatch.setattr(inductor, "_TAKES_SYMBOLS", False)
    stage, x = Stage(SharedAttention(8, 2), norm=True, blocks=1), torch.randn(3, 8, 6, 6)
    compiled = torch.compile(stage, fullgraph=True, dynamic=True)
    wanted = list(stage.parameters())
    found, code = run_and_get_code(lambda: torch.autograd.grad(compiled(x).square().sum(), wanted))
    assert called(code) == {"tail", "tail_backward"}
    assert_same(found, torch.autograd.grad(stage(x).square().sum(), wanted))


@needs_native
def test_gradients_that_are_not_wanted():
    """Of the first block's shortcut, and of a frozen convolution's map."""
    stage, x = STAGES["tail"][0](), torch.randn(3, 8, 6, 5)
    wanted = [*stage.attention.parameters(), *stage.convolutions[2].parameters()]
    for convolution, norm in list(zip(stage.convolutions, stage.norms, strict=True))[:2]:
        convolution.requires_grad_(False), norm.requires_grad_(False)

    def gradients(model):
        return torch.autograd.grad(model(x).square().sum(), wanted)

    found, code = run_and_get_code(lambda: gradients(torch.compile(stage, fullgraph=True)))
    assert called(code) == {"tail_into", "tail_backward_into"}
    assert "None)" in "\n".join(line for line in "\n".join(code).splitlines() if "tail_backward_into" in line)
    assert_same(found, gradients(stage))


@pytest.mark.slow
@needs_native
def test_any_batch_goes_into_buffers_too():
    stage = STAGES["tail"][0]().eval()
    compiled = torch.compile(stage, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((3, 8, 6, 7), (5, 8, 9, 4), (2, 8, 16, 16)):
            x = torch.randn(size)
            y, code = run_and_get_code(compiled, x)
            torch.testing.assert_close(y, stage(x), rtol=0, atol=1e-5)
            if size[0] == 3:
                assert called(code) == ({"tail_into"} if inductor._TAKES_SYMBOLS else {"tail"})


@pytest.mark.slow
@needs_native
def test_buffers_out_of_one_pool():
    """The inductor's memory planning gives out parts of larger pieces."""
    stage, x = STAGES["tail"][0]().eval(), torch.randn(3, 8, 6, 5)
    with torch.no_grad(), torch._inductor.config.patch(memory_planning=True, memory_pool="intermediates"):
        y, code = run_and_get_code(torch.compile(stage, fullgraph=True), x)
        torch.testing.assert_close(y, stage(x), rtol=0, atol=1e-5)
    assert called(code) == {"tail_into"}


@needs_native
def test_results_that_nobody_uses():
    """The state behind the last block, and a step whose map goes nowhere: only its state is used."""
    attention = SharedAttention(8, 2).requires_grad_(False)

    def state_alone(x):
        return attention(x * 2, None, shortcut=x)[1]

    def nothing_of_the_second(x):
        y, state = attention(x * 2)
        attention(y, state)
        return y

    x = torch.randn(2, 8, 4, 4)
    for function in (state_alone, nothing_of_the_second):
        found, expected = torch.compile(function, fullgraph=True)(x), function(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@needs_native
@pytest.mark.parametrize("norm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_convolution_whose_result_is_still_wanted(norm):
    """Returned itself, as a view, as the shortcut, or read by a later operation: then it is not written over."""
    attention, convolution = SharedAttention(8, 2).requires_grad_(False), nn.Conv2d(8, 8, 3, padding=1)
    more = {"norm": nn.BatchNorm2d(8).eval()} if norm else {}

    def returned(x):
        z = convolution(x)
        return attention(z, **more)[0], z

    def viewed(x):
        z = convolution(x)
        view = z.view(z.shape[0], -1)
        return attention(z, **more)[0], view

    def view_read_later(x):
        z = convolution(x)
        view = z.flatten(2).transpose(1, 2)
        y = attention(z, **more)[0]
        return y, (view + 1).sum()

    def view_read_before_and_later(x):
        z = convolution(x)
        view = z.flatten(2)
        before = view.amax(2)
        return attention(z * before.mean(), **more)[0], attention(z, **more)[0], before, view.cumsum(2)

    def its_own_shortcut(x):
        z = convolution(x)
        return (attention(z, shortcut=z, activation="relu", **more)[0],)

    def twice(x):
        z = convolution(x)
        y, state = attention(z, **more)
        return (y, *attention(z, state, **more)[:1])

    x = torch.randn(2, 8, 4, 4)
    for function in (returned, viewed, view_read_later, view_read_before_and_later, its_own_shortcut, twice):
        torch._dynamo.reset()
        with torch.no_grad():
            found, code = run_and_get_code(torch.compile(function, fullgraph=True), x)
            torch.testing.assert_close(found, function(x), rtol=1e-5, atol=1e-5, msg=function.__name__)
        # Of two calls the last may, and what is made for one alone.
        assert written_over(code)[:2] == (function in (twice, view_read_before_and_later), 0), function.__name__


@needs_native
@pytest.mark.parametrize("norm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_shortcut_is_written_over_unless_it_is_still_wanted(norm):
    attention, more = SharedAttention(8, 2).requires_grad_(False), {"activation": "relu"}
    first, second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
    other = nn.BatchNorm2d(8).eval()
    if norm:
        more["norm"] = nn.BatchNorm2d(8).eval()

    def free(x):
        shortcut = first(x).relu()
        return attention(second(shortcut), shortcut=shortcut, **more)[0]

    def of_a_convolution(x):
        shortcut = first(x)
        return attention(second(shortcut), shortcut=shortcut, **more)[0]

    def of_the_block_before(x):
        y, state = attention(first(x), **more)
        return attention(second(y), state, shortcut=y, **more)[0]

    def given(x):
        return attention(second(x), shortcut=x, **more)[0]

    def returned(x):
        shortcut = first(x).relu()
        return attention(second(shortcut), shortcut=shortcut, **more)[0], shortcut

    def viewed(x):
        shortcut = first(x).relu()
        view = shortcut.permute(0, 2, 3, 1)
        return attention(second(shortcut), shortcut=shortcut, **more)[0], view

    def a_view(x):
        whole = first(x).relu()
        shortcut = whole.transpose(2, 3).transpose(2, 3)
        return attention(second(shortcut), shortcut=shortcut, **more)[0], whole

    def read_later(x):
        shortcut = first(x).relu()
        y = attention(second(shortcut), shortcut=shortcut, **more)[0]
        return y, first(y) + second(shortcut)

    def read_by_others(x):
        shortcut = first(x).relu()
        gate = shortcut.mean((2, 3), keepdim=True)
        return attention(second(shortcut * gate), shortcut=shortcut, **more)[0], gate

    def normed_before(x):  # a block with its norm and ReLU first
        shortcut = first(x)
        return attention(second(other(shortcut).relu()), shortcut=shortcut, **more)[0]

    def values_read_later(x):
        shortcut = first(x)
        double = shortcut * 2
        return attention(second(double), shortcut=shortcut, **more)[0] - double, double.relu()

    def pointwise_later(x):
        shortcut = first(x).relu()
        y = attention(second(shortcut), shortcut=shortcut, **more)[0]
        return y, shortcut * 2

    def view_of_a_sum(x):
        shortcut = first(x) + 1
        lines = shortcut.flatten(2)
        return attention(second(shortcut), shortcut=shortcut, **more)[0], lines - 1

    def without_one(x):
        return attention(first(x) + 1, **more)[0]

    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)  # as the compiler's convolutions have it
    for function in (
        free,
        of_a_convolution,
        of_the_block_before,
        given,
        returned,
        viewed,
        a_view,
        read_later,
        read_by_others,
        normed_before,
        values_read_later,
        pointwise_later,
        view_of_a_sum,
        without_one,
    ):
        torch._dynamo.reset()
        before = x.clone()
        with torch.no_grad():
            found, code = run_and_get_code(torch.compile(function, fullgraph=True), x)
            torch.testing.assert_close(found, function(x), rtol=1e-5, atol=1e-5, msg=function.__name__)
        assert torch.equal(x, before), function.__name__
        # Where it is not free, the map is.
        over_shortcut = (free, of_a_convolution, normed_before, values_read_later)
        expected = {of_the_block_before: (1, 1, 0), **dict.fromkeys(over_shortcut, (0, 1, 0))}
        assert written_over(code) == expected.get(function, (1, 0, 0)), function.__name__


@needs_native
def test_a_map_that_is_a_result_of_the_graph_and_an_argument_of_the_next_block():
    """Nothing that is still wanted is written over."""
    attention = SharedAttention(8, 2).requires_grad_(False)

    def every_map(x):
        state, maps = None, []
        for _ in range(4):
            x, state = attention(x + 1, state, shortcut=x, activation="relu")
            maps.append(x)
        return maps, x.mean()

    x = torch.randn(2, 8, 4, 4)
    found, expected = torch.compile(every_map, fullgraph=True)(x), every_map(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len({t.data_ptr() for t in found[0]}) == 4


def test_whoever_does_not_compile_does_not_import_the_inductor():
    call = "dia_kernels.SharedAttention(8, device='meta')(torch.ones(1, 8, 2, 2, device='meta'))"
    check = "assert 'torch._inductor.lowering' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"import sys, torch, dia_kernels; {call}; {check}"], check=True)


@pytest.mark.slow
@needs_native
def test_a_whole_network():
    torch.manual_seed(0)
    network = models.create("resnet20", 10, attention="dia")
    x, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(network, fullgraph=True)

    def gradients(model):
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), list(network.parameters()))

    for ours, theirs in zip(gradients(compiled), gradients(network), strict=True):
        scale = theirs.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-3)
