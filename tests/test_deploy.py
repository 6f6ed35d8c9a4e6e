"""Whole networks out of Python: torch.export, AOTInductor, a C++ process, ONNX and TorchScript's tracing.

The slow tests compile, with the C++ compiler that AOTInductor takes too.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import torchvision
from builds import ROOT, needs_library, run, run_python
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dia_kernels import (
    CELLS,
    CellAttention,
    SharedAttention,
    autograd,
    backends,
    models,
    operators,
    schemas,
    share_attention,
    use_backend,
)
from dia_kernels.cells import LSTMParameters
from dia_kernels.models.parts import Options

DYNAMIC = torch.export.Dim.DYNAMIC
#: Batch and resolution of a network's input.
DYNAMIC_IMAGES = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
#: Any smaller, and the last map of an ImageNet network is a single position, for which export would specialise.
EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 48 * 48).view(2, 3, 48, 48)
OTHERS = [torch.linspace(1, -1, n * 3 * h * w).view(n, 3, h, w) for n, h, w in ((3, 48, 48), (1, 64, 40))]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: AOTInductor needs one")


@torch.no_grad()
def trained(network: nn.Module) -> nn.Module:
    """``network``, its norms as if it had been trained: a new norm hides what is left out of it."""
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor, low, high in (
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.5, 0.5),
            (norm.running_mean, -0.5, 0.5),
            (norm.running_var, 0.5, 1.5),
        ):
            tensor.uniform_(low, high)
    return network


def cifar() -> nn.Module:
    torch.manual_seed(0)
    return trained(models.create("resnet20", attention="dia"))


def small() -> nn.Module:
    """The same with two blocks a stage instead of three."""
    torch.manual_seed(0)
    return trained(models.ResNet(14, options=Options(attention="dia")))


def converted(**options) -> nn.Module:
    """A torchvision ResNet with bottlenecks, an eighth as wide as ResNet-50, and fewer blocks."""
    torch.manual_seed(0)
    network = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], 10, width_per_group=8)
    return trained(share_attention(network, **options))


class Blocks(nn.Module):
    """Three steps of one attention, without a norm, after a layer that makes its eight channels."""

    def __init__(self, first: nn.Module, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.attention = SharedAttention(8, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.first(x), None
        for _ in range(3):
            x, state = self.attention(x, state, shortcut=x, activation="relu")
        return x


def unnormed() -> nn.Module:
    return Blocks(nn.Conv2d(3, 8, 1))


def stacked() -> nn.Module:
    return Blocks(nn.Conv2d(3, 8, 1), num_layers=2)


def tokens() -> nn.Module:
    return Blocks(nn.Linear(3, 8), channel_dim=-1)


def exported(network: nn.Module, **options) -> torch.export.ExportedProgram:
    return torch.export.export(network, (EXAMPLE,), dynamic_shapes=(DYNAMIC_IMAGES,), **options)


def called(program: torch.export.ExportedProgram) -> list:
    """The operators of all graphs, in order: a part that runs without autocast is a graph of its own."""
    graphs = (m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    targets = (node.target for graph in graphs for node in graph.nodes if node.op == "call_function")
    return [t for t in targets if isinstance(t, torch._ops.OperatorBase)]


def ours(program: torch.export.ExportedProgram) -> list[str]:
    """Names of our operators among them."""
    return [t._opname for t in called(program) if t.namespace == "dia_kernels"]


def summing_calls(network: nn.Module, x: Tensor) -> int:
    """How often ``network`` calls a layer that sums on its way from ``x`` to its result."""
    calls = []
    layers = (nn.Conv2d, nn.Linear, SharedAttention, CellAttention)
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in network.modules() if isinstance(m, layers)]
    network(x)
    for hook in hooks:
        hook.remove()
    return len(calls)


def assert_equal_but_for_rounding(found: Tensor, network: nn.Module, x: Tensor) -> None:
    """Other programs sum in another order and fuse: an ulp of the largest value for each layer, in either program."""
    expected = network(x)
    scale, most = expected.abs().max(), 2 * summing_calls(network, x) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=most)


# --- torch.export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "strict"])
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eval", "train"])
def test_trial_19_export_keeps_the_operators_and_the_reference_is_plain_aten(training, strict):
    network = small().train(training)
    assert ours(exported(network, strict=strict)) == ["tail"] * 6
    with use_backend("reference"):
        program = exported(network, strict=strict)
    assert {str(t) for t in called(program) if t.namespace != "aten"} <= {"wrap_with_autocast"}
    assert {t.namespace for t in called(program.run_decompositions({}))} == {"aten"}
    assert_equal_but_for_rounding(program.module()(EXAMPLE), network, EXAMPLE)


def resnet50() -> nn.Module:
    torch.manual_seed(0)
    return trained(models.resnet50(attention="dia", num_classes=10))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", [small, *(pytest.param(f, marks=pytest.mark.slow) for f in (converted, resnet50))])
def test_an_exported_network_is_the_network_for_every_batch_and_resolution(make, training, monkeypatch):
    """Bit for bit: outputs, gradients and the norms' buffers.

    In a program each block's gradient of the parameters that it shares is added up. Where eager calls make one for all,
    that is equal up to the order of the sums, and nothing else differs.
    """
    network = make().train(training)
    module = exported(copy.deepcopy(network)).module()  # which shares the parameters and buffers of what was exported
    shared = {
        f"gradient of {name}.{parameter}"
        for name, part in network.named_modules() if isinstance(part, SharedAttention)
        for parameter, _ in part.named_parameters()
    }  # fmt: skip

    def results(candidate: nn.Module, x: Tensor) -> dict[str, Tensor]:
        y = candidate(x)
        parameters = dict(candidate.named_parameters())
        gradients = torch.autograd.grad(y.square().sum(), list(parameters.values()))
        found = {f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients, strict=True)}
        return {"y": y} | found | {name: buffer.clone() for name, buffer in candidate.named_buffers()}

    for x in (EXAMPLE, *OTHERS):
        expected = results(module, x)
        as_called = results(copy.deepcopy(network), x)
        with monkeypatch.context() as patch:
            patch.setattr(autograd, "_better_at_once", lambda *args: False)
            added_up = results(network, x)
        assert added_up.keys() == as_called.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(added_up[name], value), name
            bound = 1e-5 * value.abs().max().item() if name in shared else 0
            torch.testing.assert_close(as_called[name], value, rtol=0, atol=bound, equal_nan=True, msg=name)


@pytest.mark.slow
def test_a_saved_program_runs_where_only_the_library_is_imported(tmp_path):
    network = small().eval()
    torch.export.save(exported(network), tmp_path / "network.pt2")
    loads = f"""
        import torch
        try:
            module = torch.export.load("{tmp_path}/network.pt2").module()
            torch.save(module(torch.ones(3, 3, 96, 64)), "{tmp_path}/result.pt")
        except RuntimeError:
            print("not loaded")
    """
    assert "not loaded" in run_python(loads, ROOT)
    assert "not loaded" not in run_python("import dia_kernels\n" + dedent(loads), ROOT)
    assert torch.equal(torch.load(tmp_path / "result.pt"), network(torch.ones(3, 3, 96, 64)))


@pytest.mark.parametrize(("make", "names"), [(small, {"tail"}), (unnormed, {"step"}), (stacked, {"pool", "rescale"})])
def test_decompositions_turn_an_exported_program_into_plain_aten(make, names):
    network = make().eval()
    program = exported(network)
    assert set(ours(program)) == names
    plain = program.run_decompositions(backends.decompositions())
    assert {t.namespace for t in called(plain)} == {"aten"}
    for x in (EXAMPLE, *OTHERS):
        assert_equal_but_for_rounding(plain.module()(x), network, x)


def test_every_backend_s_forward_operators_have_a_decomposition():
    table = {op._name for op in backends.decompositions()}
    forward = ("step", "tail", "pool", "rescale")
    assert table >= {f"dia_kernels::{name}{suffix}" for name in forward for suffix in ("", "_plain", "_triton")}


def test_the_state_is_an_argument_and_a_result_of_an_exported_step():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = SharedAttention(8, 2)

        def forward(self, x, state):
            return self.attention(x, state)

    def arguments(n):
        torch.manual_seed(n)
        return torch.rand(n, 8, 4, 4), (torch.rand(n, 8), torch.rand(n, 8))

    step, batch = Step(), {0: DYNAMIC}
    module = torch.export.export(step, arguments(2), dynamic_shapes=(batch, (batch, batch))).module()
    for found, expected in zip(*(pytree.tree_leaves(f(*arguments(5))) for f in (module, step)), strict=True):
        assert torch.equal(found, expected)


#: In eager calls a norm before a cell that runs by itself is folded, which rounds otherwise.
TRACED = [("tail", {"attention": "dia"}), ("rescale", {"attention": "eca", "fold_norm": False})]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("operator", "options"), TRACED)
def test_a_network_traced_to_torchscript_is_the_network(operator, options, gradients, tmp_path):
    torch.manual_seed(0)
    network = trained(models.ResNet(14, options=Options(**options))).eval()
    with torch.set_grad_enabled(gradients):
        torch.jit.trace(network, EXAMPLE).save(tmp_path / "network.pt")
    traced = torch.jit.load(tmp_path / "network.pt")
    assert f"dia_kernels::{operator}(" in str(traced.inlined_graph)
    for x in OTHERS:
        assert torch.equal(traced(x), network(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [options for _, options in TRACED], ids=lambda options: options["attention"])
def test_a_network_traced_while_it_trains_goes_on_training(options):
    """Tracing runs it three times, which moves the norms' buffers: the other network begins where it ended."""
    torch.manual_seed(0)
    network = trained(models.ResNet(14, options=Options(**options)))
    traced = torch.jit.trace(network, EXAMPLE)
    eager = copy.deepcopy(network)
    for called in (traced, eager):
        called(OTHERS[0]).square().sum().backward()
    for (name, found), expected in zip(network.named_parameters(), eager.parameters(), strict=True):
        # Equal but for the order of additions: float32, sums of at most 3 * 48 * 48 terms.
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(found.grad / scale, expected.grad / scale, rtol=0, atol=1e-5, msg=name)
    for (name, found), expected in zip(network.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(found, expected), name


# --- the schemas ---------------------------------------------------------------------------------------


def test_the_schemas_text_names_the_parameters_of_the_cell():
    assert LSTMParameters._fields == schemas.PARAMETERS


def test_the_schemas_printed_for_cpp_are_those_of_the_operators():
    """By a Python without any package, as a build may take."""
    printed = run([sys.executable, "-I", "-S", schemas.__file__]).splitlines()
    texts = ["dia_kernels::" + line.removeprefix('"').removesuffix('",') for line in printed]
    of_all = (*(getattr(operators.native, name) for name in operators.SCHEMAS), *operators.native_into.values())
    expected = [str(operator._schema) for operator in of_all]
    assert [str(torch._C.parse_schema(text)) for text in texts] == expected


def with_scripts() -> dict[str, str]:
    """The environment of a command that takes Python, cmake and ninja from where pip installs them."""
    return os.environ | {"PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))}


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """A folder with both libraries, as in an installation; that of the schemas is built."""
    folder, torch_folder = tmp_path_factory.mktemp("native"), Path(torch.__file__).parent
    options = {
        "TORCH_INCLUDE_DIR": torch_folder / "include",
        "TORCH_LIBRARY_DIR": torch_folder / "lib",
        "Python3_EXECUTABLE": sys.executable,
    }
    cmake = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        ROOT,
        "-B",
        folder,
        *(f"-D{name}={value}" for name, value in options.items()),
    ]
    run(cmake, env=with_scripts())
    run(["cmake", "--build", folder, "--target", "dia_kernels_schemas"], env=with_scripts())
    shutil.copy(operators.LIBRARY_PATH, folder)
    return folder


@pytest.mark.slow
@needs_library
@needs_compiler
def test_the_schemas_library_leaves_a_process_alone_that_has_the_schemas(native):
    printed = run_python(
        f"""
        import ctypes, torch, dia_kernels
        ctypes.CDLL("{native}/libdia_kernels_schemas.so")
        print(tuple(dia_kernels.SharedAttention(8, 2)(torch.ones(2, 8, 4, 4))[0].shape))
        """,
        ROOT,
    )
    assert "this process has the operators' schemas already" in printed
    assert "(2, 8, 4, 4)" in printed


@pytest.mark.slow
@needs_library
@needs_compiler
def test_python_s_schemas_are_refused_clearly_after_the_schemas_library(native):
    printed = run_python(
        f"""
        import torch
        for name in ("dia_kernels_schemas", "dia_kernels"):
            torch.ops.load_library(f"{native}/lib{{name}}.so")
        print(torch.ops.dia_kernels.pool(torch.ones(1, 2, 4, 4), 1).tolist())
        try:
            import dia_kernels
        except RuntimeError as error:
            print(error)
        """,
        ROOT,
    )
    assert "[[1.0, 1.0]]" in printed
    assert "Only a single TORCH_LIBRARY can be used to register the namespace dia_kernels" in printed


# --- AOTInductor ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Callable[[torch.memory_format], tuple[nn.Module, str]]:
    """A network in evaluation and its package, for a memory format; each is made once."""
    folder, made = tmp_path_factory.mktemp("packages"), {}

    def make(memory_format):
        if memory_format not in made:
            network = cifar().eval().to(memory_format=memory_format)
            example = EXAMPLE.contiguous(memory_format=memory_format)
            program = torch.export.export(network, (example,), dynamic_shapes=(DYNAMIC_IMAGES,))
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{len(made)}.pt2"))
            made[memory_format] = network, path
        return made[memory_format]

    return make


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_package_of_aotinductor_runs_from_python(package, memory_format):
    network, path = package(memory_format)
    module = torch._inductor.aoti_load_package(path)
    for x in (EXAMPLE, *OTHERS):
        x = x.contiguous(memory_format=memory_format)
        assert_equal_but_for_rounding(module(x), network, x)


@pytest.mark.slow
@needs_library
@needs_compiler
def test_a_package_of_aotinductor_runs_from_cpp(package, native):
    """The program of examples/cpp, compiled as the docs say: the bits of Python's run of the same package."""
    _, path = package(torch.contiguous_format)
    (command,) = re.findall(r"```sh\n(.*?g\+\+.*?)```", (ROOT / "docs" / "deploying.md").read_text(), re.S)
    run(["bash", "-ec", command.replace("-o run_package", f"-o {native}/run_package")], cwd=ROOT, env=with_scripts())
    module = torch._inductor.aoti_load_package(path)
    for shape in ((2, 3, 48, 48), (1, 3, 64, 40)):
        printed = run([native / "run_package", native, path, *map(str, shape)])
        x = torch.arange(float(torch.Size(shape).numel()))
        expected = module(x.div(len(x)).view(shape))
        assert torch.equal(torch.tensor([float(line) for line in printed.split()]).view_as(expected), expected)


# --- ONNX ----------------------------------------------------------------------------------------------

NETWORKS = {
    "cifar": cifar,
    **{cell: lambda cell=cell: converted(cell=cell) for cell in CELLS},
    "stacked": stacked,
    "tokens": tokens,
}


def assert_onnxruntime_agrees(program: torch.onnx.ONNXProgram, network: nn.Module, inputs: list[Tensor], path: Path):
    """No operator of ours in the graph, and equal results for each of ``inputs``."""
    import onnxruntime

    assert {node.domain for node in program.model.graph.all_nodes()} == {""}
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    (name,) = (argument.name for argument in session.get_inputs())
    for x in inputs:
        (found,) = session.run(None, {name: x.numpy()})
        assert_equal_but_for_rounding(torch.from_numpy(found), network, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_trial_19_onnx_gives_equal_results(name, tmp_path):
    network = NETWORKS[name]().eval()
    inputs, shapes = [EXAMPLE, *OTHERS], DYNAMIC_IMAGES
    if name == "tokens":
        inputs = [x.flatten(2).transpose(1, 2) for x in inputs]  # (N, L, 3)
        shapes = {0: DYNAMIC, 1: DYNAMIC}
    program = torch.onnx.export(network, (inputs[0],), dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    assert_onnxruntime_agrees(program, network, inputs, tmp_path / "network.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["use_backend", "decompositions"])
def test_an_exported_program_goes_to_onnx_as_plain_aten(way, tmp_path):
    network = cifar().eval()
    if way == "use_backend":
        with use_backend("reference"):
            program = exported(network)
    else:
        program = exported(network).run_decompositions(backends.decompositions())
    onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    assert_onnxruntime_agrees(onnx, network, [EXAMPLE, *OTHERS], tmp_path / "network.onnx")


class InPlace(nn.Module):
    """A step that writes over its map."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.attention = SharedAttention(8, 2).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.attention(self.convolution(images), activation="relu", inplace=True)[0]


@pytest.mark.slow
def test_a_step_in_place_goes_to_onnx(tmp_path):
    network = InPlace().eval()
    program = torch.onnx.export(network, (EXAMPLE,), dynamo=True, dynamic_shapes=(DYNAMIC_IMAGES,), verbose=False)
    assert_onnxruntime_agrees(program, network, [EXAMPLE, *OTHERS], tmp_path / "network.onnx")
