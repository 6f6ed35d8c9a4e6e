"""Fuzzing: calls as hypothesis draws them, held to the truth; raw operators with wrong arguments, under sanitizers.

In the quick suite a few cases of each, always the same. ``make fuzz`` draws many more, other ones each time, and prints
how many of each; FUZZ_EXAMPLES and FUZZ_SEED choose.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from builds import ROOT, run, sole_use
from fuzzing import (
    CALLED,
    FOLDED,
    Call,
    Case,
    Tensors,
    assert_as_output,
    assert_near,
    attention_of,
    build,
    call_of,
    cases,
    memory_of,
    norm_of,
    solve,
    sum_error,
    truth,
    with_gradients,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from problems import same_bits
from simulated_backend import device, library
from torch import Tensor, nn

from dia_kernels import SharedAttention, operators
from dia_kernels.layout import compute_dtype

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SEED = os.environ.get("FUZZ_SEED", "0")
NATIVE = pytest.mark.skipif(operators.library_error is not None, reason=f"no native library: {operators.library_error}")
NARROW = (torch.float32, torch.float16, torch.bfloat16)


def examples(quick: int, share: float = 1.0) -> settings:
    """``quick`` examples, always the same, or by ``make fuzz`` a ``share`` of those asked for, drawn at random."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(
        max_examples=max(int(EXAMPLES * share), 1) if EXAMPLES else quick,
        derandomize=not EXAMPLES,
        deadline=None,
        suppress_health_check=checks,
        print_blob=True,
    )


# --- the public call ---------------------------------------------------------------------------------


def assert_right(found: Tensors, expected: Tensors, call: Call, growth: float) -> None:
    """Every result and gradient near the truth; no gradient and a gradient of zeros are the same."""
    for name in found.keys() | expected.keys():
        missing = found.get(name, expected.get(name))
        ours, true = (part.get(name, torch.zeros_like(missing)) for part in (found, expected))
        assert_near(name, ours, true, call, growth)


def assert_layouts(found: Tensors, call: Call, backend: str | None) -> None:
    case, x = call.case, call.leaves["x"]
    if case.shortcut_dtype in (None, case.dtype):
        assert_as_output("y", found["y"], x, case.channel_dim, exact=backend != "reference")
    if backend == "reference" or not case.fused:
        return  # the gradients are PyTorch's own, or their sum is
    for name in ("dx", "dshortcut") if case.relu else ("dx",):  # without a ReLU dshortcut is dy itself
        if name in found:
            assert_as_output(name, found[name], x, case.channel_dim)


def check(case: Case, backend: str | None) -> None:
    """All that holds for any call: values, shapes, dtypes, layouts, equal bits again, and nothing written to."""
    call = build(case)
    expected, buffers, growth = truth(call)
    assume(sum_error(case, growth) < 1 / 128)  # else the norm's deviation is that of a rounding error
    torch.set_num_threads(case.threads)  # the fixture `one_thread` restores it
    given_tensors = [*call.leaves.values(), *call.incoming.values()]
    before = [memory_of(t) for t in given_tensors]
    found, found_buffers = solve(call, backend)
    again, _ = solve(call, backend)
    assert all(torch.equal(memory_of(t), memory) for t, memory in zip(given_tensors, before, strict=True))
    assert found.keys() == again.keys()
    assert all(same_bits(found[name], again[name]) for name in found), "other bits the second time"
    weight = expected.get("dhidden_reduce_weight")
    if weight is not None and case.state_dtype is None and backend in ("simulated", "interpreted"):
        weight.zero_()  # as kernels for a GPU write it with no state; eager multiplies, and zero times NaN is NaN
    assert_right(found, expected, call, growth)
    assert_layouts(found, call, backend)
    for name, value in found_buffers.items():
        assert_near(name, value, buffers[name].to(value.dtype), call, growth)


@examples(60)
@given(case=cases())
def test_any_step(backend, case):
    check(case, backend)


@examples(50, share=0.5)
@given(case=cases(parts=("layers", "scale", "shortcut")))
def test_any_step_in_parts(backend, case):
    check(case, backend)


@pytest.mark.parametrize("backend", ["fallback", "cpu"], indirect=True)
@examples(30, share=0.3)
@given(case=cases(norms=FOLDED, parts=("layers", "scale")))
def test_any_step_in_parts_with_a_norm(backend, case):
    check(case, backend)


@examples(50)
@given(case=cases(norms=FOLDED))
def test_any_step_with_a_norm(backend, case):
    check(case, backend)


SMALL = cases(norms=(None, *FOLDED), max_channels=16, max_spatial=4, dtypes=NARROW)


@examples(6, share=0.02)
@given(case=SMALL)
def test_any_step_of_the_triton_backend(interpreted, one_thread, case):
    check(case, "interpreted")


@pytest.mark.parametrize("plans", ["sweeps", "products", "clusters"])
@examples(8, share=0.05)
@given(case=SMALL)
def test_any_step_of_the_simulated_gpu(one_thread, plans, case):
    library()
    with device(plans):
        check(case, "simulated")


@examples(25, share=0.3)
@given(case=cases(norms=CALLED))
def test_a_norm_that_is_not_folded_is_called_first(backend, case):
    """Equal bits, gradients and buffers too: PyTorch's norm, and the step on what it returns."""
    call = build(case)
    found, buffers = solve(call, backend)
    leaves = call.fresh()
    norm = norm_of(call, leaves)
    results = call_of(call, leaves, None, backend, x=norm(leaves["x"]))
    expected = with_gradients(call, results, leaves)
    assert found.keys() == expected.keys()
    for name in found:
        assert same_bits(found[name], expected[name]), name
    for name, value in buffers.items():
        assert same_bits(value, getattr(norm, name)), name


@examples(25, share=0.3)
@given(
    case=cases(),
    kind=st.sampled_from(["none", "apart", "itself", "overlapping"]),
    normed=st.booleans(),
    inplace=st.sampled_from([True, "auto"]),
)
def test_in_place(backend, case, kind, normed, inplace):
    """The same bits as otherwise, over x and nowhere else; whatever memory x and the shortcut share."""
    call = build(case)
    x = call.leaves["x"]
    assume(all(stride > 0 or size < 2 for stride, size in zip(x.stride(), x.shape, strict=True)))
    shortcut = {"none": None, "apart": call.leaves.get("shortcut"), "itself": x, "overlapping": x.flip(0)}[kind]
    if kind == "overlapping" and x.shape[0] > 1:
        # Samples 1.. of x, and samples 0.. of it as the shortcut.
        x, shortcut = x[1:], x[:-1]
    state = (call.leaves["h"][: len(x)], call.leaves["c"][: len(x)]) if "h" in call.leaves else None
    attention, options = attention_of(case, call.leaves, backend), {"activation": "relu" if case.relu else None}
    if normed:
        width = x.shape[attention.channel_dim]
        options["norm"] = tuple(torch.rand(2, width, dtype=compute_dtype(x.dtype)))
    with torch.no_grad():
        expected, expected_state = attention(x, state, shortcut=shortcut, **options)
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        before = memory.clone()
        y, found_state = attention(x, state, shortcut=shortcut, inplace=inplace, **options)
    assert y.data_ptr() == x.data_ptr() or inplace == "auto"
    assert same_bits(y, expected)
    assert all(same_bits(a, b) for a, b in zip(found_state, expected_state, strict=True))
    if y.data_ptr() == x.data_ptr():
        before.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(y)
    assert same_bits(memory, before), "written beside x"


# --- raw operators with wrong arguments ----------------------------------------------------------------


def tool(name: str) -> str:
    """Path of a program, looked for beside the running Python first: pip installs cmake and ninja there."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name) or name


def sanitizer(name: str) -> str:
    """Path of a sanitizer's library, which has to be there before any other."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler: the library cannot be built under sanitizers")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the C++ compiler {compiler} has no {name}")
    return path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its library as built under sanitizers; a second build is incremental."""
    sanitizer("libasan.so")
    build_folder, torch_folder = ROOT / "build" / "sanitized", Path(torch.__file__).parent
    with sole_use(build_folder):
        configure = [
            *(tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", build_folder, "-DDIA_KERNELS_SANITIZE=ON"),
            *(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DTORCH_INCLUDE_DIR={torch_folder / 'include'}"),
            f"-DTORCH_LIBRARY_DIR={torch_folder / 'lib'}",
        ]
        for command in (configure, [tool("cmake"), "--build", build_folder, "--target", "dia_kernels"]):
            run(command)
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "dia_kernels", folder / "dia_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (folder / "dia_kernels" / "lib").mkdir(exist_ok=True)
    shutil.copy(build_folder / operators.LIBRARY_PATH.name, folder / "dia_kernels" / "lib")
    return folder


def fuzz_operators(arguments: list[str], log: Path, environment: dict[str, str]) -> str:
    """Runs tests/operator_fuzzing.py; what it printed. A crash leaves its case as the last line of the log."""
    command = [sys.executable, ROOT / "tests" / "operator_fuzzing.py", "--log", log, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    last = log.read_text().splitlines()[-1:] if log.exists() else []
    assert result.returncode == 0, f"exit status {result.returncode} in\n{last}\n{result.stderr[-6000:]}"
    return result.stdout


@pytest.mark.slow
def test_a_wrong_call_of_a_native_operator_never_reads_or_writes_out_of_bounds(sanitized, tmp_path):
    """Each is refused or right, under the address and undefined-behaviour sanitizers, which see torch's memory too."""
    environment = {
        "LD_PRELOAD": f"{sanitizer('libasan.so')} {sanitizer('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYTHONPATH": str(sanitized),
    }
    cases = EXAMPLES * 10 or 3000
    print(fuzz_operators(["--seed", SEED, "--cases", str(cases)], tmp_path / "log", environment))


@NATIVE
def test_a_wrong_call_of_a_native_operator_is_refused_or_right(tmp_path):
    print(fuzz_operators(["--seed", SEED, "--cases", "500"], tmp_path / "log", {}))


@pytest.mark.slow
def test_a_wrong_call_of_a_gpu_operator_is_refused_or_right(tmp_path):
    """On the simulated GPU, which checks every access itself."""
    library()
    arguments = ["--backend", "simulated", "--seed", SEED, "--cases", str(EXAMPLES or 500)]
    print(fuzz_operators(arguments, tmp_path / "log", {}))


# --- what fuzzing found, each as a test of its own -------------------------------------------------------


def weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [p.detach() for p in SharedAttention(8).lstm_parameters()]


def test_stacked_layers_take_tokens_of_no_samples(backend):
    x = torch.empty(0, 5, 8, requires_grad=True)
    y, _ = SharedAttention(8, num_layers=2, channel_dim=-1, backend=backend)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_parts_take_maps_without_channels(backend, channel_dim):
    x = torch.empty((2, 0, 5) if channel_dim == 1 else (2, 5, 0))
    assert operators.native.pool(x, channel_dim).shape == (2, 0)
    assert [t.shape for t in operators.native.statistics(x, channel_dim)] == [(0,), (0,), (2, 0)]
    gradients = operators.native.rescale_backward(x, x, torch.empty(2, 0), None, channel_dim, True, True, True)
    assert [t.shape for t in gradients] == [x.shape, (2, 0), x.shape]


def assert_no_values_give_a_norm_no_gradient(shape: tuple[int, ...], training: bool, backend: str | None) -> None:
    norm = nn.BatchNorm1d(8).train(training)
    y, (h, c) = SharedAttention(8, backend=backend)(torch.empty(shape, requires_grad=True), norm=norm)
    (y.sum() + h.sum() + c.sum()).backward()
    assert torch.equal(norm.weight.grad, torch.zeros(8))
    assert torch.equal(norm.bias.grad, torch.zeros(8))


EMPTY = pytest.mark.parametrize(("shape", "training"), [((3, 8, 0), True), ((3, 8, 0), False), ((0, 8, 4), True)])


@EMPTY
def test_no_values_give_a_norm_no_gradient(backend, shape, training):
    assert_no_values_give_a_norm_no_gradient(shape, training, backend)


@EMPTY
def test_no_values_give_a_norm_no_gradient_on_the_simulated_gpu(one_thread, shape, training):
    library()
    assert_no_values_give_a_norm_no_gradient(shape, training, "simulated")


def test_no_positions_give_a_scale_no_gradient_on_the_simulated_gpu(one_thread):
    library()
    x = torch.empty(9, 8, 0)
    rescale_backward = torch.ops.dia_kernels.rescale_backward_simulated
    dscale = rescale_backward(x, x, torch.ones(9, 8), None, 1, False, True, False)[1]
    assert torch.equal(dscale, torch.zeros(9, 8))


@NATIVE
@pytest.mark.parametrize("left", [0, 32])
@pytest.mark.parametrize("index", [0, 1, 2, 4], ids=["x", "shortcut", "h", "input_reduce_weight"])
def test_a_tensor_whose_storage_was_freed_is_named(index, left):
    """As sharded training leaves parameters between their uses: PyTorch's own operations crash on them."""
    arguments = [*(torch.ones(2, 8, 5, 5) for _ in range(2)), *(torch.ones(2, 8) for _ in range(2)), *weights()]
    arguments[index].untyped_storage().resize_(left)
    name = operators.native.step._schema.arguments[index].name
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"dia_kernels: {name}: its storage was freed"):
        operators.native.step(*arguments, 1, True, False, True, False)


@NATIVE
@pytest.mark.parametrize("index", [2, 3, 4], ids=["h", "c", "input_reduce_weight"])
def test_what_a_step_in_place_reads_may_lie_in_the_map_that_it_writes_over(index):
    """Many samples: one is written before the next ones are read."""
    x = torch.randn(2000, 8, 33)
    arguments = [None, torch.rand(2000, 8), torch.rand(2000, 8), *weights()]
    shape = arguments[index - 1].shape
    arguments[index - 1] = x.flatten()[: shape.numel()].view(shape)
    with torch.no_grad():
        expected = operators.native.step(x, *arguments, 1, True, False, False, False)
        found = operators.native.step_(x, *arguments, 1, True, False)
    assert torch.equal(x, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:3], strict=True))


def test_an_operator_refuses_tensors_on_several_devices():
    """One on "meta" takes the call to the fake, which would return memory that nobody has filled."""
    with torch.no_grad(), pytest.raises(RuntimeError, match="dia_kernels: input_reduce_weight: on meta, but x on cpu"):
        operators.native.step(
            torch.ones(2, 8, 5), *[None] * 3, *(w.to("meta") for w in weights()), 1, True, False, True, False
        )
