"""What the build promises: a library free of Python and of one torch version, and four kinds of build.

The slow tests build wheels from a copy of the sources.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from builds import (
    LIBRARIES,
    ROOT,
    build_environment,
    copy_package,
    copy_sources,
    made_once,
    needs_library,
    needs_nvcc,
    path_without,
    run,
    run_python,
)

from dia_kernels import operators

LIBRARY = operators.LIBRARY_PATH

# --- the tests' own builds -------------------------------------------------------------------------


def test_what_several_processes_of_the_tests_need_is_made_by_one_of_them(tmp_path):
    """Threads for processes: each opens the lock's file by itself."""
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.1)
        (folder / "whole").touch()

    def need(_: int) -> bool:
        return (made_once(tmp_path / "made", make) / "whole").exists()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(need, range(4)))
    assert len(made) == 1


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


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False], ids=["library", "no_library"])
def test_trial_03_import_and_reference_work_without_triton_and_without_the_library(tmp_path, library):
    code = """
        import sys
        sys.modules["triton"] = None  # as if it were not installed: it is found nowhere, and an import of it fails
        import torch, dia_kernels
        from dia_kernels import backends, operators
        assert backends.missing("triton").startswith("Triton is not installed")
        for backend in ("reference", None):
            attention = dia_kernels.SharedAttention(8, backend=backend)
            x = torch.ones(2, 8, 3, 3, requires_grad=True)
            y, (h, c) = attention(x, shortcut=x, activation="relu")
            assert torch.equal(y, torch.relu(x * h[:, :, None, None] + x))
            y.sum().backward()
            assert all(p.grad is not None for p in (x, *attention.parameters()))
        print(operators.library_error)
    """
    reason = run_python(code, ROOT if library else copy_package(tmp_path))
    assert reason == "None\n" if library else "not built" in reason


# --- a package in use ------------------------------------------------------------------------------

#: Twenty steps, forward and backward, each of another shape, after a first one.
TWENTY_SHAPES = """
    import dia_kernels
    def step(channels, size, layout):
        attention, norm = dia_kernels.SharedAttention(channels), torch.nn.BatchNorm2d(channels)
        x = torch.randn(2, channels, size, size).contiguous(memory_format=layout).requires_grad_()
        attention(x, shortcut=x, activation="relu")[0].sum().backward()
        attention(x, shortcut=x, activation="relu", norm=norm)[0].sum().backward()
    step(4, 2, torch.contiguous_format)
    before = mapped_files()
    for k in range(20):
        step(5 + k, 1 + k % 7, (torch.contiguous_format, torch.channels_last)[k % 2])
    assert mapped_files() == before
"""


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False], ids=["library", "no_library"])
def test_trial_04_use_starts_no_process_and_twenty_shapes_compile_nothing(tmp_path, library):
    """Every way of Python's to start a process is watched, and no file is written where compilers keep theirs."""
    package = ROOT if library else copy_package(tmp_path / "package")
    home = tmp_path / "home"
    home.mkdir()
    watch = """
        import sys, torch  # torch asks ldconfig for libraries
        started = []
        def watch(event, arguments):
            if event in ("subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn"):
                started.append((event, arguments))
        sys.addaudithook(watch)
        def mapped_files():
            return {line.split(maxsplit=5)[-1] for line in open("/proc/self/maps") if ".so" in line}
    """
    places = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
    code = dedent(watch) + dedent(TWENTY_SHAPES) + "print(started)\n"
    environment = os.environ | dict.fromkeys(places, str(home))
    assert run_python(code, package, env=environment) == "[]\n"
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False], ids=["library", "no_library"])
def test_the_library_is_loaded_from_the_packages_own_folder_only(tmp_path, library):
    """Another of its name lies in the working directory, and another is the first that the loader would find."""
    package = ROOT if library else copy_package(tmp_path / "package")
    decoys = tmp_path / "decoys"
    decoys.mkdir()
    shutil.copy(torch._C.__file__, decoys / LIBRARY.name)
    code = """
        import re, torch, dia_kernels
        dia_kernels.SharedAttention(8)(torch.ones(2, 8, 3, 3))
        print(*sorted(set(re.findall(r"/\\S*libdia_kernels\\.so", open("/proc/self/maps").read()))))
    """
    environment = os.environ | {"LD_LIBRARY_PATH": str(decoys)}
    assert run_python(code, package, env=environment, cwd=decoys) == f"{LIBRARY if library else ''}\n"


# --- the four kinds of build -----------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path) -> Path:
    return copy_sources(tmp_path / "sources")


def build_wheel(sources: Path, mode: str | None, path: str | None = None) -> tuple[int, str]:
    """Exit status and output of building a wheel into ``sources/wheels``, on PATH ``path`` if given."""
    environment = build_environment(DIA_KERNELS_CUDA_ARCHS="90")
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


def check_is_for_the_cpu(sources: Path) -> None:
    folder, tag = install(sources)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert tag == f"py3-none-{platform}"
    (wheel,) = (sources / "wheels").glob("*.whl")
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")} == LIBRARIES
    *_, reason = run_python(STEP_OF_THE_REFERENCE, folder).splitlines()
    assert reason == "None"


@pytest.mark.parametrize(("missing", "mode"), [("cmake", None), ("ninja", None), ("ninja", "cpu")])
def test_a_compiler_without_its_tools_is_an_error_that_tells_what_to_install(missing, mode, tmp_path):
    """Nobody who has a compiler wants the slow reference unawares: pip shows nothing of what a build says."""
    elsewhere = "import runpy, sysconfig; sysconfig.get_path = lambda *_, **__: '/nowhere'; runpy.run_path('setup.py')"
    (tmp_path / "bin").mkdir()
    for name in {"c++", "cmake", "ninja"} - {missing}:
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIA_KERNELS_")}
    environment |= {"PATH": str(tmp_path / "bin")} | ({} if mode is None else {"DIA_KERNELS_BUILD": mode})
    result = subprocess.run(
        [sys.executable, "-c", elsewhere], env=environment, text=True, capture_output=True, cwd=ROOT
    )
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"dia_kernels: DIA_KERNELS_BUILD={mode or 'auto'}: {missing} not found; `pip install cmake ninja` brings both, "
        "DIA_KERNELS_BUILD=none does without the native kernels"
    )


@pytest.mark.slow
@needs_library
def test_build_cpu_is_a_wheel_for_every_python(sources):
    status, output = build_wheel(sources, "cpu")
    assert status == 0, output
    assert left_out(output) == []
    check_is_for_the_cpu(sources)


@pytest.mark.slow
@needs_library
def test_trial_01_without_nvcc_the_build_makes_the_cpu_library_and_says_so_in_one_line(sources, tmp_path):
    status, output = build_wheel(sources, None, path_without(tmp_path / "bin", "nvcc"))
    assert status == 0, output
    assert left_out(output) == ["dia_kernels: left out: the CUDA kernels (nvcc not found)"]
    check_is_for_the_cpu(sources)


@pytest.mark.slow
def test_build_cuda_without_nvcc_is_an_error(sources, tmp_path):
    status, output = build_wheel(sources, "cuda", path_without(tmp_path / "bin", "nvcc"))
    assert status != 0
    assert "DIA_KERNELS_BUILD=cuda: nvcc not found" in output
    assert "Traceback" not in output.split("dia_kernels: DIA_KERNELS_BUILD")[0]


@pytest.mark.slow
@needs_nvcc
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
