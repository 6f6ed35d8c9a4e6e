"""Two blocks of a stage, the accuracy contract over them, and maps that cost careless sums their digits.

Imports nothing but torch and the library, for a bare machine with a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from dia_kernels import CellAttention, SharedAttention, reference
from dia_kernels.operators import Operators

#: Error of a result of ours, that of eager PyTorch's, and the largest true value.
Errors = dict[str, tuple[float, float, float]]


def results(
    attention: SharedAttention | CellAttention, norm: nn.Module | None, x: Tensor, s: Tensor
) -> dict[str, Tensor]:
    """Every result, gradient and buffer of two blocks, by name; h and c of cells that have such a state."""
    y, state = attention(x, shortcut=s, activation="relu", norm=norm)
    z, state = attention(y * 0.5, state, shortcut=y, norm=norm)
    found = {"z": z} | (dict(zip("hc", state, strict=True)) if isinstance(state, tuple) else {})
    loss = sum(
        t.to(torch.float64 if t.dtype == torch.float64 else torch.float32).square().sum() for t in found.values()
    )
    leaves = {"x": x, "s": s} | dict(attention.named_parameters())
    leaves |= {} if norm is None else {f"norm {k}": v for k, v in norm.named_parameters()}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    buffers = {} if norm is None else {f"norm {k}": v.float() for k, v in norm.named_buffers()}
    return found | {f"d {k}": g for k, g in zip(leaves, gradients, strict=True)} | buffers


def errors(
    attention: SharedAttention | CellAttention, norm: nn.Module | None, x: Tensor, s: Tensor
) -> tuple[Errors, dict[str, Tensor]]:
    """Those of ``attention`` and of eager PyTorch in the same dtype against float64; and the results of ours."""
    found = results(attention, copy.deepcopy(norm), x, s)
    eager, truth = (copy.deepcopy(attention) for _ in range(2))
    eager.backend = truth.backend = "reference"
    yardstick = results(eager, copy.deepcopy(norm), x, s)
    wide = [t.detach().double().requires_grad_() for t in (x, s)]
    true = results(truth.double(), None if norm is None else copy.deepcopy(norm).double(), *wide)
    of = {}
    for name, value in true.items():
        assert found[name].dtype == yardstick[name].dtype, name
        ours, theirs = ((t[name].double() - value).abs().max().item() for t in (found, yardstick))
        of[name] = ours, theirs, value.abs().max().item()
    return of, found


def assert_as_accurate(draws: Sequence[Errors], dtype: torch.dtype, ulps: float = 1) -> None:
    """Over ``draws`` ours err at most twice as much as eager, plus ``ulps`` of the largest value.

    In the maps' dtype: what follows from the maps between, which are rounded to it, errs by as much in whatever type.
    Of float32 maps eight more often than one: sums of as many terms in another order.
    """
    ulps = ulps * (8 if dtype == torch.float32 else 1)
    for name in draws[0]:
        ours, theirs, scale = (max(values) for values in zip(*(of[name] for of in draws), strict=True))
        assert ours <= 2 * theirs + ulps * torch.finfo(dtype).eps * scale, (name, [of[name] for of in draws])


def shared_gradients(
    attention: SharedAttention, norm: nn.Module | None, x: Tensor, s: Tensor, count: int, at_once: bool
) -> tuple[Tensor, ...]:
    """Gradients of the parameters that ``count`` blocks share, made at once or by each block for itself."""
    y, state = x, None
    for _ in range(count):
        if state is not None and not at_once:
            state = tuple(t.view_as(t) for t in state)  # to the blocks it is somebody else's
        y, state = attention(y, state, norm=norm, shortcut=s, activation="relu")
    return torch.autograd.grad(y.float().sum() + state[0].sum(), [*attention.parameters()])


def assert_at_once_is_one_by_one(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Up to the order of their sums."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def assert_a_far_first_value_spoils_no_variance(backend: str) -> None:
    """All values of a channel but the first lie together: squares about the first are a thousand times the variance."""
    norm = nn.BatchNorm2d(2, momentum=1.0)
    x = 1e-3 * torch.randn(2, 2, 32, 32)
    x[:, :, 0, 0] = 1.0
    SharedAttention(2, 1, backend=backend)(x, norm=norm)
    torch.testing.assert_close(norm.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0.0)


def assert_gradients_at_a_far_mean(backend: str) -> None:
    """The float next to a mean of 1e4 is off by some hundredths of the deviation, which the gradient must not miss."""
    gradients = []
    attention, norm = SharedAttention(4, 2, backend=backend), nn.BatchNorm2d(4)
    x = 1e4 + 0.01 * torch.randn(3, 4, 6, 6)
    weight = torch.randn_like(x)
    for dtype in (torch.float32, torch.float64):
        module, of = copy.deepcopy(attention).to(dtype), copy.deepcopy(norm).to(dtype)
        module.backend = backend if dtype == torch.float32 else "reference"
        z = x.to(dtype).requires_grad_()
        y, _ = module(z, norm=of)
        gradients.append(torch.autograd.grad((y * weight.to(dtype)).sum(), [z, of.weight, of.bias]))
    for found, true in zip(*gradients, strict=True):
        assert (found.double() - true).abs().max() <= 1e-3 * true.abs().max()


def gradient_in_halves(
    ops: Operators,
    device: str,
    dtype: torch.dtype,
    channels_last: bool,
    relu: bool,
    need_shortcut: bool,
    mask: bool,
    far: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Each gradient of a tail of batch statistics, and the same by ``tail_reduce`` and ``tail_spread``; dz first.

    ``mask``: from the ReLU's. ``far``: channels of deviation 1e-2 at a mean of 1e4, which a float holds to a tenth of
    that. The statistics of ``statistics`` are checked on the way.
    """
    g = torch.Generator().manual_seed(0)

    def draw(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=g).to(device=device, dtype=of)

    n, c, m, spatial = 3, 16, 4, (5, 8)
    z, shortcut, dy = (draw(n, c, *spatial, of=dtype) for _ in range(3))
    z = z * 0.01 + 1e4 if far else z * 2 + 5
    if channels_last:
        z, shortcut, dy = (t.contiguous(memory_format=torch.channels_last) for t in (z, shortcut, dy))
    old_h, old_c, dh, dc = (draw(n, c) for _ in range(4))
    gamma, beta = draw(c), draw(c)
    weights = [draw(*size) / 2 for size in ((m, c), (m,), (4 * c, m), (4 * c,)) * 2]
    state, flags = (old_h, old_c), (1, relu, False)
    mean, var, means = ops.statistics(z, 1)
    expected = *reference.statistics(z.double(), 1), reference.pool(z.double(), 1)
    for a, b in zip((mean, var, means), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    y, h, new_c, tables, *_, bits = ops.tail(z, shortcut, *state, gamma, beta, None, None, 1e-5, *weights, *flags, mask)
    again, *_ = ops.tail(z, shortcut, *state, gamma, beta, mean, var, 1e-5, *weights, *flags, False)
    torch.testing.assert_close(again, y)
    joined = ops.tail_join(z, shortcut, *state, gamma, beta, mean, var, means, 1e-5, *weights, *flags, mask)
    for a, b in zip(joined, (y, h, new_c, tables, bits), strict=True):
        torch.testing.assert_close(a, b)
    passed = bits if mask else y
    given = (dy, dh, dc, z, passed, *state, new_c, tables, gamma, beta, *weights[::2], *flags)
    whole = ops.tail_backward(*given, True, True, need_shortcut, True, True, True, False)
    sums, dshortcut, dp, *others = ops.tail_reduce(*given, need_shortcut, True, True)
    source, masked = (dshortcut, None) if need_shortcut else (dy, passed if relu else None)
    count = n * spatial[0] * spatial[1]
    dz = ops.tail_spread(source, masked, z, h, dp, tables, gamma, sums / count, 1)
    return list(zip(whole, (dz, dshortcut, *others[:2], sums[1], sums[0], *others[2:]), strict=True))


def assert_halves_are_the_whole_on_a_gpu(ops: Operators, device: str, dtype: torch.dtype, channels_last: bool) -> None:
    """To the bits; dz but for the sums, which are divided before they are multiplied, and its rounding."""
    wide = dtype == torch.float32
    for relu, need_shortcut, mask in product((True, False), (True, False), (False,) if wide else (False, True)):
        (whole, halves), *rest = gradient_in_halves(
            ops, device, dtype, channels_last, relu, need_shortcut, mask and relu, far=wide
        )
        error = (whole.double() - halves.double()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * whole.double().abs().max(), (relu, need_shortcut, mask)
        for a, b in rest:
            assert torch.equal(a, b), (relu, need_shortcut, mask)


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """``call`` in a CUDA graph, after it has run on a side stream, and where the graph leaves its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y
