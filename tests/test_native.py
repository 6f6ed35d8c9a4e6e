"""The C++ tests of csrc/, each a program built with the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from builds import ROOT, sole_use

BUILD = ROOT / "build" / "tests"
TESTS = sorted(path.stem for path in (ROOT / "csrc" / "tests").glob("test_*.cpp"))


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the built tests; a second build is incremental."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the C++ tests cannot be built")
    build()
    return BUILD


def build(*options: str) -> None:
    """Builds the tests, or what ``options`` of `cmake --build` say."""
    with sole_use(BUILD):
        succeed(["cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD, "-DDIA_KERNELS_TESTS=ON"])
        succeed(["cmake", "--build", BUILD, *options])


def succeed(command: list) -> None:
    # pip installs cmake and ninja beside the running Python, which need not be on PATH.
    environment = os.environ | {"PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def run(program: Path, **environment: str) -> None:
    result = subprocess.run([program], capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr


def test_there_are_tests():
    assert {"test_layout", "test_plan", "test_gates", "test_kernels"} <= set(TESTS)


@pytest.mark.parametrize("name", [name for name in TESTS if name != "test_kernels"])
def test_cpp(programs, name):
    run(programs / name)


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_kernels(programs, instruction_set):
    build("--target", "test_kernels")
    # A processor without it runs the widest that it has: dispatch.cpp.
    run(programs / "test_kernels", DIA_KERNELS_ISA=instruction_set)


@pytest.mark.slow
def test_kernels_with_vectors_of_64_bytes(programs):
    build("--target", "test_kernels_wide")
    run(programs / "test_kernels_wide")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_simt", "test_gpu_kernels"])
def test_the_simulated_gpu_on_another_processor(name, tmp_path):
    """Fibers are a few instructions of each processor: those of aarch64, under an emulator."""
    for program in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    target = tmp_path / name
    sources = [ROOT / "csrc" / "tests" / f"{name}.cpp", ROOT / "csrc" / "machines" / "fiber.cpp"]
    compiler = ["aarch64-linux-gnu-g++", "-std=c++20", "-O1", "-static", "-I", ROOT / "csrc", "-o", target]
    subprocess.run([*compiler, *sources], check=True)
    finished = subprocess.run(["qemu-aarch64", target], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
