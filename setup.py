"""Drives CMake to build the native library; everything else about the package stands in pyproject.toml.

The environment variable DIA_KERNELS_BUILD says what is built:

    auto   the CPU kernels where a C++ compiler is, the CUDA ones where nvcc is too (the default)
    cpu    the CPU kernels; a missing tool is an error
    cuda   both; a missing nvcc is an error
    none   nothing: pure Python, which runs the reference

Whether a GPU is present is never asked. DIA_KERNELS_CUDA_ARCHS (as in "80;90") narrows the CUDA
architectures. Build with ``pip install --no-build-isolation .``: the headers are those of the torch
that is installed, and an isolated build would fetch another one of several gigabytes.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "native"
LIBRARY = Path("dia_kernels", "lib", "libdia_kernels.so")
#: For C++ processes; built and installed beside it.
SCHEMAS = LIBRARY.with_name("libdia_kernels_schemas.so")


def fail(reason: str) -> SystemExit:
    """An error whose text is the whole message: no traceback tells a user more."""
    return SystemExit(f"dia_kernels: {reason}")


def program(name: str) -> str | None:
    """Path of a program, looked for beside the running Python first: pip installs cmake and ninja there."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def cpp_compiler() -> str | None:
    """The C++ compiler that CMake will take: $CXX, or one of the usual names."""
    if "CXX" in os.environ:
        return shutil.which(shlex.split(os.environ["CXX"])[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, that of $CUDA_HOME, or the one on PATH."""
    if "CUDACXX" in os.environ:
        return shutil.which(os.environ["CUDACXX"])
    if "CUDA_HOME" in os.environ:
        return shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    return shutil.which("nvcc")


def missing_for_cpu() -> str | None:
    """Why the CPU kernels cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return f"the native library is for Linux, this is {sys.platform}"
    if cpp_compiler() is None:
        return "no C++ compiler found"
    return next((f"{name} not found" for name in ("cmake", "ninja") if program(name) is None), None)


def choose_parts() -> tuple[bool, bool, str | None]:
    """(whether the library is built, whether with CUDA, the line that says what ``auto`` leaves out)."""
    mode = os.environ.get("DIA_KERNELS_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise fail(f"DIA_KERNELS_BUILD: expected auto, cpu, cuda or none, got {mode!r}")
    if mode == "none":
        return False, False, None
    missing = missing_for_cpu()
    if mode == "auto" and (cpp_compiler() is None or not sys.platform.startswith("linux")):
        return False, False, f"dia_kernels: left out: every native kernel ({missing}); the reference runs instead"
    # With `auto` too: pip hides what a build says, and nobody wants the slow reference unawares.
    if missing is not None:
        raise fail(
            f"DIA_KERNELS_BUILD={mode}: {missing}; `pip install cmake ninja` brings both, DIA_KERNELS_BUILD=none does "
            "without the native kernels"
        )
    if mode == "cpu":
        return True, False, None
    if nvcc() is not None:
        return True, True, None
    if mode == "cuda":
        raise fail("DIA_KERNELS_BUILD=cuda: nvcc not found; put it on PATH, or set CUDACXX or CUDA_HOME")
    return True, False, "dia_kernels: left out: the CUDA kernels (nvcc not found)"


NATIVE, CUDA, LEFT_OUT = choose_parts()


def say_what_is_left_out() -> None:
    if LEFT_OUT is not None:
        print(LEFT_OUT, flush=True)


def torch_folder() -> Path:
    """Folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise fail(
            "torch is not installed where this build runs, and the native library needs its headers. Install torch, "
            "then run `pip install --no-build-isolation .` (DIA_KERNELS_BUILD=none builds without it)"
        )
    folder = Path(spec.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise fail(f"the torch in {folder} is too old: its headers hold no stable ABI; 2.10 or newer is needed")
    return folder


def cmake_options() -> dict[str, str]:
    torch = torch_folder()
    return {
        "CMAKE_MAKE_PROGRAM": str(program("ninja")),
        "TORCH_INCLUDE_DIR": str(torch / "include"),
        "TORCH_LIBRARY_DIR": str(torch / "lib"),
        "Python3_EXECUTABLE": sys.executable,
        "DIA_KERNELS_CUDA": "ON" if CUDA else "OFF",
        "DIA_KERNELS_CUDA_ARCHS": os.environ.get("DIA_KERNELS_CUDA_ARCHS", ""),
    }


def run_cmake(*arguments: str) -> None:
    # CMake reads CUDACXX when it first looks for nvcc; set as an option, a change of it would empty CMake's cache.
    environment = os.environ | ({"CUDACXX": str(nvcc())} if CUDA else {})
    try:
        subprocess.run([str(program("cmake")), *arguments], check=True, env=environment)
    except subprocess.CalledProcessError as error:
        raise fail(f"cmake failed with status {error.returncode}; its messages stand above") from error


class BuildNative(build_ext):
    """Builds the library under build/native, where a second build is incremental, and installs it from there."""

    def run(self) -> None:
        say_what_is_left_out()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        options = [f"-D{name}={value}" for name, value in cmake_options().items()]
        run_cmake("-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *options)
        run_cmake("--build", str(BUILD), "--parallel", str(len(os.sched_getaffinity(0))))
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        run_cmake("--install", str(BUILD), "--prefix", str(package))

    def get_ext_filename(self, fullname: str) -> str:
        """The library's own name: it belongs to no one Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_extensions_to_source(self) -> None:
        (ROOT / LIBRARY).parent.mkdir(exist_ok=True)
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib) / SCHEMAS), str(ROOT / SCHEMAS))


class BuildPython(build_py):
    """Copies the modules. Where no library is built, an editable install drops the one of an earlier build."""

    def run(self) -> None:
        if not NATIVE:
            say_what_is_left_out()
            if self.editable_mode:
                for library in (LIBRARY, SCHEMAS):
                    (ROOT / library).unlink(missing_ok=True)
        super().run()


class BuildWheel(bdist_wheel):
    """A wheel with the library is for one platform and for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[Extension(".".join(LIBRARY.with_suffix("").parts), sources=[])] if NATIVE else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "bdist_wheel": BuildWheel},
)
