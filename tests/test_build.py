"""What the build promises: a library free of Python and of one torch version, and four kinds of build.

The slow tests build wheels from a copy of the sources, and install a second torch under build/.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from dia_kernels import operators

ROOT = Path(__file__).parents[1]
LIBRARY = operators.LIBRARY_PATH
OTHER_TORCH = "2.13.0"

needs_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the native library is not built here: DIA_KERNELS_BUILD=none, or no compiler"
)


def run(command: list, **options) -> str:
    """Standard output and error of a command that must succeed."""
    result = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=options.pop("cwd", "/"), **options
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def run_python(code: str, package_folder: Path, python: Path | str = sys.executable) -> str:
    """What ``code`` prints where ``dia_kernels`` is imported from ``package_folder``; a warning is an error."""
    environment = os.environ | {"PYTHONPATH": str(package_folder)}
    return run([python, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)], env=environment)


# --- the library file ------------------------------------------------------------------------------


def needed_libraries() -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run(["readelf", "--dynamic", "--wide", LIBRARY]))


def dynamic_symbols() -> list[tuple[str, str, str]]:
    """(binding, section index or UND, name with its version) of every dynamic symbol."""
    rows = [line.split() for line in run(["readelf", "--dyn-syms", "--wide", LIBRARY]).splitlines()]
    return [(row[4], row[6], row[7]) for row in rows if len(row) >= 8 and row[0].rstrip(":").isdigit()]


@needs_library
def test_the_library_depends_on_torch_and_on_no_python():
    needed = needed_libraries()
    # libtorch.so offers no symbol that is used, yet leads to libtorch_cuda.so where there is one.
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    allowed = r"libtorch|libtorch_cpu|libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(rf"({allowed})\.so(\.\d+)*", name)] == []


@needs_library
def test_the_library_uses_only_the_stable_interface_of_torch():
    undefined = [(binding, name) for binding, section, name in dynamic_symbols() if section == "UND"]
    of_torch = [name for _, name in undefined if name.startswith(("torch_", "aoti_torch_"))]
    assert "torch_library_impl" in of_torch
    # Everything else carries the version of the C or C++ runtime, or is a weak hook of the tool chain.
    others = [
        name
        for binding, name in undefined
        if name not in of_torch
        and not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)
        and not (binding == "WEAK" and name.startswith(("_ITM_", "__gmon_start__")))
    ]
    assert others == []


@needs_library
def test_the_library_exports_what_python_calls_and_no_more():
    exported = [name for binding, section, name in dynamic_symbols() if section != "UND" and binding == "GLOBAL"]
    assert sorted(exported) == ["dia_kernels_build_info", "dia_kernels_gpus", "dia_kernels_plan"]


@needs_library
def test_the_library_holds_no_path_of_the_machine_that_built_it():
    assert not re.search(r"\((RPATH|RUNPATH)\)", run(["readelf", "--dynamic", "--wide", LIBRARY]))
    assert str(ROOT).encode() not in LIBRARY.read_bytes()


@needs_library
def test_build_info_is_json():
    function = ctypes.CDLL(str(LIBRARY)).dia_kernels_build_info
    function.restype = ctypes.c_char_p
    info = json.loads(function())
    assert info["torch_target"] == "2.10"
    assert info["compiler"]
    assert info["instruction_set_in_use"] in info["instruction_sets"]
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
    # The symbol of the current stream is found where torch has CUDA, through the dependency on libtorch alone.
    assert info["torch_has_cuda"] == (None if info["cuda"] is None else torch.backends.cuda.is_built())


# --- a package without the library -----------------------------------------------------------------

STEP_OF_THE_REFERENCE = """
    import torch, dia_kernels
    from dia_kernels import operators
    attention = dia_kernels.SharedAttention(8)
    y, state = attention(torch.ones(2, 8, 3, 3))
    assert y.shape == (2, 8, 3, 3)
    print(dia_kernels.__file__)
    print(operators.library_error)
"""


def copy_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "dia_kernels", folder / "dia_kernels", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return folder


def test_a_package_without_the_library_runs_the_reference_and_says_why(tmp_path):
    file, reason = run_python(STEP_OF_THE_REFERENCE, copy_package(tmp_path)).splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert "not built" in reason


# --- the four kinds of build -----------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what a build reads."""
    folder = copy_package(tmp_path / "sources")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


def build_wheel(sources: Path, mode: str | None, path: str | None = None) -> tuple[int, str]:
    """Exit status and output of building a wheel into ``sources/wheels``, on PATH ``path`` if given."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CUDACXX", "CUDA_HOME")}
    environment["DIA_KERNELS_CUDA_ARCHS"] = "90"
    environment.pop("DIA_KERNELS_BUILD", None)
    if mode is not None:
        environment["DIA_KERNELS_BUILD"] = mode
    if path is not None:
        environment["PATH"] = path
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps"]
    result = subprocess.run(
        [*command, "--wheel-dir", sources / "wheels", sources],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=sources,
    )
    return result.returncode, result.stdout


def install(sources: Path) -> tuple[Path, str]:
    """(folder of the installed package, tag of its wheel)."""
    (wheel,) = (sources / "wheels").glob("*.whl")
    folder = sources / "installed"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel])
    return folder, wheel.stem.split("-", 2)[2]


def path_without(folder: Path, *programs: str) -> str:
    """A PATH in one new folder that links to every program on PATH but those whose names match."""
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            link = folder / program.name
            if not any(re.fullmatch(pattern, program.name) for pattern in programs) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


def left_out(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if "left out" in line]


def check_is_pure(sources: Path) -> None:
    folder, tag = install(sources)
    assert tag == "py3-none-any"
    file, reason = run_python(STEP_OF_THE_REFERENCE, folder).splitlines()
    assert Path(file).is_relative_to(folder)
    assert "not built" in reason


@pytest.mark.slow
def test_build_none_is_pure_python(sources):
    status, output = build_wheel(sources, "none")
    assert status == 0, output
    assert left_out(output) == []
    check_is_pure(sources)


@pytest.mark.slow
def test_build_auto_without_a_compiler_is_pure_python_and_says_so_in_one_line(sources, tmp_path):
    compilers = (r".*c\+\+.*", r".*g\+\+.*", r".*clang.*")
    status, output = build_wheel(sources, None, path_without(tmp_path / "bin", *compilers))
    assert status == 0, output
    (line,) = left_out(output)
    assert "no C++ compiler found" in line
    check_is_pure(sources)


@pytest.mark.slow
@needs_library
def test_build_cpu_is_a_wheel_for_every_python(sources):
    status, output = build_wheel(sources, "cpu")
    assert status == 0, output
    assert left_out(output) == []
    folder, tag = install(sources)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert tag == f"py3-none-{platform}"
    (wheel,) = (sources / "wheels").glob("*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert libraries == ["dia_kernels/lib/libdia_kernels.so"]
    *_, reason = run_python(STEP_OF_THE_REFERENCE, folder).splitlines()
    assert reason == "None"


@pytest.mark.slow
def test_build_cuda_without_nvcc_is_an_error(sources, tmp_path):
    status, output = build_wheel(sources, "cuda", path_without(tmp_path / "bin", "nvcc"))
    assert status != 0
    assert "DIA_KERNELS_BUILD=cuda: nvcc not found" in output
    assert "Traceback" not in output.split("dia_kernels: DIA_KERNELS_BUILD")[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: the CUDA side cannot be compiled")
def test_build_cuda_compiles_for_the_architectures_asked_for(sources):
    status, output = build_wheel(sources, "cuda")
    assert status == 0, output
    folder, _ = install(sources)
    code = """
        import ctypes, torch
        from dia_kernels import operators
        function = ctypes.CDLL(str(operators.LIBRARY_PATH)).dia_kernels_build_info
        function.restype = ctypes.c_char_p
        print(function().decode())
    """
    info = json.loads(run_python(code, folder))
    assert info["cuda"] is not None
    assert info["cuda_architectures"] == ["90"]


@pytest.mark.parametrize(
    ("mode", "message"),
    [("gpu", "DIA_KERNELS_BUILD: expected auto, cpu, cuda or none, got 'gpu'")],
)
def test_an_unknown_kind_of_build_is_an_error(mode, message):
    result = subprocess.run(
        [sys.executable, ROOT / "setup.py", "--version"],
        env=os.environ | {"DIA_KERNELS_BUILD": mode},
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert result.returncode == 1
    assert result.stderr.strip() == f"dia_kernels: {message}"


# --- another torch ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_python() -> Path:
    """The Python of an environment with another torch, made once under build/."""
    folder = ROOT / "build" / f"torch-{OTHER_TORCH}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        run([sys.executable, "-m", "venv", "--clear", folder])
        run([python, "-m", "pip", "install", "--quiet", f"torch=={OTHER_TORCH}", "numpy"])
        complete.touch()
    return python


@pytest.mark.slow
@needs_library
def test_the_same_library_runs_in_another_torch(other_python):
    code = f"""
        import torch
        import dia_kernels
        from dia_kernels import functional, operators

        assert torch.__version__.startswith({OTHER_TORCH!r}), torch.__version__
        assert operators.library_error is None, operators.library_error
        assert str(operators.LIBRARY_PATH) == {str(LIBRARY)!r}
        for operator in ("step", "step_", "step_backward", "pool", "rescale", "rescale_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key("dia_kernels::" + operator, "CPU"), operator

        def results(backend, dtype):
            # Outputs, and gradients of every input, in float64.
            torch.manual_seed(0)
            attention = dia_kernels.SharedAttention(32, backend=backend).to(dtype)
            x, shortcut = torch.randn(2, 4, 32, 7, 7, dtype=torch.float64).to(torch.float32).to(dtype).unbind()
            leaves = [x.requires_grad_(), shortcut.requires_grad_(), *attention.parameters()]
            y, state = attention(x, shortcut=shortcut, activation="relu")
            y, state = attention(y, state)
            loss = y.square().sum() + sum(part.square().sum() for part in state)
            return [t.double() for t in (y, *state, *torch.autograd.grad(loss, leaves))]

        # The contract of accuracy: at most twice eager PyTorch's error, and one ulp of the largest value.
        ours, eager = results("cpu", torch.float32), results("reference", torch.float32)
        truth = results("reference", torch.float64)
        for k, (a, b, t) in enumerate(zip(ours, eager, truth, strict=True)):
            scale = t.abs().max()
            bound = 2 * (b - t).abs().max() + torch.finfo(torch.float32).eps * scale
            assert (a - t).abs().max() <= bound, (k, float((a - t).abs().max() / scale), float(bound / scale))
        print("agrees in", len(ours), "tensors")
    """
    assert run_python(code, ROOT, other_python).endswith("agrees in 13 tensors\n")
