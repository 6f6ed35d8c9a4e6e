"""The Triton backend in Triton's interpreter, on CPU tensors.

The interpreter checks no bounds and truncates float32 to bfloat16: maps lie between NaN, and bfloat16 results may err
by an ulp more.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from two_blocks import (
    assert_a_far_first_value_spoils_no_variance,
    assert_as_accurate,
    assert_gradients_at_a_far_mean,
    errors,
    results,
)

from dia_kernels import SharedAttention, backends, functional, operators
from dia_kernels.backends import triton as triton_backend
from dia_kernels.backends.triton import plan
from dia_kernels.layout import output_format

pytestmark = [
    pytest.mark.skipif(not triton_backend.INSTALLED, reason="Triton is not installed"),
    pytest.mark.usefixtures("one_thread", "interpreted"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(torch.float32, kind) for kind in ("none", "batch", "running", "bare")]
CASES += [(torch.bfloat16, kind) for kind in ("none", "batch")]
# In the interpreter float16 goes the way of bfloat16, and takes as long.
CASES += [pytest.param(torch.float16, kind, marks=pytest.mark.slow) for kind in ("none", "batch")]
SHAPES = [(3, 12, 7, 7), (2, 25, 9, 5), (5, 102, 1, 1), (2, 3, 40, 40), (17, 16, 2), (2, 5, 3, 4, 2)]


def between_nans(t: Tensor, phase: int = 0) -> Tensor:
    """A copy with the same strides, in memory whose other elements are NaN: before, behind and between the samples."""
    outer = sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) + 1
    apart = outer + 5
    memory = torch.full((phase + 7 + t.shape[0] * apart + 9,), float("nan"), dtype=t.dtype)
    view = memory.as_strided(t.shape, (apart, *t.stride()[1:]), phase + 7)
    return view.copy_(t)


def maps(shape, dtype, channels_last: bool) -> list[Tensor]:
    format_ = torch.contiguous_format
    if channels_last:
        format_ = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), format_)
    drawn = [(2 + torch.randn(shape)).to(dtype).contiguous(memory_format=format_) for _ in range(2)]
    return [between_nans(t, phase).requires_grad_() for phase, t in enumerate(drawn)]


def norm_of(kind: str, channels: int, dims: int) -> nn.Module | None:
    if kind == "none":
        return None
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels, affine=kind != "bare")
    with torch.no_grad():
        for t in norm.parameters():
            t.uniform_(0.5, 1.5)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.train(kind != "running")


@pytest.fixture
def split(monkeypatch) -> None:
    """Every step by sweeps, as large samples are."""
    monkeypatch.setattr(importlib.import_module("dia_kernels.backends.triton.operators"), "sample_tile_of", _no_tile)


def _no_tile(*_: int) -> None:
    return None


@pytest.fixture
def in_parts(monkeypatch) -> None:
    """Every sample in tiles of 64 elements."""
    monkeypatch.setattr(plan, "WHOLE", 64)
    monkeypatch.setattr(plan, "PART", 64)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("path", ["split", "in_parts"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_split_or_in_parts(shape, dtype, path, channels_last, request):
    """The ways of a step that small shapes do not take by themselves."""
    request.getfixturevalue(path)
    test_as_accurate_as_eager(shape, dtype, "none", channels_last)


def test_which_steps_have_a_program_a_sample():
    """Samples that registers hold, or twice as much, and weights that do not cost more than the maps."""
    assert plan.sample_tile_of(64, 1024, 16, 2) == (64, 16, 128, 8)
    assert plan.sample_tile_of(128, 256, 32, 2) == (128, 32, 64, 8)
    assert plan.sample_tile_of(256, 64, 12, 2) == (256, 16, 64, 8)
    assert plan.sample_tile_of(256, 64, 64, 4) is None
    assert plan.sample_tile_of(2048, 49, 512, 2) is None
    assert plan.sample_tile_of(256, 3136, 12, 2) is None
    for channels in (1, 3, 25, 64, 256, 2048):
        for positions in (0, 1, 49, 196, 784, 3136):
            for width in (0, 1, 12, 64):
                tile = plan.sample_tile_of(channels, positions, width, 4)
                if tile is not None:
                    assert tile.channels * tile.positions <= plan.WHOLE
                    assert tile.channels >= channels
                    assert tile.width >= width
                    assert tile.positions >= positions or tile.channels * tile.positions <= plan.PART


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    # Channels last are another layout where there are several positions in several dimensions.
    [
        (shape, last)
        for shape in SHAPES
        for last in (False, True)
        if not last or (len(shape) > 3 and max(shape[2:]) > 1)
    ],
    ids=str,
)
def test_as_accurate_as_eager(shape, dtype, kind, channels_last):
    """Over draws; of a bfloat16 map that the interpreter has truncated all values err the same way, by up to an ulp."""
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        attention = SharedAttention(shape[1], min(3, shape[1] // 2), backend="interpreted")
        x, s = maps(shape, dtype, channels_last)
        of, found = errors(attention, norm_of(kind, shape[1], len(shape) - 2), x, s)
        draws.append(of)
        assert found["z"].is_contiguous(memory_format=output_format(x, 1))
        assert found["d x"].is_contiguous(memory_format=output_format(x, 1))
    assert_as_accurate(draws, dtype, ulps=8 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("tanh", [False, True])
def test_tokens_and_tanh(tanh):
    attention = SharedAttention(10, 2, channel_dim=-1, output="tanh" if tanh else "sigmoid", backend="interpreted")
    eager = copy.deepcopy(attention)
    eager.backend = "reference"
    x, s = maps((3, 7, 10), torch.float32, False)
    found, expected = results(attention, None, x, s), results(eager, None, x, s)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_place_writes_nothing_else(channels_last):
    attention = SharedAttention(12, 3, backend="interpreted").requires_grad_(False)
    x, s = (t.detach() for t in maps((3, 12, 5, 7), torch.float32, channels_last))
    expected, _ = attention(x, shortcut=s, activation="relu")
    memory = x.as_strided((x.untyped_storage().size() // 4,), (1,), 0)
    outside = memory.isnan()
    y, _ = attention(x, shortcut=s, activation="relu", inplace=True)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, expected)
    assert torch.equal(memory.isnan(), outside)


def test_stacked_layers_take_the_parts():
    """pool, rescale and its gradient."""
    attention = SharedAttention(6, 2, num_layers=2, backend="interpreted")
    eager = copy.deepcopy(attention)
    eager.backend = "reference"
    x, s = maps((2, 6, 3, 5), torch.float32, True)
    found, expected = results(attention, None, x, s), results(eager, None, x, s)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_nan_passes_and_empty_batches():
    attention = SharedAttention(6, 2, backend="interpreted")
    x = torch.randn(2, 6, 3, 3)
    x[1, 2, 1, 1] = float("nan")
    y, (h, _) = attention(x, activation="relu")
    assert y[1].isnan().all()
    assert h[1].isnan().all()
    assert not y[0].isnan().any()
    empty = torch.randn(0, 6, 3, 3, requires_grad=True)
    y, (h, _) = attention(empty)
    y.sum().backward()
    assert y.shape == (0, 6, 3, 3)
    assert h.shape == (0, 6)
    assert all(p.grad is not None and not p.grad.any() for p in attention.parameters())


def test_the_same_bits_every_time():
    attention = SharedAttention(25, 4, backend="interpreted")
    norm = nn.BatchNorm2d(25, track_running_stats=False)
    x, s = maps((4, 25, 6, 6), torch.bfloat16, True)
    first = results(attention, norm, x, s)
    for name, value in results(attention, norm, x, s).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_keep_their_promises(channels_last):
    """Schemas, fakes (shapes, dtypes and strides of the results) and gradients under torch.compile."""
    ops = backends._backends["interpreted"].operators
    x, s = maps((3, 12, 3, 5), torch.float32, channels_last)
    weights = [p.detach() for p in SharedAttention(12, 3).lstm_parameters()]
    h, c = torch.rand(3, 12), torch.rand(3, 12)
    torch.library.opcheck(ops.step, (x, s, h, c, *weights, 1, True, False, True, False))
    torch.library.opcheck(ops.tail, (x, s, h, c, None, None, None, None, 1e-5, *weights, 1, True, False, False))
    torch.library.opcheck(ops.pool, (x.detach(), 1))
    torch.library.opcheck(ops.rescale, (x.detach(), h, s.detach(), 1, True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_means_of_samples_stand_for_the_map(channels_last):
    ops = backends._backends["interpreted"].operators
    x, s = (t.detach() for t in maps((3, 12, 3, 5), torch.float32, channels_last))
    weights = [p.detach() for p in SharedAttention(12, 3).lstm_parameters()]
    given, rest = (x * 2 + 5, s, *torch.rand(2, 3, 12), *torch.rand(2, 12)), (1e-5, *weights, 1, True, False, False)
    mean, var, means = ops.statistics(given[0], 1)
    expected = ops.tail(*given, mean, var, *rest)
    for a, b in zip(ops.tail_join(*given, mean, var, means, *rest)[:4], expected, strict=False):
        torch.testing.assert_close(a, b)
    # It is the means that are taken: others give another state.
    assert not torch.allclose(ops.tail_join(*given, mean, var, means + 1, *rest)[1], expected[1])


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_statistics_keep_their_digits(mean):
    """A channel of deviation 1e-2 at a mean of 1e4, of which a float holds a tenth of the deviation."""
    norm = nn.BatchNorm2d(4, momentum=1.0)
    attention = SharedAttention(4, 2, backend="interpreted")
    x = mean + 0.01 * torch.randn(5, 4, 10, 10)
    attention(x, norm=norm)
    true = x.double()
    torch.testing.assert_close(norm.running_mean.double(), true.mean((0, 2, 3)), rtol=2**-23, atol=1e-8)
    torch.testing.assert_close(norm.running_var.double(), true.var((0, 2, 3)), rtol=1e-4, atol=0.0)


def test_a_far_first_value_spoils_no_variance():
    assert_a_far_first_value_spoils_no_variance("interpreted")


def test_gradients_at_a_far_mean():
    assert_gradients_at_a_far_mean("interpreted")


@pytest.mark.parametrize(("into", "added"), [(0, 1), (1, 0)])
def test_in_place_with_a_shortcut_in_the_same_memory(into, added):
    attention = SharedAttention(6, 2, backend="interpreted").requires_grad_(False)
    memory = torch.randn(5, 6, 3, 3)
    x, s = memory[into : into + 4], memory[added : added + 4]
    expected, _ = attention(x.clone(), shortcut=s.clone())
    y, _ = attention(x, shortcut=s, inplace=True)
    torch.testing.assert_close(y, expected)


def test_what_serves_cuda_tensors():
    """The native library first, then Triton, then the reference, which stands behind the native operators."""
    of_triton = backends._backends["triton"].operators
    assert backends.serving_cuda(native=True, has_triton=True) is operators.native
    assert backends.serving_cuda(native=False, has_triton=True) is of_triton
    assert backends.serving_cuda(native=False, has_triton=False) is operators.native
    assert of_triton.suffix == "_triton"


@pytest.mark.parametrize("interleaved", [False, True])
def test_tiles(interleaved):
    """Of a power of two of elements, within the registers, and no longer than the map's own next power of two."""
    for channels in (1, 3, 25, 64, 256, 2048):
        for positions in (1, 49, 196, 784, 3136, 200704):
            planned = plan.tile_of(channels, positions, interleaved)
            assert planned.channels * planned.positions <= 2048
            candidates = plan.candidates_of(channels, positions, interleaved)
            assert candidates[0] == planned
            assert len(set(candidates)) == len(candidates) <= 19
            for tile in candidates:
                assert tile.channels & (tile.channels - 1) == 0
                assert tile.positions & (tile.positions - 1) == 0
                assert tile.channels * tile.positions <= 32 * 32 * tile.warps
                assert tile.channels < 2 * channels
                assert tile.positions < 2 * positions


@pytest.mark.usefixtures("split")
def test_tiles_are_timed_on_request_once_for_some_sizes(monkeypatch):
    """The candidates in turn, the fastest thereafter; results and what lies in place stay what they are."""
    from dia_kernels.backends.triton import kernels, tuning

    timed = []

    def benchmark(call, quantiles):
        call()
        timed.append(None)
        return [100.0 - len(timed)] * 3

    monkeypatch.setattr(tuning, "_time", benchmark)
    tuning.tuned.cache_clear()
    attention = SharedAttention(12, 3, backend="interpreted").requires_grad_(False)
    x, s = torch.randn(2, 2, 12, 5, 8)
    expected, _ = attention(x, shortcut=s)
    assert not timed
    monkeypatch.setenv("DIA_KERNELS_AUTOTUNE", "1")
    found, _ = attention(x, shortcut=s)
    torch.testing.assert_close(found, expected)
    candidates = plan.candidates_of(12, 40, False)
    assert len(timed) == 2 * len(candidates)  # of reduce, of spread
    assert tuning.tuned(kernels.reduce).best_config.kwargs["POSITIONS"] == candidates[-1].positions
    attention(x[:1], shortcut=s[:1])
    assert len(timed) == 2 * len(candidates)
    y, _ = attention(x, shortcut=s, inplace=True)
    torch.testing.assert_close(y, expected)
    tuning.tuned.cache_clear()


def test_nothing_is_timed_in_a_capture(monkeypatch):
    from dia_kernels.backends.triton import tuning

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"DIA_KERNELS_AUTOTUNE: .* run the same call once before the capture"):
        tuning._time(None, None)


def test_importing_the_library_imports_no_triton():
    command = [sys.executable, "-c", "import sys, dia_kernels; sys.exit('triton' in sys.modules)"]
    assert subprocess.run(command).returncode == 0


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert backends.missing("triton") == "torch finds no GPU"
    with pytest.raises(ValueError, match="backend: 'triton' serves cuda tensors, x is on cpu"):
        functional.step(torch.randn(1, 6, 2, 2), SharedAttention(6, 2).lstm_parameters(), backend="triton")
