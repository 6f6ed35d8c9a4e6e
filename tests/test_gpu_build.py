"""The kernels as nvcc compiles them for every supported GPU: registers, spills and the width of accesses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
TYPES, TEAMS = ("float32", "bfloat16", "float16"), ("block", "cluster", "grid")
#: Two blocks of 512 threads a multiprocessor; of the weights' gradients four of 256.
MOST_REGISTERS = 64
#: Bytes that a kernel may spill, by the begin of its name.
MOST_SPILLED = {
    "step_forward": 64,
    "step_backward": 96,
    "reduce": 8,
    "spread": 32,
    "weight_gradients": 0,
    "affine_gradients": 0,
}


def sources() -> list[Path]:
    return sorted(p for folder in ("core", "kernels", "machines") for p in (ROOT / "csrc" / folder).iterdir())


def tool(name: str) -> str | None:
    """A CUDA tool: beside nvcc, or in Triton's wheel."""
    found = shutil.which(name)
    if found is None:
        for folder in sys.path:
            path = Path(folder) / "triton" / "backends" / "nvidia" / "bin" / name
            if path.exists():
                return str(path)
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def compiled(request: pytest.FixtureRequest) -> dict:
    """What ptxas says of each kernel for an architecture, and its machine code; kept by the sources' hash."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    architecture = request.param
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources())).hexdigest()[:16]
    report = BUILD / f"sm_{architecture}-{digest}.json"
    if not report.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        cubin = BUILD / f"sm_{architecture}.cubin"
        command = [
            "nvcc", "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "--cubin", "-I", ROOT / "csrc",
            "-o", cubin, ROOT / "csrc" / "machines" / "kernels.cu",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        disassembler = tool("nvdisasm")
        code = ""
        if disassembler is not None:
            code = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
        report.write_text(json.dumps({"kernels": kernels_of(result.stderr), "accesses": accesses_of(code)}))
        cubin.unlink()
    return {"architecture": architecture, **json.loads(report.read_text())}


def kernels_of(log: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes by mangled name."""
    found = {}
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL
    )
    for name, spilled, registers in pattern.findall(log):
        found[name] = {"spilled": int(spilled), "registers": int(registers)}
    return found


def accesses_of(code: str) -> dict[str, dict[str, int]]:
    """How many loads and stores of sixteen bytes each kernel has, in global and shared memory."""
    found = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", code)[1:]:
        name = re.match(r"\w+", section)
        if name is not None:
            found[name.group()] = {
                kind: len(re.findall(rf"\b{kind}\S*\.128", section)) for kind in ("LDG", "STG", "LDS", "STS")
            }
    return found


def plain(mangled: str) -> str:
    return next(name for name in MOST_SPILLED if f"{name}_kernel" in mangled)


@pytest.mark.slow
def test_budgets(compiled):
    kernels = compiled["kernels"]
    assert len(kernels) == len(TYPES) * (2 * 2 * len(TEAMS) + 2) + 2
    for name, figures in kernels.items():
        assert figures["registers"] <= MOST_REGISTERS, name
        assert figures["spilled"] <= MOST_SPILLED[plain(name)], (name, figures)


@pytest.mark.slow
def test_maps_are_moved_in_sixteen_bytes(compiled):
    accesses = compiled["accesses"]
    if not accesses:
        pytest.skip("no nvdisasm, neither beside nvcc nor in Triton's wheel")
    for name, counts in accesses.items():
        # Teams that are clusters exist from 9.0 on: below, the kernel ends at its first barrier.
        if "gradients" in name or ("TeamE1" in name and compiled["architecture"] < 90):
            continue
        assert counts["LDG"] > 0, name
        if "step" in name or "spread" in name:
            assert counts["STG"] > 0, name
        if "step" in name or "reduce" in name:
            assert counts["STS"] > 0, f"{name}: packs go to shared memory in pieces"
        if "step" in name:
            assert counts["LDS"] > 0, f"{name}: packs come from shared memory in pieces"


def test_the_report_is_read_right():
    log = (
        "ptxas info    : Compiling entry function '_Z13spread_kernelIfEv' for 'sm_90'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 62 registers, used 1 barriers\n"
    )
    assert kernels_of(log) == {"_Z13spread_kernelIfEv": {"spilled": 4, "registers": 62}}
    code = "\n\t.section\t.text._Z1k,\n LDG.E.128.CONSTANT R4\n STS.128 [R2], R4\n LDG.E R3\n"
    assert accesses_of(code) == {"_Z1k": {"LDG": 1, "STG": 0, "LDS": 0, "STS": 1}}
