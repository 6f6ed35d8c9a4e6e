"""The mask of bits that a ReLU leaves for its gradient: that kernels write and read it right, and where it is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import simulated_backend
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

from dia_kernels import SharedAttention, backends, masks, operators

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
#: Channels and positions; the rows of one layout at least begin bytes.
SHAPES = [(8, (3, 5)), (6, (4, 4)), (24, (5, 8)), (40, (2, 2, 2)), (72, (9,))]


@dataclass(frozen=True)
class Layout:
    """How maps lie: ``channel_dim``, the memory format, and whether a map is a slice of a larger one."""

    channel_dim: int = 1
    last: bool = False
    sliced: bool = False

    def map(self, channels: int, spatial: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape = (3, channels, *spatial) if self.channel_dim == 1 else (3, *spatial, channels)
        if self.sliced:
            return torch.randn(3, 2, *shape[1:], dtype=torch.float64).to(dtype)[:, 1]
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        if self.last and len(spatial) > 1:
            x = x.contiguous(memory_format=torch.channels_last if len(spatial) == 2 else torch.channels_last_3d)
        return x


LAYOUTS = [Layout(), Layout(last=True), Layout(channel_dim=-1), Layout(sliced=True), Layout(-1, sliced=True)]


def problems(dtype: torch.dtype):
    for (channels, spatial), layout in itertools.product(SHAPES, LAYOUTS):
        x, s, dy = (layout.map(channels, spatial, dtype) for _ in range(3))
        if masks.fits(x, layout.channel_dim):
            yield x, s, dy, layout.channel_dim


def cell_of(channels: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The eight parameters, and a state."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [p.detach().to(wide) for p in SharedAttention(channels, 2).lstm_parameters()]
    return weights, [torch.randn(3, channels, dtype=wide) for _ in range(2)]


# --- the format ------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1e-40, 2.0, float("inf"), float("nan")]), min_size=16, max_size=16),
    st.booleans(),
)
def test_a_mask_says_what_is_not_below_or_at_zero(values, last):
    y = torch.tensor(values).view(1, 8, 2, 1).repeat(2, 1, 1, 4)
    if last:
        y = y.contiguous(memory_format=torch.channels_last)
    mask = masks.make(y, 1)
    assert mask.dtype == torch.uint8
    assert mask.shape == (masks.size(y),)
    stands_for = masks.as_result(mask, y, 1)
    assert torch.equal(stands_for <= 0, y <= 0)


def test_bits_lie_in_the_order_of_memory():
    y = torch.zeros(1, 8, 1, 2)
    y[0, 3, 0, 0] = 1
    assert masks.make(y.contiguous(memory_format=torch.channels_last), 1).tolist() == [8, 0]
    y = torch.zeros(1, 1, 2, 8)
    y[0, 0, 1, 7] = 1
    assert masks.make(y, 1).tolist() == [0, 128]
    assert masks.make(y, -1).tolist() == [0, 128]


@pytest.mark.parametrize(
    ("shape", "channel_dim", "fits"),
    [
        ((2, 12, 7, 7), 1, False),
        ((2, 16, 7, 7), 1, False),
        ((2, 3, 4, 6), 1, True),
        ((2, 49, 12), -1, False),
        ((2, 49, 16), -1, True),
        ((2, 3, 0), 1, True),
    ],
)
def test_rows_begin_bytes(shape, channel_dim, fits):
    assert masks.fits(torch.empty(shape), channel_dim) == fits


def test_rows_of_channels_last_are_channels():
    for channels, positions in ((16, 7), (12, 8)):
        x = torch.empty(2, channels, positions, positions).contiguous(memory_format=torch.channels_last)
        assert masks.fits(x, 1) == (channels == 16)


# --- the operators -----------------------------------------------------------------------------------------


def implementers(dtype: torch.dtype) -> list[str]:
    """The sets of operators that keep masks of such maps."""
    return ["plain", "simulated"] if dtype in operators.GPU_MASKED_DTYPES else ["plain"]


def operators_called(name: str) -> operators.Operators:
    if name == "simulated":
        simulated_backend.library()
        return backends._backends["simulated"].operators
    return operators.plain


@pytest.mark.parametrize(("dtype", "name"), [(d, n) for d in DTYPES for n in implementers(d)], ids=str)
def test_a_step_and_its_gradient(dtype, name):
    """The mask is that of y, and gradients from it have the bits of those from y."""
    ops = operators_called(name)
    for x, s, dy, channel_dim in problems(dtype):
        weights, state = cell_of(x.shape[channel_dim], dtype)
        for shortcut in (s, None):
            given = (x, shortcut, *state, *weights, channel_dim, True, False, True)
            y, _, new_c, tables, nothing = ops.step(*given, False)
            again, *_, mask = ops.step(*given, True)
            assert nothing.numel() == 0
            assert torch.equal(again, y)
            assert torch.equal(mask, masks.make(y, channel_dim))
            for asked in ((True,) * 4, (True, False, False, False), (False, True, True, True)):
                found = [
                    ops.step_backward(
                        dy, None, None, x, passed, *state, new_c, tables, *weights[::2], channel_dim, True, False,
                        *asked, False,
                    )
                    for passed in (y, mask)
                ]  # fmt: skip
                for of_y, of_mask in zip(*found, strict=True):
                    assert torch.equal(of_mask, of_y)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(("dtype", "name"), [(d, n) for d in DTYPES for n in implementers(d)], ids=str)
def test_a_tail_and_its_gradient(dtype, name, batch):
    ops = operators_called(name)
    for z, s, dy, channel_dim in problems(dtype):
        channels = z.shape[channel_dim]
        weights, state = cell_of(channels, dtype)
        norm = [torch.rand(channels, dtype=weights[0].dtype) + 0.5 for _ in range(2 if batch else 4)]
        given = (z, s, *state, *norm, *([None] * 2 if batch else []), 1e-5, *weights, channel_dim, True, False)
        y, new_h, new_c, tables, *_ = ops.tail(*given, False)
        *_, mask = ops.tail(*given, True)
        assert torch.equal(mask, masks.make(y, channel_dim))
        for need_shortcut in (True, False):
            found = []
            for passed in (y, mask):
                common = (dy, None, None, z, passed, *state, new_c, tables, *norm[:2], *weights[::2], channel_dim)
                asked = (True, need_shortcut, True, True, True, False)
                found.append(ops.tail_backward(*common, True, False, batch, *asked))
                if batch and name != "simulated":
                    sums, g, dp, *_ = ops.tail_reduce(*common, True, False, need_shortcut, True, True)
                    source = (g, None) if need_shortcut else (dy, passed)
                    dz = ops.tail_spread(*source, z, new_h, dp, tables, norm[0], sums, channel_dim)
                    found[-1] = (*found[-1], sums, dp, dz)
            for of_y, of_mask in zip(*found, strict=True):
                assert torch.equal(of_mask, of_y)


def test_float16_rounds_to_zero_before_the_mask_is_made():
    """A sum below the smallest float16 is a zero of y, whose gradient is zero."""
    weights, _ = cell_of(8, torch.float16)
    x = torch.full((1, 8, 2, 4), 6e-8, dtype=torch.float16)  # times h' of a half or so: less than half of it
    for name in implementers(torch.float16):
        y, h, *_, mask = operators_called(name).step(x, None, None, None, *weights, 1, True, False, True, True)
        assert torch.equal(mask, masks.make(y, 1)), name
        assert ((h < 0.5) == (y[..., 0, 0] == 0)).all()


@pytest.mark.parametrize("name", ["plain", "simulated"])
def test_operators_keep_their_promises(name):
    ops = operators_called(name)
    for channel_dim, x in ((1, torch.randn(3, 8, 3, 5).contiguous(memory_format=torch.channels_last)), (-1, None)):
        x = (torch.randn(3, 15, 8) if x is None else x).bfloat16()
        weights, state = cell_of(8, x.dtype)
        opcheck(ops.step, (x, x, *state, *weights, channel_dim, True, False, True, True))
        opcheck(ops.step, (x, x, *state, *weights, channel_dim, False, False, True, True))
        norm = (None, None, None, None, 1e-5)
        opcheck(ops.tail, (x, x, *state, *norm, *weights, channel_dim, True, False, True))
        *_, new_c, tables, mask = ops.step(x, x, *state, *weights, channel_dim, True, False, True, True)
        given = (x, None, None, x, mask, *state, new_c, tables, *weights[::2], channel_dim, True, False)
        opcheck(ops.step_backward, (*given, True, True, True, True, False))


def test_a_wrong_mask_is_refused():
    ops = operators_called("simulated")
    weights, state = cell_of(8, torch.bfloat16)

    def backward(x: Tensor, mask: Tensor):
        c, tables = torch.zeros(3, 8), torch.zeros(3 * (5 * 8 + 2 * 4))
        return ops.step_backward(
            x, None, None, x, mask, *state, c, tables, *weights[::2], 1, True, False, True, True, True, True, False
        )

    x = torch.randn(3, 8, 2, 4).bfloat16()
    backward(x, torch.zeros(24, dtype=torch.uint8))
    for mask in (torch.zeros(23, dtype=torch.uint8), torch.zeros(3, 8, dtype=torch.uint8), x.to(torch.uint8)):
        with pytest.raises(RuntimeError, match=r"y: a mask, expected sizes \(24\)"):
            backward(x, mask)
    odd = torch.randn(3, 8, 1, 1).bfloat16()
    with pytest.raises(RuntimeError, match="y: a mask, of rows that are no multiple of eight values but 1"):
        backward(odd, torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="keep_mask: expected rows of a multiple of eight values, got 1"):
        ops.step(odd, None, *state, *weights, 1, True, False, True, True)


def test_the_reference_refuses_one_of_rows_that_begin_no_bytes():
    weights, state = cell_of(8, torch.float32)
    with pytest.raises(ValueError, match="keep_mask: expected rows of a multiple of 8 values"):
        operators.plain.step(torch.zeros(3, 8, 1, 1), None, *state, *weights, 1, True, False, True, True)


@pytest.mark.skipif(operators.library_error is not None, reason=str(operators.library_error))
def test_a_cpu_keeps_none():
    ops, x = operators.native, torch.randn(3, 8, 2, 4)
    weights, state = cell_of(8, torch.float32)
    with pytest.raises(RuntimeError, match="keep_mask: expected false, the CPU's kernels keep none"):
        ops.step(x, None, *state, *weights, 1, True, False, True, True)
    with pytest.raises(RuntimeError, match="keep_mask: expected false, the CPU's kernels keep none"):
        ops.tail(x, None, *state, *(None,) * 4, 1e-5, *weights, 1, True, False, True)
    y, _, c, tables, _ = ops.step(x, None, *state, *weights, 1, True, False, True, False)
    for mask in (masks.make(y, 1), (y > 0).to(torch.uint8)):
        given = (x, None, None, x, mask, *state, c, tables, *weights[::2], 1, True, False)
        with pytest.raises(RuntimeError, match="y: "):
            ops.step_backward(*given, True, True, True, True, False)


def test_a_gpu_keeps_none_of_wide_maps():
    """A byte would have two writers there."""
    ops = operators_called("simulated")
    weights, state = cell_of(8, torch.float32)
    x = torch.randn(3, 8, 2, 4)
    with pytest.raises(RuntimeError, match="keep_mask: a GPU's kernels keep one of 16-bit maps only"):
        ops.step(x, None, *state, *weights, 1, True, False, True, True)
    y, _, c, tables, _ = ops.step(x, None, *state, *weights, 1, True, False, True, False)
    given = (x, None, None, x, masks.make(y, 1), *state, c, tables, *weights[::2], 1, True, False)
    with pytest.raises(RuntimeError, match="y: a GPU's kernels know masks of 16-bit maps only"):
        ops.step_backward(*given, True, True, True, True, False)


def test_a_gpu_copies_maps_that_begin_no_packs():
    ops = operators_called("simulated")
    weights, state = cell_of(8, torch.bfloat16)
    for first, stride in ((1, 128), (8, 67)):
        memory = torch.randn(3 * stride + first).bfloat16()
        x, s = (memory.as_strided((3, 8, 2, 4), (stride, 8, 4, 1), place) for place in (first, 0))
        y, *_, mask = ops.step(x, s, *state, *weights, 1, True, False, True, True)
        expected, *_ = ops.step(x, s, *state, *weights, 1, True, False, True, False)
        assert torch.equal(y, expected)
        assert torch.equal(mask, masks.make(y, 1))


def test_chunks_of_samples():
    """Each finds its part of the mask, forward and backward."""
    ops = operators_called("simulated")
    weights, state = cell_of(8, torch.bfloat16)
    state = [t.repeat(4, 1) for t in state]
    for last in (False, True):
        x, s, dy = (torch.cat([Layout(last=last).map(8, (8, 8), torch.bfloat16) for _ in range(4)]) for _ in range(3))
        with simulated_backend.device("sweeps", l2=16 << 10):
            simulated_backend.launches()
            y, _, new_c, tables, mask = ops.step(x, s, *state, *weights, 1, True, False, True, True)
            assert simulated_backend.launches().count("Spread") > 1
            assert torch.equal(mask, masks.make(y, 1))
            for need_shortcut in (True, False):
                found = [
                    ops.step_backward(
                        dy, None, None, x, passed, *state, new_c, tables, *weights[::2], 1, True, False,
                        True, need_shortcut, True, True, False,
                    )
                    for passed in (y, mask)
                ]  # fmt: skip
                assert simulated_backend.launches().count("Spread") > 2
                for of_y, of_mask in zip(*found, strict=True):
                    assert torch.equal(of_mask, of_y)


# --- a module ----------------------------------------------------------------------------------------------


@cache
def keeping() -> str:
    """A backend of the reference that keeps masks of all maps."""
    backends.add("masking", "cpu", {}, masked=frozenset(DTYPES))
    return "masking"


def saved(call: Callable[[], object]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = call()
    del result
    return kept


def module(backend: str, channels: int = 8, folded: bool = True) -> tuple[SharedAttention, nn.Module | None]:
    torch.manual_seed(0)
    return SharedAttention(channels, 2, backend=backend), nn.BatchNorm2d(channels) if folded else None


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_it_is_kept(dtype, folded):
    """On a GPU for maps of 16 bits, if gradients are recorded, behind a ReLU, if rows begin bytes."""
    simulated_backend.library()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for channels, side in ((8, 4), (8, 3), (6, 4)):
        for fmt in (torch.contiguous_format, torch.channels_last):
            attention, norm = module("simulated", channels, folded)
            attention.to(wide), norm and norm.to(wide)
            x = torch.randn(2, channels, side, side, dtype=wide).to(dtype).contiguous(memory_format=fmt)
            x.requires_grad_()
            call = lambda a=attention, x=x, n=norm: a(x, shortcut=x, norm=n, activation="relu")  # noqa: E731
            kept = saved(call)
            rows = channels if fmt == torch.channels_last else side * side
            masked = dtype in operators.GPU_MASKED_DTYPES and rows % 8 == 0
            assert [t.numel() for t in kept if t.dtype == torch.uint8] == ([x.numel() // 8] if masked else [])
            assert sum(t.shape == x.shape for t in kept) == (1 if masked else 2), "x, and y without a mask"
            with torch.no_grad():
                assert not saved(call)
            assert not [t for t in saved(lambda a=attention, x=x, n=norm: a(x, norm=n)) if t.dtype == torch.uint8]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["simulated", "masking"])
def test_gradients_have_the_bits_of_those_without_it(name, folded, monkeypatch):
    keeping(), simulated_backend.library()

    def gradients() -> list[Tensor]:
        attention, norm = module(name, folded=folded)
        draws = [torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(2)]
        x, s = (draw.bfloat16().requires_grad_() for draw in draws)
        y, state = attention(x, shortcut=s, norm=norm, activation="relu")
        y, _ = attention(y, state, shortcut=x, norm=norm, activation="relu")
        leaves = [x, s, *attention.parameters(), *(norm.parameters() if norm else ())]
        return list(torch.autograd.grad(y.square().sum(), leaves))

    with_mask = gradients()
    monkeypatch.setattr(backends._backends[name].operators, "masked_dtypes", {})
    for found, expected in zip(with_mask, gradients(), strict=True):
        assert torch.equal(found, expected)


def test_the_result_may_be_written_over_before_the_gradient():
    attention, norm = module(keeping())
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    y, _ = attention(x, shortcut=x, norm=norm, activation="relu")
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    y.detach().mul_(0)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_second_and_batched_derivatives(folded, last):
    attention, norm = module(keeping(), folded=folded)
    attention.double()
    if norm:
        norm.double()
    fmt = torch.channels_last if last else torch.contiguous_format
    x, s = (torch.randn(2, 8, 4, 2, dtype=torch.float64).contiguous(memory_format=fmt) for _ in range(2))
    x.requires_grad_(), s.requires_grad_()

    def call(x: Tensor, s: Tensor) -> Tensor:
        return attention(x, shortcut=s, norm=norm, activation="relu")[0]

    assert [t for t in saved(lambda: call(x, s)) if t.dtype == torch.uint8]
    assert torch.autograd.gradcheck(call, (x, s))
    assert torch.autograd.gradgradcheck(call, (x, s))
    y = call(x, s)
    cotangents = torch.randn(3, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, (x, s), cotangents, retain_graph=True, is_grads_batched=True)
    for k, cotangent in enumerate(cotangents):
        for one, many in zip(torch.autograd.grad(y, (x, s), cotangent, retain_graph=True), batched, strict=True):
            torch.testing.assert_close(many[k], one)


def test_transforms_keep_none():
    """Their rules are the reference's, which saves what it needs."""
    attention, norm = module(keeping())
    x = torch.randn(3, 2, 8, 4, 4)

    def loss(x: Tensor) -> Tensor:
        return attention(x, shortcut=x, norm=norm.eval(), activation="relu")[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(x)
    for one, expected in zip(found, map(torch.func.grad(loss), x), strict=True):
        torch.testing.assert_close(one, expected)


def test_compiled_for_any_size():
    """One graph for rows that begin bytes, another for rows that do not."""
    torch._dynamo.reset()
    attention, norm = module(keeping())
    compiled = torch.compile(
        lambda x: attention(x, shortcut=x, norm=norm, activation="relu")[0], backend="aot_eager", dynamic=True
    )
    for size in ((2, 8, 4, 4), (3, 8, 6, 4), (2, 8, 3, 5), (3, 8, 5, 5)):
        x = torch.randn(size, requires_grad=True)
        (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
        y = attention(x, shortcut=x, norm=norm, activation="relu")[0]
        (expected,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_any_size(strict):
    """Gradients enabled, as people export: no mask, which would ask for rows that begin bytes."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = module(keeping())
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, shortcut=x, norm=self.norm, activation="relu")[0]

    block = Block()
    sizes = {name: torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width")}
    shapes = ({0: sizes["batch"], 2: sizes["height"], 3: sizes["width"]},)
    program = torch.export.export(block, (torch.randn(2, 8, 4, 4),), dynamic_shapes=shapes, strict=strict)
    for x in (torch.randn(3, 8, 3, 5), torch.randn(2, 8, 8, 4)):
        torch.testing.assert_close(program.module()(x), block(x))
    kept = [n.args[-1] for n in program.graph.nodes if str(n.target).startswith("dia_kernels.tail")]
    assert kept == [False]
