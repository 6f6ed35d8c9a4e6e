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
#: element an address of its own.
MOST_REGISTERS, MOST_REGISTERS_OF_ODD_SIZES = 128, 168
#: Bytes of a thread's stack: a register or two.
MOST_STACK = 16
#: Bytes of shared memory: what a sum over a tile takes.
MOST_SHARED = 4 << 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not triton_backend.INSTALLED, reason="Triton is not installed"),
]


@pytest.mark.parametrize(("backend", "architecture"), TARGETS)
def test_every_kernel_compiles_within_its_budget(backend, architecture):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), environment.get("PYTHONPATH")) if p)
    command = [sys.executable, ROOT / "tests" / "triton_compiled.py", backend, architecture]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    kernels = json.loads(finished.stdout.splitlines()[-1])
    assert len(kernels) == 4 * 3 * 10 + 4
    for name, figures in kernels.items():
        most = MOST_REGISTERS_OF_ODD_SIZES if "odd" in name else MOST_REGISTERS
        assert figures["registers"] <= most, (name, figures)
        assert figures["spilled"] <= MOST_STACK, (name, figures)
        assert figures["shared"] <= MOST_SHARED, (name, figures)
        if "contiguous" in name or "channels_last" in name:
            assert figures["wide"] > 0, f"{name}: no load of sixteen bytes"
