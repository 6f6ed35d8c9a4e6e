"""Public bug reports of similar libraries, tried on this one: docs/trials.md has each by the number in a test's name.

Rows that have a file of their own subject are tested there; the last test here sees that none is missing.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import formula_step, library_step, make_problem, run, same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dia_kernels import SharedAttention, backends, checkpoints, models, operators, plan

TESTS = Path(__file__).parent
ROOT = TESTS.parent

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
needs_library = pytest.mark.skipif(operators.library_error is not None, reason=f"{operators.library_error}")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Stage(nn.Module):
    """Blocks that share one attention, each with a convolution and a batch norm of its own."""

    def __init__(self, blocks: int = 3, channels: int = 8, backend: str | None = None) -> None:
        super().__init__()
        self.attention = SharedAttention(channels, 4, backend=backend)
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x, state = self.attention(convolution(x), state, norm=norm, shortcut=x, activation="relu")
        return x


def maps(count: int, shape: tuple[int, ...], layout: str = "contiguous", device: str = "cpu") -> list[Tensor]:
    drawn = (torch.randn(shape).to(device).contiguous(memory_format=FORMATS[layout]) for _ in range(count))
    return [t.requires_grad_() for t in drawn]


def gradients(stage: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(stage(x).square().mean(), [x, *stage.parameters()]))


# --- 5, 6, 23: strides and layouts ------------------------------------------------------------------

INCOMING = {
    "sum": lambda t: t.new_ones(()).expand(t.shape),
    "expanded": lambda t: t[:, :, :1, :1].expand(t.shape),
    "sliced": lambda t: torch.stack((t, -t), dim=-1)[..., 0],
    "transposed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("incoming", INCOMING)
def test_trial_05_the_backward_reads_the_strides_of_the_incoming_gradient(backend, incoming):
    plain = make_problem((3, 12, 6, 5), 3)
    plain.dy.copy_(INCOMING[incoming](plain.dy))
    expected = run(library_step(backend), plain)
    strided = make_problem((3, 12, 6, 5), 3)
    object.__setattr__(strided, "dy", INCOMING[incoming](strided.dy))
    assert not strided.dy.is_contiguous()
    found, truth = run(library_step(backend), strided), run(formula_step, plain.double())
    for name, value in expected.items():
        assert same_bits(found[name], value), name
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("folded", [False, True])
def test_trial_06_layouts_are_kept_and_nothing_is_copied(layout, folded):
    attention, norm = SharedAttention(8, 4), nn.BatchNorm2d(8) if folded else None
    x, shortcut, dy = maps(3, (4, 8, 6, 6), layout)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        y, _ = attention(x, shortcut=shortcut, activation="relu", norm=norm)
        y.backward(dy.detach())
    for t in (y, x.grad, shortcut.grad):
        assert t.is_contiguous(memory_format=FORMATS[layout])
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy"}
    events = profiled.key_averages(group_by_input_shape=True)
    assert any("dia_kernels" in event.key for event in events)
    assert [event.key for event in events if event.key in copies and list(x.shape) in event.input_shapes] == []


def test_trial_06_a_compiler_copies_no_map_around_the_step(fresh_compiler):
    from torch._inductor.utils import run_and_get_code

    stage = Stage().eval().to(memory_format=torch.channels_last)
    (x,) = maps(1, (2, 8, 6, 6), "channels_last")
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(stage, fullgraph=True), x)
        assert torch.equal(y, stage(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert "dia_kernels.tail" in code
    assert re.findall(r"cpp_fused\w*|triton_\w+_fused\w*|\.copy_\(|\.clone\(", code) == []


@pytest.mark.parametrize("incoming", FORMATS)
@pytest.mark.parametrize("layout", FORMATS)
def test_trial_23_every_pair_of_layouts_of_map_and_incoming_gradient(backend, layout, incoming):
    def of(layout: str, incoming: str) -> dict[str, Tensor]:
        problem = make_problem((3, 12, 6, 5), 3, view=lambda t: t.contiguous(memory_format=FORMATS[layout]))
        object.__setattr__(problem, "dy", problem.dy.contiguous(memory_format=FORMATS[incoming]))
        return run(library_step(backend), problem)

    found, truth = of(layout, incoming), run(formula_step, make_problem((3, 12, 6, 5), 3).double())
    for name, value in truth.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)
    assert found["dx"].is_contiguous(memory_format=FORMATS[layout])


# --- 7: dtypes under autocast ------------------------------------------------------------------------


@pytest.mark.parametrize("state", [torch.float32, None], ids=["state float32", "no state"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["weights float32", "weights bfloat16"])
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16], ids=["autocast float16", "autocast bfloat16"])
@pytest.mark.parametrize("folded", [False, True], ids=["step", "tail"])
@pytest.mark.parametrize("device", DEVICES)
def test_trial_07_autocast_keeps_the_dtype_of_the_map(device, folded, cast, weights, state):
    attention, norm = SharedAttention(8, 4).to(device, weights), nn.BatchNorm2d(8).to(device) if folded else None
    convolution = nn.Conv2d(8, 8, 1, device=device)
    (image,) = maps(1, (2, 8, 5, 5), device=device)
    given = None if state is None else tuple(torch.rand(2, 8, device=device, dtype=state) for _ in range(2))
    with torch.autocast(device, dtype=cast):
        z = convolution(image)
        y, given = attention(z, given, norm=norm, shortcut=z, activation="relu")
        y, (h, c) = attention(convolution(y), given, norm=norm, shortcut=y, activation="relu")
    assert (z.dtype, y.dtype, h.dtype, c.dtype) == (cast, cast, torch.float32, torch.float32)
    y.float().sum().backward()
    assert {p.grad.dtype for p in attention.parameters()} == {weights}
    assert {p.grad.dtype for p in (norm or convolution).parameters()} == {torch.float32}
    assert image.grad.dtype == torch.float32


# --- 8: fakes ----------------------------------------------------------------------------------------

VIEWS = {
    "channels_last": lambda: torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(2, 9, 3, 10)[:, 1:, :, ::2],
    "volumes": lambda: torch.randn(2, 8, 3, 2, 4),
    "volumes, channels_last": lambda: torch.randn(2, 8, 3, 2, 4).contiguous(memory_format=torch.channels_last_3d),
    "volumes, sliced": lambda: torch.randn(2, 8, 6, 3, 4)[:, :, ::2, 1:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_trial_08_fakes_have_the_strides_of_real_results(view):
    parameters = SharedAttention(8, 4).lstm_parameters()
    opcheck(operators.native.step, (VIEWS[view](), VIEWS[view](), None, None, *parameters, 1, True, False, True, False))


# --- 9: graphs ---------------------------------------------------------------------------------------


def test_trial_09_six_blocks_are_one_graph_compiled_once_for_any_batch(fresh_compiler):
    stage, counter = Stage(blocks=6), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stage, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.01)
    for samples in (3, 4, 5, 6, 7):
        x = torch.randn(samples, 8, 6, 6)
        torch._dynamo.mark_dynamic(x, 0)
        other = copy.deepcopy(stage)
        compiled(x).square().mean().backward()
        other(x).square().mean().backward()
        for (name, a), b in zip(stage.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


# --- 10, 11, 12, 17: streams, graphs, devices, bits ----------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_trial_10_reduce_overhead_gives_the_results_of_eager(fresh_compiler):
    stage = Stage().cuda()
    compiled = torch.compile(stage, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # from the third call on a CUDA graph is replayed
        torch.manual_seed(seed)
        (x,) = maps(1, (4, 8, 6, 6), device="cuda")
        for a, b in zip(gradients(compiled, x), gradients(stage, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_trial_10_kernels_run_on_the_current_stream():
    stage = Stage().cuda()
    (x,) = maps(1, (4, 8, 6, 6), device="cuda")
    expected = gradients(copy.deepcopy(stage), x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # if a kernel ran on another stream it would be early
        found = gradients(stage, x.detach().mul(1).requires_grad_())
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_trial_11_forward_and_backward_are_captured_and_replayed_on_new_data(backend):
    if backends.missing(backend) is not None:
        pytest.skip(f"{backends.missing(backend)}")
    stage = Stage(backend=backend).cuda()
    (x,) = maps(1, (4, 8, 6, 6), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is allocated or compiled once, before the capture
        for _ in range(3):
            gradients(stage, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(stage, x)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [t.clone() for t in captured]
        for a, b in zip(replayed, gradients(stage, x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_trial_12_tensors_on_another_device_than_the_current_one(backend):
    if backends.missing(backend) is not None:
        pytest.skip(f"{backends.missing(backend)}")
    torch.cuda.set_device(0)
    stage = Stage(backend=backend)
    (x,) = maps(1, (4, 8, 6, 6))
    first, second = (
        gradients(copy.deepcopy(stage).to(d), x.detach().to(d).requires_grad_()) for d in ("cuda:0", "cuda:1")
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_trial_17_twenty_runs_give_the_same_bits(device, layout):
    stage = Stage(channels=24).to(device)
    (x,) = maps(1, (5, 24, 9, 9), layout, device)
    first = gradients(stage, x)
    for _ in range(19):
        for a, b in zip(gradients(stage, x), first, strict=True):
            assert torch.equal(a, b)


# --- 15, 16: no samples, very many elements -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 12, 6, 5), (0, 12, 4), (0, 12, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["step", "tail"])
@pytest.mark.parametrize("device", DEVICES)
def test_trial_15_no_samples_forward_and_backward(device, folded, shape):
    attention = SharedAttention(12, 4).to(device)
    norm = (
        {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](12).to(device).eval() if folded else None
    )
    x = torch.empty(shape, device=device, requires_grad=True)
    y, state = attention(x, norm=norm, shortcut=x, activation="relu")
    y, (h, c) = attention(y, state, norm=norm)
    (y.sum() + h.sum() + c.sum()).backward()
    assert (y.shape, h.shape, c.shape, x.grad.shape) == (shape, (0, 12), (0, 12), shape)
    for p in attention.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    if device == "cuda":
        torch.cuda.synchronize()


@needs_library
@pytest.mark.parametrize("elements", [2**31 - 1, 2**31, 2**31 + 1])
@pytest.mark.parametrize("backward", [False, True])
def test_trial_16_plans_count_in_64_bits(elements, backward):
    for shape in ((elements, 4, 1), (1, 4, elements), (1, elements, 1), (2**16, 2**15 + 1, 1)):
        count = shape[0] * shape[1] * shape[2]
        p = plan.plan(shape, "h100", dtype="bf16", reduction=4, backward=backward)
        assert p.bytes == p.passes * count * 2
        assert p.seconds >= p.ideal_seconds > count * 2 / 4e12  # no memory of today is faster


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_trial_16_over_two_to_the_31_elements_in_both_directions():
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 2 * 2**31:
        pytest.skip(f"needs 24 GiB of GPU memory, {free / 2**30:.0f} are free")
    attention = SharedAttention(64, 4).cuda()
    x = torch.randn(2**31 // 64**3 + 3, 64, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, _ = attention(x, activation="relu")
    y.backward(torch.ones((), device="cuda", dtype=torch.bfloat16).expand(y.shape))
    part = slice(-4, None)  # beyond what 32 bits count
    last = x.detach()[part].clone().requires_grad_()
    z, _ = attention(last, activation="relu")
    z.backward(torch.ones_like(z))
    assert torch.equal(y[part], z)
    torch.testing.assert_close(x.grad[part], last.grad)


# --- 18: weights of the usual layouts ------------------------------------------------------------------


def test_trial_18_weights_of_pytorchcv_load_strictly_and_compute_the_same():
    from pytorchcv.models.diaresnet_cifar import diaresnet20_cifar10

    theirs = diaresnet20_cifar10().double().eval()
    ours = models.create("resnet20", 10, attention="dia").double().eval()
    checkpoints.load(ours, theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


# --- 21: volumes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_trial_21_volumes_are_maps_like_others(device, layout):
    """A volume is a map whose rows are longer: the same numbers, and no memory beyond the result."""
    attention = SharedAttention(12, 4).to(device)
    x = torch.randn(2, 12, 3, 4, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    flat = x.detach().reshape(2, 12, 12, 5).requires_grad_()
    norms = nn.BatchNorm3d(12).to(device), nn.BatchNorm2d(12).to(device)
    outputs = []
    for z, norm in ((x, norms[0]), (flat, norms[1])):
        y, state = attention(z, norm=norm, shortcut=z, activation="relu")
        y, _ = attention(y, state)
        y.square().sum().backward()
        outputs.append(y)
    assert outputs[0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(outputs[0].flatten(2), outputs[1].flatten(2))
    torch.testing.assert_close(x.grad.flatten(2), flat.grad.flatten(2))


# --- 24: the host --------------------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    """The operators that torch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def python_calls(function) -> int:
    """Functions of Python that a call of ``function`` enters, after a first one."""
    function()
    count = 0

    def seen(frame, event, argument) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count - 1


#: A function of autograd looks at its results once more.
RECORDED = ["aten.detach.default"] * 2
#: What stands for the parameters in the graph, made by the second block of a pass.
TOKEN = ["aten.new_empty_strided.default"]


@pytest.mark.parametrize(
    ("form", "most_calls", "dispatched"),
    [
        ("inference", 39, ["dia_kernels.step.default"]),
        ("training", 49, ["dia_kernels.step.default", *RECORDED]),
        ("training, block 2", 50, [*TOKEN, "dia_kernels.step.default", *RECORDED]),
        ("training, block 3", 48, ["dia_kernels.step.default", *RECORDED]),
        ("tail in inference", 61, ["dia_kernels.tail.default"]),
        ("tail in training", 67, ["dia_kernels.tail_tracking_.default", *RECORDED]),
        ("tail in training, block 3", 66, ["dia_kernels.tail_tracking_.default", *RECORDED]),
    ],
)
def test_trial_24_a_call_enters_few_functions_and_one_operator(form, most_calls, dispatched):
    """Not times, which no test can hold, but what they come from; docs/kernels.md has the times."""
    training = "training" in form
    attention = SharedAttention(8, 4)
    norm = nn.BatchNorm2d(8).train(training) if "tail" in form else None
    x, shortcut = maps(2, (2, 8, 4, 4))
    state = (torch.rand(2, 8), torch.rand(2, 8))
    for _ in range(int(form[-1]) - 1 if "block" in form else 0):
        _, state = attention(x, state)

    def call():
        with torch.set_grad_enabled(training):
            return attention(x, state, norm=norm, shortcut=shortcut, activation="relu")

    assert python_calls(call) <= most_calls
    with Dispatched() as mode:
        call()
    assert mode.names == dispatched


# --- 25: the backward ----------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("norm", plan.NORMS)
@pytest.mark.parametrize("shape", [(256, 256, 56, 56), (128, 64, 32, 32), (32, 2048, 7, 7), (1, 102, 7, 7)], ids=str)
def test_trial_25_the_backward_passes_over_the_map_at_most_twice_as_often(shape, norm):
    """What the plans promise; test_gpu_kernels.py and test_gpu_sweeps.py count each kernel's bytes on the machine."""
    forward, backward = (plan.plan(shape, "h100", norm=norm, backward=b) for b in (False, True))
    assert forward.passes <= backward.passes <= 2 * forward.passes


# --- the list ------------------------------------------------------------------------------------------


def test_every_trial_has_a_test_and_a_line_in_the_docs():
    rows = {int(n) for n in re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "trials.md").read_text(), re.M)}
    assert rows == set(range(1, 26))
    named = re.findall(r"^def test_trial_(\d\d)_", "".join(p.read_text() for p in TESTS.glob("test_*.py")), re.M)
    assert {int(n) for n in named} == rows
