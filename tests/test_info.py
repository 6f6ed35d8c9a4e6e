"""``python -m dia_kernels info``: with the native library loaded, missing and broken."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dia_kernels
from dia_kernels import __main__, backends, info, operators

PACKAGE = Path(dia_kernels.__file__).parent

#: Run in a fresh process: is the reference step right where the library cannot be loaded?
STEP = """
import torch, dia_kernels
attention = dia_kernels.SharedAttention(8)
x = torch.randn(2, 8, 3, 3, requires_grad=True)
y, (h, c) = attention(x, None, shortcut=torch.ones_like(x), activation="relu")
y.sum().backward()
assert torch.equal(y, torch.relu(x * h[:, :, None, None] + 1)), "wrong result"
assert x.grad is not None
print(dia_kernels.__file__)
"""


def test_text(capsys):
    assert __main__.main(["info"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "versions",
        f"dia_kernels {dia_kernels.__version__}",
        f"torch {torch.__version__}",
        f"python {platform.python_version()}",
        "processor",
        f"torch_threads {torch.get_num_threads()}",
        f"torch_instruction_set {torch.backends.cpu.get_cpu_capability()}",
        "backends",
        "reference available",
        "native library",
    ):
        assert line in lines
    assert any(line.startswith("model ") and len(line) > len("model ") for line in lines)


def test_json_says_the_same(capsys):
    assert __main__.main(["info", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == info.gather()
    assert printed["versions"]["torch"] == torch.__version__
    assert list(printed["backends"]) == list(backends.names())


def test_values_are_written_out():
    section = {"list": ["a", "b"], "empty": [], "null": None, "number": 2}
    assert info.as_text({"native_library": section}).splitlines() == [
        "native library",
        "  list    a, b",
        "  empty   none",
        "  null    none",
        "  number  2",
    ]


@pytest.mark.skipif(operators.library_error is not None, reason=f"needs the native library: {operators.library_error}")
def test_native_library_says_how_it_was_built():
    library = info.gather()["native_library"]
    assert library["loaded"] == "yes"
    assert library["compiler"]
    assert library["torch_target"] == "2.10"
    assert library["instruction_set_in_use"] in library["instruction_sets"]


def test_a_library_that_does_not_say_how_it_was_built(monkeypatch):
    monkeypatch.setattr(operators, "library_error", None)
    monkeypatch.setattr(info.ctypes, "CDLL", lambda _: object())
    assert "build it again" in info.gather()["native_library"]["build"]


def test_missing_library(monkeypatch):
    monkeypatch.setattr(operators, "library_error", "it was never built")
    gathered = info.gather()
    assert gathered["backends"]["cpu"] == "missing: it was never built"
    assert gathered["backends"]["reference"] == "available"
    assert gathered["native_library"] == {"loaded": "no"}
    assert "missing: it was never built" in info.as_text(gathered)


def test_triton_is_not_imported():
    program = "import sys; from dia_kernels import info; info.gather(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_broken_library(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "dia_kernels", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    library = tmp_path / "dia_kernels" / "lib" / operators.LIBRARY_PATH.name
    library.parent.mkdir()
    library.write_text("no shared object")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "default"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    step = run("-c", STEP)
    assert step.returncode == 0, step.stderr
    assert Path(step.stdout.strip()).is_relative_to(tmp_path)
    assert "RuntimeWarning: dia_kernels runs its slow reference path: the native library does not load" in step.stderr

    said = run("-m", "dia_kernels", "info", "--json")
    assert said.returncode == 0, said.stderr
    printed = json.loads(said.stdout)
    assert printed["backends"]["cpu"].startswith("missing: the native library does not load: ")
    assert library.name in printed["backends"]["cpu"]
    assert printed["native_library"] == {"loaded": "no"}
