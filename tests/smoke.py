"""The smoke suite: does the installed package work in the torch that is here?

    python smoke.py --expect native --under /path/of/site-packages

A script for an environment that holds torch, numpy and the package and nothing else; it needs ``accuracy.py``,
``problems.py`` and ``two_blocks.py`` beside it. It prints a line for each check, and exits with status 1 if one fails.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import torch
from problems import assert_contract, make_problem
from torch import Tensor, nn
from two_blocks import assert_as_accurate, errors

import dia_kernels
from dia_kernels import SharedAttention, operators
from dia_kernels.backends import use_backend

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DRAWS = 3

Check = Callable[[argparse.Namespace], None]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def backend(expected: argparse.Namespace) -> str | None:
    """The backend of a call that must run what is expected: the native kernels by name, or what None gives."""
    return "cpu" if expected.expect == "native" else None


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def sliced(t: Tensor) -> Tensor:
    """The same values in every second column of a wider map."""
    return torch.stack((t, t), dim=-1).flatten(-2)[..., ::2]


def raises(kind: type[Exception], text: str, call: Callable[[], object]) -> None:
    message = None
    try:
        call()
    except kind as error:
        message = str(error)
    assert message is not None, f"no {kind.__name__}"
    assert text in message, message


# --- what is installed -----------------------------------------------------------------------------


@check
def the_package_is_the_installed_one(expected):
    assert Path(dia_kernels.__file__).is_relative_to(expected.under), dia_kernels.__file__
    assert (Path(dia_kernels.__file__).parent / "py.typed").exists()


@check
def the_library_is_the_packages_own_or_missing_with_a_reason(expected):
    mapped = set(re.findall(r"/\S*libdia_kernels\.so\b", Path("/proc/self/maps").read_text()))
    if expected.expect == "native":
        assert operators.library_error is None, operators.library_error
        assert mapped == {str(operators.LIBRARY_PATH)}, mapped
        for name in operators.SCHEMAS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dia_kernels::{name}", "CPU"), name
    else:
        assert "not built" in operators.library_error
        assert mapped == set()
        call = SharedAttention(8, backend="cpu")
        raises(RuntimeError, operators.library_error, lambda: call(torch.ones(1, 8, 2, 2)))


@check
def the_libraries_alone_give_a_process_the_operators(expected):
    """As in a process without Python's side: one library brings the schemas, the other the kernels."""
    code = """
        import sys, torch
        for library in sys.argv[1:]:
            torch.ops.load_library(library)
        assert torch.ops.dia_kernels.pool(torch.ones(2, 8, 3, 3), 1).tolist() == [[1.0] * 8] * 2
    """
    if expected.expect == "native":
        libraries = (operators.LIBRARY_PATH.with_name("libdia_kernels_schemas.so"), operators.LIBRARY_PATH)
        subprocess.run([sys.executable, "-c", dedent(code), *libraries], check=True)


@check
def info_says_what_is_here(expected):
    command = [sys.executable, "-m", "dia_kernels", "info", "--json"]
    info = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert info["versions"]["torch"] == torch.__version__
    assert info["backends"]["reference"] == "available"
    if expected.expect == "native":
        assert info["backends"]["cpu"] == "available"
        assert info["native_library"]["loaded"] == "yes"
        assert info["native_library"]["torch_target"] == "2.10"
    else:
        assert info["backends"]["cpu"] == f"missing: {operators.library_error}"
        assert info["native_library"] == {"loaded": "no"}


# --- results ---------------------------------------------------------------------------------------


@check
def steps_keep_the_accuracy_contract(expected):
    forms = [
        ((4, 32, 7, 7), {}),
        ((4, 32, 7, 7), {"view": channels_last, "output": "tanh"}),
        ((3, 24, 5, 6), {"view": sliced, "state": False}),
        ((4, 50, 32), {"channel_dim": -1, "shortcut": False}),
        ((2, 16, 3, 4, 5), {"relu": False}),
    ]
    for dtype in DTYPES:
        for shape, form in forms:
            draws = [make_problem(shape, 8, dtype=dtype, seed=seed, **form) for seed in range(DRAWS)]
            assert_contract(backend(expected), draws)


@check
def tails_keep_the_accuracy_contract(expected):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for view in (torch.Tensor.contiguous, channels_last):
            for training in (True, False):
                draws = []
                for seed in range(DRAWS):
                    torch.manual_seed(seed)
                    attention = SharedAttention(32, backend=backend(expected))
                    maps = (view(torch.randn(4, 32, 7, 7).to(dtype)).requires_grad_() for _ in range(2))
                    of, _ = errors(attention, nn.BatchNorm2d(32).train(training), *maps)
                    draws.append(of)
                assert_as_accurate(draws, dtype)


@check
def in_place_calls_write_over_the_map(expected):
    attention, x = SharedAttention(8, backend=backend(expected)), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        y, _ = attention(x.clone(), shortcut=x, activation="relu")
        written, _ = attention(x_ := x.clone(), shortcut=x, activation="relu", inplace=True)
    assert written is x_
    assert torch.equal(x_, y)


@check
def second_derivatives_are_those_of_the_reference(expected):
    def penalty(name: str | None) -> Tensor:
        torch.manual_seed(0)
        attention, x = SharedAttention(8, backend=name).double(), torch.randn(2, 8, 3, 3).double().requires_grad_()
        (dx,) = torch.autograd.grad(attention(x)[0].square().sum(), x, create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(dx.square().sum(), attention.parameters())])

    torch.testing.assert_close(penalty(backend(expected)), penalty("reference"))


# --- PyTorch's own tools ---------------------------------------------------------------------------


class Stage(nn.Module):
    """Two blocks that share one attention."""

    def __init__(self, name: str | None, num_layers: int = 1) -> None:
        super().__init__()
        self.attention = SharedAttention(8, num_layers=num_layers, backend=name)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.attention(x, shortcut=x, activation="relu")
        return self.attention(y, state)[0]


@check
def a_compiled_stage_is_one_graph(expected):
    for num_layers in (1, 2):
        stage, x = Stage(backend(expected), num_layers), torch.randn(2, 8, 4, 4, requires_grad=True)
        compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
        leaves = [x, *stage.parameters()]
        found, true = (torch.autograd.grad(call(x).square().sum(), leaves) for call in (compiled, stage))
        torch.testing.assert_close(found, true)


@check
def a_compiled_stage_obeys_the_block_around_it(expected):
    stage, x, programs = Stage(None), torch.randn(2, 8, 4, 4), []

    def keep(graph, _inputs):
        programs.append(graph.code)
        return graph.forward

    compiled = torch.compile(stage, backend=keep, fullgraph=True)
    for _ in range(2):
        compiled(x)
        with use_backend("reference"):
            compiled(x)
    assert ["dia_kernels" in program for program in programs] == [True, False]


@check
def export_keeps_the_operator(expected):
    stage, x = Stage(backend(expected)), torch.randn(2, 8, 4, 4)
    program = torch.export.export(stage, (x,))
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("dia_kernels.step.default") == 2, called
    torch.testing.assert_close(program.module()(x), stage(x))


class Block(nn.Module):
    """A residual block that knows nothing of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.convolution(x)) + x)


@check
def a_converted_network_learns_in_step_with_the_reference(expected):
    def losses(name: str | None) -> Tensor:
        torch.manual_seed(0)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(Block(), Block()), head)
        network = dia_kernels.share_attention(network, backend=name).double()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        x, labels, found = torch.randn(4, 3, 9, 9).double(), torch.arange(4), []
        for _ in range(3):
            loss = nn.functional.cross_entropy(network(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    found = losses(backend(expected))
    torch.testing.assert_close(found, losses("reference"))
    assert found[-1] < found[0]


@check
def modules_survive_pickling_copying_and_weights_only_loading(expected):
    stage, x = Stage(backend(expected)), torch.randn(2, 8, 4, 4)
    torch.save(stage.state_dict(), file := io.BytesIO())
    file.seek(0)
    loaded = Stage(backend(expected))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (pickle.loads(pickle.dumps(stage)), copy.deepcopy(stage), loaded):
        assert torch.equal(twin(x), stage(x))


@check
def a_wrong_argument_is_named(expected):
    attention = SharedAttention(8, backend=backend(expected))
    raises(ValueError, "x: expected 8 channels", lambda: attention(torch.ones(2, 4, 3, 3)))
    raises(TypeError, "x: expected a floating dtype", lambda: attention(torch.ones(2, 8, 3, 3, dtype=torch.int32)))
    raises(ValueError, "reduction", lambda: SharedAttention(8, reduction=0))
    shape = torch.ones(2, 8, 3, 3)
    raises(ValueError, "shortcut", lambda: attention(shape, shortcut=torch.ones(2, 8, 3, 4)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--expect", choices=("native", "reference"), required=True, help="what serves CPU tensors")
    parser.add_argument("--under", type=Path, required=True, help="folder that the package is installed under")
    expected = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for function in CHECKS:
        name = function.__name__.replace("_", " ")
        try:
            function(expected)
        except Exception:
            failed += 1
            print(f"FAILED  {name}", traceback.format_exc(), sep="\n", flush=True)
        else:
            print(f"ok      {name}", flush=True)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed in torch {torch.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
