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
from builds import ROOT, sole_use

BUILD = ROOT / "build" / "gpu"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
TYPES = ("float32", "bfloat16", "float16")
#: A multiprocessor holds three blocks of sweeps, two of tiles of products, four of others; of a cluster's, which are
#: twice as large, one.
MOST_REGISTERS = 64
MOST_REGISTERS_OF_SWEEPS, MOST_REGISTERS_OF_TILES, MOST_REGISTERS_OF_CLUSTERS = 80, 128, 128
#: Bytes that a kernel may spill. Sweeps put away what is the same for a task.
MOST_SPILLED, MOST_SPILLED_BY_SWEEPS_AND_TILES, MOST_SPILLED_BY_CLUSTERS = 16, 96, 0
#: Types of the kernels' arguments, by which their mangled names tell them apart.
NAMES = (
    *("ClusterStep", "ClusterGradient", "Reduce", "Spread", "Extremes", "SpreadExtremeGradient", "WeightGradients"),
    *("BottleneckSums", "JoinParts", "CellStates", "BottleneckGradientSums", "CellGradients"),
    *("BatchStatistics", "ChannelStatistics", "GivenStatistics"),
    *("NormGradients", "SharedNormGradients", "NormFactors", "ScaleGradients", "MeanGradients", "Rectify"),
    *("SplitGateGradients", "SplitGates"),
)
SWEEPS = ("Reduce", "Spread", "Extremes")
#: By clusters of blocks, which GPUs have from sm_90 on.
CLUSTERS = ("ClusterStep", "ClusterGradient")
TILES = ("BottleneckSums", "CellStates", "BottleneckGradientSums", "CellGradients", "WeightGradients")
#: The most bytes of shared memory that a kernel takes by itself: all of it is asked for at the launch.
MOST_STATIC_SHARED = 0


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
    """What ptxas says of each kernel for an architecture, and its machine code; kept by the sources' and our hash."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    architecture = request.param
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in (*sources(), Path(__file__)))).hexdigest()[:16]
    report = BUILD / f"sm_{architecture}-{digest}.json"
    with sole_use(report):
        if not report.exists():
            report.write_text(json.dumps(compile_for(architecture)))
    return {"architecture": architecture, **json.loads(report.read_text())}


def compile_for(architecture: int) -> dict:
    """What ptxas says of the kernels, and what their machine code moves."""
    cubin = BUILD / f"sm_{architecture}.cubin"
    command = [
        "nvcc", "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "--cubin", "-I", ROOT / "csrc",
        "-o", cubin, ROOT / "csrc" / "machines" / "cuda.cu",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    disassembler = tool("nvdisasm")
    code = ""
    if disassembler is not None:
        code = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    cubin.unlink()
    return {"kernels": kernels_of(result.stderr), "accesses": accesses_of(code)}


def kernels_of(log: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and static shared memory by mangled name."""
    found = {}
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)", re.DOTALL
    )
    for name, spilled, registers, rest in pattern.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = {
            "spilled": int(spilled), "registers": int(registers), "shared": int(shared[1]) if shared else 0
        }  # fmt: skip
    return found


def accesses_of(code: str) -> dict[str, dict[str, int]]:
    """What moves data in each kernel.

    Loads and stores of sixteen bytes in global and shared memory; how many such loads of global memory come one after
    the other with no store between (``batch``); copies from global to shared memory that pass no register, of any
    width and of sixteen bytes; how many accesses to spilled registers there are in innermost loops that load sixteen
    bytes at a time. How often a kernel waits for the one before it and lets the next one be launched, and products of
    the tensor cores.
    """
    found = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", code)[1:]:
        name = re.match(r"\w+", section)
        if name is not None:
            counts = {
                kind: len(re.findall(rf"\b{kind}(?!STS)\S*\.128", section)) for kind in ("LDG", "STG", "LDS", "STS")
            }
            counts["batch"] = longest_run(section, r"\bLDG\S*\.128", r"\bST[GS]\b")
            counts["copies"] = len(re.findall(r"\bLDGSTS\b", section))
            counts["wide copies"] = len(re.findall(r"\bLDGSTS\S*\.128", section))
            loops = [loop for loop in innermost_loops(section) if re.search(r"\bLDG\S*\.128", loop)]
            counts["waits"] = len(re.findall(r"\bACQBULK\b", section))
            counts["early"] = len(re.findall(r"\bPREEXIT\b", section))
            counts["copies before a wait"] = len(re.findall(r"\bLDGSTS\b", section.partition("ACQBULK")[0]))
            counts["tensor cores"] = len(re.findall(r"\bHMMA\b", section))
            counts["spills in loops"] = sum(len(re.findall(r"\b(?:LDL|STL)\b", loop)) for loop in loops)
            found[name.group()] = counts
    return found


def innermost_loops(code: str) -> list[str]:
    """The text between a label and a branch back to it, where no other such lies within."""
    labels = {m[1]: m.end() for m in re.finditer(r"^(\.L_x_\d+):", code, re.MULTILINE)}
    branches = ((m, labels.get(m[1])) for m in re.finditer(r"\bBRA\b[^\n]*?(\.L_x_\d+)", code))
    loops = [(begin, m.end()) for m, begin in branches if begin is not None and begin < m.start()]
    inner, latest = [], -1
    # By their ends: a loop is innermost if none that ended before begins within it.
    for begin, end in sorted(loops, key=lambda loop: loop[1]):
        if begin >= latest:
            inner.append(code[begin:end])
        latest = max(latest, begin)
    return inner


def longest_run(code: str, counted: str, ended_by: str) -> int:
    """The most instructions ``counted`` in a row, with none of ``ended_by`` in between."""
    most = run = 0
    for match in re.finditer(rf"(?P<counted>{counted})|(?:{ended_by})", code):
        run = run + 1 if match["counted"] else 0
        most = max(most, run)
    return most


def plain(mangled: str) -> str:
    return next(name for name in NAMES if f"{len(name)}{name}" in mangled)


@pytest.mark.slow
def test_budgets(compiled):
    kernels = compiled["kernels"]
    assert len(kernels) == len(TYPES) * (len(SWEEPS) + 1 + 2 * len(CLUSTERS)) + 21
    for name, figures in kernels.items():
        most = MOST_REGISTERS
        if plain(name) in SWEEPS:
            most = MOST_REGISTERS_OF_SWEEPS
        if plain(name) in TILES:
            most = MOST_REGISTERS_OF_TILES
        if plain(name) in CLUSTERS:
            most = MOST_REGISTERS_OF_CLUSTERS
        assert figures["registers"] <= most, name
        spilled = MOST_SPILLED_BY_SWEEPS_AND_TILES if plain(name) in SWEEPS + TILES else MOST_SPILLED
        if plain(name) in CLUSTERS:
            spilled = MOST_SPILLED_BY_CLUSTERS
        assert figures["spilled"] <= spilled, (name, figures)
        assert figures["shared"] <= MOST_STATIC_SHARED, (name, figures)


def streams(name: str, compiled: dict) -> bool:
    """Whether a kernel moves maps; where there are no clusters, theirs is empty."""
    return plain(name) in SWEEPS or (plain(name) in CLUSTERS and compiled["architecture"] >= 90)


@pytest.fixture
def accesses(compiled) -> dict[str, dict[str, int]]:
    """``accesses_of`` the machine code of an architecture."""
    if not compiled["accesses"]:
        pytest.skip("no nvdisasm, neither beside nvcc nor in Triton's wheel")
    return compiled["accesses"]


@pytest.mark.slow
def test_maps_are_moved_in_sixteen_bytes(compiled, accesses):
    for name, counts in accesses.items():
        if not streams(name, compiled):
            continue
        assert counts["LDG"] > 0, name
        if plain(name) not in ("Reduce", "Extremes"):
            assert counts["STG"] > 0, name


@pytest.mark.slow
def test_nothing_is_spilled_while_a_map_is_streamed(compiled, accesses):
    for name, counts in accesses.items():
        if streams(name, compiled):
            assert counts["spills in loops"] == 0, name


@pytest.mark.slow
def test_loads_are_on_their_way_before_the_first_is_used(compiled, accesses):
    for name, counts in accesses.items():
        if streams(name, compiled):
            assert counts["batch"] >= 4, name


@pytest.mark.slow
def test_products_are_copied_to_shared_memory_past_the_registers(compiled, accesses):
    """Of both sides, by fours and one by one."""
    for name, counts in accesses.items():
        if plain(name) in TILES and compiled["architecture"] >= 80:
            assert counts["wide copies"] >= 2, name
            assert counts["copies"] >= 4 + counts["wide copies"], name


@pytest.mark.slow
def test_products_run_on_tensor_cores(compiled, accesses):
    """Three products of sixteen by eight by eight for each of two pieces of a warp and four steps, at the least."""
    for name, counts in accesses.items():
        if plain(name) in TILES:
            assert (counts["tensor cores"] >= 12) == (compiled["architecture"] >= 80), name


@pytest.mark.slow
def test_every_kernel_waits_for_the_one_before(compiled, accesses):
    """From sm_90 on one may be launched before the other has ended: by a kernel of tables, not by a sweep."""
    early = compiled["architecture"] >= 90
    for name, counts in accesses.items():
        # The second sweep waits at its begin or its end; the weights' gradients at their begin, and as any tile does.
        waits = (2 if plain(name) in ("Spread", "WeightGradients") else 1) * early
        assert counts["waits"] == waits, name
        assert counts["early"] == (waits if plain(name) not in (*SWEEPS, *CLUSTERS) else 0), name


@pytest.mark.slow
def test_the_cells_weights_are_copied_before_the_wait(compiled, accesses):
    for name, counts in accesses.items():
        if compiled["architecture"] >= 90 and plain(name) in (*TILES, *CLUSTERS):
            # Not by those that may be the first of an operator: the weights' update may still run.
            early = plain(name) in TILES and plain(name) != "WeightGradients"
            assert (counts["copies before a wait"] > 0) == early, name


def test_the_report_is_read_right():
    log = (
        "ptxas info    : Compiling entry function '_Z13spread_kernelIfEv' for 'sm_90'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 62 registers, used 1 barriers, 16 bytes smem\n"
    )
    assert kernels_of(log) == {"_Z13spread_kernelIfEv": {"spilled": 4, "registers": 62, "shared": 16}}
    loads = " LDG.E.128.CONSTANT R4\n LDG.E.128 R8\n STS.128 [R2], R4\n LDG.E R3\n"
    code = "\n\t.section\t.text._Z1k,\n" + loads + " LDGSTS.E.BYPASS.128 [R1], [R2]\n"
    counts = {
        "LDG": 2,
        "STG": 0,
        "LDS": 0,
        "STS": 1,
        "batch": 2,
        "copies": 1,
        "wide copies": 1,
        "waits": 0,
        "early": 0,
        "copies before a wait": 1,
        "tensor cores": 0,
        "spills in loops": 0,
    }
    assert accesses_of(code) == {"_Z1k": counts}
    inner = ".L_x_1:\n LDG.E.128 R4\n LDL R2\n @P0 BRA `(.L_x_1)\n"
    loops = f"\n\t.section\t.text._Z1k,\n.L_x_0:\n STL R1\n{inner} LDL R3\n BRA `(.L_x_0)\n LDL R1\n"
    assert [loop.split()[0] for loop in innermost_loops(loops)] == ["LDG.E.128"]
    assert accesses_of(loops)["_Z1k"]["spills in loops"] == 1
