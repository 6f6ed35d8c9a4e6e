"""The operators as torch sees them: schemas, fakes, strides and mutation."""

import pytest
import torch
from torch.library import opcheck

import dia_kernels as dk
from dia_kernels import operators


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


MAPS = {
    "contiguous": (1, lambda: torch.randn(2, 8, 3, 5)),
    "channels_last": (1, lambda: channels_last(torch.randn(2, 8, 3, 5))),
    "channels_last_3d": (1, lambda: channels_last(torch.randn(2, 8, 3, 2, 4))),
    "one_dimension": (1, lambda: torch.randn(2, 8, 7)),
    "sliced": (1, lambda: torch.randn(2, 9, 3, 10)[:, 1:, :, ::2]),
    "transposed": (1, lambda: torch.randn(8, 2, 3, 5).transpose(0, 1)),
    "expanded": (1, lambda: torch.randn(2, 8, 1, 1).expand(2, 8, 3, 5)),
    "tokens": (-1, lambda: torch.randn(2, 15, 8)),
    "no_samples": (1, lambda: torch.randn(0, 8, 3, 5)),
    "one_position": (1, lambda: torch.randn(2, 8, 1, 1)),
}


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(dk.SharedAttention(8, 3).lstm_parameters())


def table(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape[0], 8)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(kind, full):
    channel_dim, make = MAPS[kind]
    x, weights = make(), parameters()
    optional = (make(), table(x), table(x)) if full else (None, None, None)
    opcheck(operators.native.step, (x, *optional, *weights, channel_dim, full, not full, True, False))
    frozen = [w.detach() for w in weights]
    y, _, new_c, tables, _ = operators.native.step(x, *optional, *frozen, channel_dim, full, not full, True, False)
    incoming = (make(), table(x), table(x)) if full else (make(), None, None)
    opcheck(
        operators.native.step_backward,
        (
            *incoming,
            x,
            y if full else None,
            *optional[1:],
            new_c,
            tables,
            *frozen[::2],
            channel_dim,
            full,
            not full,
            True,
            full,
            full,
            True,
            False,
        ),
    )
    opcheck(operators.native.pool, (x, channel_dim))
    opcheck(operators.native.rescale, (x, table(x), optional[0], channel_dim, full))
    opcheck(
        operators.native.rescale_backward, (make(), x, table(x), y if full else None, channel_dim, True, True, full)
    )
    if kind != "expanded":
        opcheck(operators.native.step_, (x.clone(), *optional, *frozen, channel_dim, full, not full))


def test_step_in_place_says_that_it_writes():
    x = torch.randn(2, 8, 3, 5)
    before = x._version
    with torch.no_grad():
        dk.SharedAttention(8, 3)(x, inplace=True)
    assert x._version == before + 1


@pytest.mark.parametrize("fault", ["gradient", "expanded"])
def test_step_in_place_refuses_what_it_must_not_write_over(fault):
    x = torch.randn(2, 8, 1, 1).expand(2, 8, 3, 5) if fault == "expanded" else torch.randn(2, 8, 3, 5)
    before, weights = x.clone(), parameters()
    with torch.set_grad_enabled(fault == "gradient"), pytest.raises(RuntimeError, match="dia_kernels: "):
        operators.native.step_(x, None, None, None, *weights, 1, True, False)
    assert torch.equal(x, before)


def left_by_steps(count: int, n: int, c: int, m: int, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Factors, tables and h of some steps; behind the tables those of a norm."""
    sizes = (n * (4 * c + 2 * m),), (n * (5 * c + 2 * m) + n * c + 3 * c,), (n, c)
    return [[torch.randn(size, dtype=dtype) for _ in range(count)] for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("count", "n"), [(1, 3), (4, 7), (70, 4), (5, 100), (2, 300), (3, 0)])
def test_parameter_gradients_of_several_steps(count, n, dtype):
    """Of few samples all at once, of some by twos, of many one after the other."""
    factors, tables, h = left_by_steps(count, n, 12, 5, dtype)
    h[0] = h[0].t().contiguous().t()
    tables[-1] = torch.stack([tables[-1]] * 2, 1)[:, 1]
    before = [t.clone() for t in (*factors, *tables, *h)]
    found = operators.native.parameter_gradients(factors, tables, h, 5)
    assert all(torch.equal(a, b) for a, b in zip((*factors, *tables, *h), before, strict=True))
    wide = [[t.double() for t in of] for of in (factors, tables, h)]
    expected = operators.plain.parameter_gradients(*wide, 5)
    # A sum of K terms of one grows as the root of K, and each of K additions rounds it: K eps / 3 is a deviation.
    rounding = torch.finfo(dtype).eps * (2 * count * n + 16)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rounding)
    opcheck(operators.native.parameter_gradients, (factors, tables, h, 5))
