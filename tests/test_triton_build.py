"""The Triton kernels as they compile for GPUs that are not here: registers, spills, shared memory, wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dia_kernels.backends import triton as triton_backend

ROOT = Path(__file__).parents[1]
TARGETS = [("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("cuda", "120"), ("hip", "gfx942")]
#: Four warps a program: so many registers leave four programs a multiprocessor, or three where odd sizes make every
#: element an address of its own. A program that has a sample takes what there is.
MOST_REGISTERS, MOST_REGISTERS_OF_ODD_SIZES, MOST_REGISTERS_OF_A_SAMPLE = 128, 168, 255
#: Bytes of a thread's stack: a register or two.
MOST_STACK = 16
#: Bytes of shared memory: what a sum over a tile takes; of the rows of a matrix, where a program has a sample.
MOST_SHARED, MOST_SHARED_OF_A_SAMPLE = 4 << 10, 16 << 10

pytestmark = pytest.mark.skipif(not triton_backend.INSTALLED, reason="Triton is not installed")


def printed(*command: str) -> dict:
    """What a program of tests/ prints as JSON, in a process where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), environment.get("PYTHONPATH")) if p)
    program, *arguments = command
    finished = subprocess.run(
        [sys.executable, ROOT / "tests" / program, *arguments], capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_sizes_alone_compile_nothing_anew():
    """Other samples, other positions: the kernels that the first shape of a series compiled."""
    series = printed("triton_launches.py")
    assert len(series) == 8
    for name, (of_first_shape, of_others) in series.items():
        assert of_first_shape > 0, name
        assert of_others == [], name


@pytest.mark.slow
def test_tiles_are_timed_on_request_and_kept_on_disk(monkeypatch, tmp_path):
    """By Triton's own autotuner, on a GPU that is not there: never unasked, and once for all processes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert printed("triton_launches.py", "timed") == {"timed": 0}
    monkeypatch.setenv("DIA_KERNELS_AUTOTUNE", "1")
    assert printed("triton_launches.py", "timed")["timed"] > 10
    assert printed("triton_launches.py", "timed") == {"timed": 0}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "architecture"), TARGETS)
def test_every_kernel_compiles_within_its_budget(backend, architecture):
    kernels = printed("triton_compiled.py", backend, architecture)
    assert len(kernels) == 4 * 3 * 10 + 7 * 3 * 2 + 4
    for name, figures in kernels.items():
        most, shared = MOST_REGISTERS_OF_ODD_SIZES if "odd" in name else MOST_REGISTERS, MOST_SHARED
        if "sample" in name:
            most, shared = MOST_REGISTERS_OF_A_SAMPLE, MOST_SHARED_OF_A_SAMPLE
        assert figures["registers"] <= most, (name, figures)
        assert figures["spilled"] <= MOST_STACK, (name, figures)
        assert figures["shared"] <= shared, (name, figures)
        if "contiguous" in name or "channels_last" in name:
            assert figures["wide"] > 0, f"{name}: no load of sixteen bytes"
