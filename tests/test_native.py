"""The C++ tests of csrc/, each a program built with the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "tests"
TESTS = sorted(path.stem for path in (ROOT / "csrc" / "tests").glob("test_*.cpp"))


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the built tests; a second build is incremental."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the C++ tests cannot be built")
    # pip installs cmake and ninja beside the running Python, which need not be on PATH.
    environment = os.environ | {"PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))}
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD, "-DDIA_KERNELS_TESTS=ON"]
    for command in (configure, ["cmake", "--build", BUILD]):
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
    return BUILD


def test_there_are_tests():
    assert TESTS


@pytest.mark.parametrize("name", TESTS)
def test_cpp(programs, name):
    result = subprocess.run([programs / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
