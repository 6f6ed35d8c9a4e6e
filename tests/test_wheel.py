"""What `make wheel` makes: an sdist, and one wheel that serves every Python and every torch from 2.10 on.

Every test here is slow: the wheel is built with CUDA code for every architecture where nvcc is, and two more versions
of torch are installed under build/.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from builds import (
    LIBRARIES,
    ROOT,
    TORCHES,
    build_environment,
    copy_sources,
    made_once,
    needs_library,
    needs_nvcc,
    run,
    shared_temporary,
    site_packages,
    torch_environment,
)

from dia_kernels import __version__

pytestmark = pytest.mark.slow

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
INFO = f"dia_kernels-{__version__}.dist-info"
#: What the suite needs beside torch and the package.
SUITE = ("smoke.py", "accuracy.py", "problems.py", "two_blocks.py")


@dataclass(frozen=True)
class Made:
    """What `make wheel` left in ``folder``; ``backend`` says what serves tensors of the CPU there."""

    folder: Path
    backend: str

    @property
    def wheel(self) -> Path:
        (wheel,) = self.folder.glob("*.whl")
        return wheel

    @property
    def sdist(self) -> Path:
        return self.folder / f"dia_kernels-{__version__}.tar.gz"

    def files(self) -> set[str]:
        """Names of the files in the wheel."""
        return {name for name in zipfile.ZipFile(self.wheel).namelist() if not name.endswith("/")}

    def about(self, name: str) -> Message:
        """``METADATA`` or ``WHEEL`` of the wheel."""
        return Parser().parsestr(zipfile.ZipFile(self.wheel).read(f"{INFO}/{name}").decode())


def make_wheel(factory: pytest.TempPathFactory, backend: str, **choices: str) -> Made:
    """Runs `make wheel` in a copy of the sources, with this Python for that of .venv."""

    def make(folder: Path) -> None:
        command = ["make", "--old-file=.venv/dependencies.stamp", f"python={sys.executable}", "wheel"]
        run(command, cwd=copy_sources(folder / "sources"), env=build_environment(**choices))

    return Made(made_once(shared_temporary(factory) / f"wheel_{backend}", make) / "sources" / "dist", backend)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_wheel(tmp_path_factory, "native")


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_wheel(tmp_path_factory, "reference", DIA_KERNELS_BUILD="none")


@pytest.fixture(params=[pytest.param("native", marks=needs_library), "pure"])
def made(request: pytest.FixtureRequest) -> Made:
    """With the library, and without."""
    return request.getfixturevalue(request.param)


# --- what is in them -------------------------------------------------------------------------------


def test_an_sdist_and_one_wheel_are_made(made):
    assert set(made.folder.iterdir()) == {made.sdist, made.wheel}
    platform = "any" if made.backend == "reference" else r"manylinux_2_\d+_\w+"
    assert re.fullmatch(rf"dia_kernels-{re.escape(__version__)}-py3-none-{platform}\.whl", made.wheel.name)


def test_a_wheel_holds_the_package_its_licence_and_nothing_else(made):
    about = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")}
    sources = made.folder.parent
    modules = {str(path.relative_to(sources)) for path in (sources / "dia_kernels").rglob("*.py")}
    libraries = LIBRARIES if made.backend == "native" else set()
    assert made.files() == about | modules | {"dia_kernels/py.typed"} | libraries


def test_a_wheel_says_what_it_needs(made):
    metadata = made.about("METADATA")
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"


def test_the_sdist_holds_what_a_build_reads_and_no_tests(made):
    """That nothing is missing the wheel shows, which is built from it."""
    with tarfile.open(made.sdist) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"setup.py", "CMakeLists.txt", "csrc/ops/cpu.cpp", "dia_kernels/py.typed", "LICENSE"} <= files
    assert not [name for name in files if name.startswith(("tests/", "bench/", "build/")) or name.endswith(".so")]


@needs_library
def test_auditwheel_finds_no_library_missing_but_torchs_own(native):
    command = [sys.executable, "-m", "auditwheel", "show", "--json", native.wheel]
    shown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert shown["external_libs"].keys() == {"libtorch.so", "libtorch_cpu.so"}
    assert not any(shown[fault] for fault in ("pyfpe", "ucs2", "unsupported_isa"))
    # The tag promises what the symbols of the C and C++ libraries allow.
    assert native.wheel.stem.endswith(f"-py3-none-{shown['sym_tag']}")
    assert native.about("WHEEL").get_all("Tag") == [f"py3-none-{shown['sym_tag']}"]


# --- what is in the library ------------------------------------------------------------------------


def cuobjdump() -> str | None:
    """NVIDIA's reader of CUDA libraries: Triton brings one along, the toolkit may."""
    of_triton = list(site_packages(Path(sys.prefix)).glob("triton/backends/nvidia/bin/cuobjdump"))
    return str(of_triton[0]) if of_triton else shutil.which("cuobjdump")


@needs_library
@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is neither in Triton nor on PATH")
def test_trial_02_a_build_without_a_gpu_holds_every_architecture_and_info_lists_them(native, tmp_path):
    known = run(["nvcc", "--list-gpu-arch"]).split()
    wanted = [architecture for architecture in ARCHITECTURES if f"compute_{architecture}" in known]
    zipfile.ZipFile(native.wheel).extractall(tmp_path)
    listed = run([cuobjdump(), "--list-elf", "--list-ptx", tmp_path / "dia_kernels" / "lib" / "libdia_kernels.so"])
    machine, intermediate = (re.findall(rf"\.sm_(\d+)\.{kind}", listed) for kind in ("cubin", "ptx"))
    assert sorted(machine) == sorted(wanted * 2)  # csrc/ops/cuda.cu and csrc/machines/cuda.cu
    assert intermediate == ["100" if "100" in wanted else wanted[-1]] * 2
    info = run([sys.executable, "-m", "dia_kernels", "info", "--json"], env=build_environment(PYTHONPATH=str(tmp_path)))
    assert json.loads(info)["native_library"]["cuda_architectures"] == wanted


# --- at work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", TORCHES)
def test_the_wheel_passes_the_smoke_suite_beside_another_torch(made, version, tmp_path):
    """In a fresh environment and a folder that holds the suite alone, with no program on PATH and no Triton."""
    environment = tmp_path / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", environment])
    packages, python = site_packages(environment), environment / "bin" / "python"
    (packages / "torch.pth").write_text(f"{site_packages(torch_environment(version))}\n")
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", made.wheel])
    for name in SUITE:
        shutil.copy(ROOT / "tests" / name, tmp_path)
    command = [python, "-W", "error::RuntimeWarning", "smoke.py", "--expect", made.backend, "--under", packages]
    nothing_else = {"PATH": "", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    output = run(command, cwd=tmp_path, env=build_environment(**nothing_else))
    assert f"checks passed in torch {version}" in output
