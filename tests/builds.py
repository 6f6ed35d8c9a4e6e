"""What tests of builds and wheels share: copies of the sources, child processes, environments with another torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from filelock import FileLock

from dia_kernels import operators

ROOT = Path(__file__).parents[1]
#: What a wheel holds that was compiled.
LIBRARIES = {f"dia_kernels/lib/lib{name}.so" for name in ("dia_kernels", "dia_kernels_schemas")}
#: Variables that choose what a build makes, and those by which a `make` around the tests would reach one within.
CHOICES = ("DIA_KERNELS_BUILD", "DIA_KERNELS_CUDA_ARCHS", "CXX", "CUDACXX", "CUDA_HOME", "MAKEFLAGS", "MAKELEVEL")

needs_library = pytest.mark.skipif(
    not operators.LIBRARY_PATH.exists(),
    reason="the native library is not built here: DIA_KERNELS_BUILD=none, or no compiler",
)
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not on PATH: the CUDA side cannot be compiled"
)


def run(command: list, **options) -> str:
    """Standard output and error of a command that must succeed."""
    result = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=options.pop("cwd", "/"), **options
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def run_python(code: str, package_folder: Path, python: Path | str = sys.executable, **options) -> str:
    """What ``code`` prints where ``dia_kernels`` is imported from ``package_folder``; a warning is an error."""
    environment = options.pop("env", dict(os.environ)) | {"PYTHONPATH": str(package_folder)}
    return run([python, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)], env=environment, **options)


def copy_package(folder: Path) -> Path:
    """``folder``, with a copy of the package in it that has no library."""
    shutil.copytree(ROOT / "dia_kernels", folder / "dia_kernels", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return folder


def copy_sources(folder: Path) -> Path:
    """``folder``, a copy of the source tree, tests and all, with nothing that was built."""
    built = shutil.ignore_patterns(".*", "build", "dist", "lib", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=built)
    return folder


def build_environment(**choices: str) -> dict[str, str]:
    """The environment of a build that is told ``choices`` and no others."""
    return {name: value for name, value in os.environ.items() if name not in CHOICES} | choices


def path_without(folder: Path, *programs: str) -> str:
    """A PATH in one new folder that links to every program on PATH but those whose names match."""
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            link = folder / program.name
            if not any(re.fullmatch(pattern, program.name) for pattern in programs) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """None of the other processes that run tests makes or changes ``folder`` meanwhile, if they ask likewise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def shared_temporary(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of all processes that run these tests."""
    temporary = factory.getbasetemp()
    return temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """``folder``, which ``make`` fills, once for all processes that run these tests."""
    complete = folder / "complete"
    with sole_use(folder):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder


# --- another torch -----------------------------------------------------------------------------------

#: The promised minimum, and one between it and the torch of these tests.
TORCHES = ("2.10.0", "2.13.0")


def torch_environment(version: str) -> Path:
    """An environment with another torch, made once under build/.

    Where only a CUDA build of that torch is to be had, NVIDIA's libraries, three times its size, stay out of it:
    stand-ins take their place (see ``_make_stand_ins``).
    """
    return made_once(ROOT / "build" / f"torch-{version}", partial(_install_torch, version))


def _install_torch(version: str, folder: Path) -> None:
    run([sys.executable, "-m", "venv", folder])
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    run([*pip, "--no-deps", f"torch=={version}"])
    needed = _requirements(site_packages(folder))
    run([*pip, "numpy", *(r for r in needed if not re.match("nvidia|cuda|triton", r))])
    run([*pip, "--constraint", ROOT / "constraints.txt", "pytest"])
    # Of NVIDIA's, the two small ones whose functions run when torch is imported, which newer ones ask of the toolkit.
    of_nvidia = [r for r in needed if re.match("nvidia-cuda-(runtime|cupti)", r)]
    of_nvidia += [re.sub(r"\[.*\]", "[cudart,cupti]", r) for r in needed if r.startswith("cuda-toolkit[")]
    if of_nvidia:
        run([*pip, *of_nvidia])
        _make_stand_ins(site_packages(folder))


def site_packages(environment: Path) -> Path:
    """Folder of the packages that are installed in an environment made with this Python."""
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _requirements(folder: Path) -> list[str]:
    """What the torch in ``folder`` needs on this machine, as pip is told it: without markers and extras."""
    (distribution,) = metadata.distributions(name="torch", path=[str(folder)])
    lines = [line for line in distribution.requires or () if "extra ==" not in line]
    return [line.partition(";")[0].strip() for line in lines]


def _make_stand_ins(folder: Path) -> None:
    """Gives the torch in ``folder`` a library in place of each of NVIDIA's that it links to and that is not there.

    Without a GPU nothing in them is called, but torch does not load without them. One library stands in for all; it has
    every function that torch refers to, under its version, and each returns an error.
    """
    own = list((folder / "torch" / "lib").glob("*.so*"))
    there = {path.name for path in (*own, *folder.glob("nvidia/*/lib/*"))}
    needed, functions = set(), defaultdict(set)
    for library in own:
        needed |= set(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv|nccl).+)\]", run(["readelf", "-dW", library])))
        symbols = run(["readelf", "--dyn-syms", "-W", library])
        for name, version in re.findall(r" UND ((?:cu|nv|nccl)\w+)@?(\S*)", symbols):
            functions[version or "unversioned"].add(name)
    stand_in, versions = own[0].with_name("stand_in.so"), folder / "stand_in.map"
    versions.write_text("".join(f"{v} {{ {'; '.join(sorted(names))}; }};\n" for v, names in functions.items()))
    source = "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(set().union(*functions.values())))
    compiler = ["cc", "-shared", "-w", "-x", "c", "-", "-o", stand_in, f"-Wl,--version-script={versions}"]
    run(compiler, input=source)
    for name in needed - there:
        stand_in.with_name(name).symlink_to(stand_in.name)
