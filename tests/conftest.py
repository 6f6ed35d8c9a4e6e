"""Fixtures of all tests: the implementations of the step that exist here, and global settings restored."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dia_kernels import backends, operator_references, operators
from dia_kernels.backends import triton
from dia_kernels.schemas import RESULT_MAPS

BACKENDS = ("reference", "fallback", "cpu")

if not torch.cuda.is_available():
    # Read when Triton is first imported, whoever does it: without a GPU its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> str | None:
    """The ``backend`` argument for each implementation of the step.

    ``reference`` is plain ATen with PyTorch's own gradients, ``fallback`` the operators' reference
    kernels (what a machine without the native library runs), ``cpu`` the native library.
    """
    if request.param == "reference":
        return "reference"
    if request.param == "cpu":
        if operators.library_error is not None:
            pytest.skip(f"no native kernels here: {operators.library_error}")
        return "cpu"
    for name in operators.SCHEMAS:
        monkeypatch.setattr(operators.native, name, getattr(operator_references, name))
    for name, places in RESULT_MAPS.items():
        into, _ = operators._into(getattr(operator_references, name), places)
        monkeypatch.setitem(operators.native_into, name, into)
    return None


@pytest.fixture(scope="session")
def interpreted() -> None:
    """``"interpreted"`` as a backend of this process: Triton's kernels in its interpreter, for tensors of the CPU."""
    if not triton.INSTALLED:
        pytest.skip("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, where tests/test_triton_gpu.py runs the kernels themselves")
    kernels = importlib.import_module("dia_kernels.backends.triton.operators").KERNELS
    backends.add("interpreted", "cpu", kernels, float64=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for tests of many small maps, which more threads only slow down; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench_module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The module of bench/ that the test file names in ``BENCH_MODULE``.

    bench/ is no package, and its modules import each other by their bare names: no module of the tests may have such a
    name, and they are forgotten afterwards.
    """
    before = set(sys.modules)
    taken = {path.stem for path in BENCH.glob("*.py")} & before - {"conftest"}
    assert not taken, f"other modules have the names of bench's: {taken}"
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module(request.module.BENCH_MODULE)
    sys.path.remove(str(BENCH))
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
