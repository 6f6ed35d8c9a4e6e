"""What leans on the inside of torch, beside other versions of it: the compiler, autograd, transforms, checkpoints.

These modules of the suite run there as they are, from the sources; tests/test_wheel.py has what a user installs. Every
test here is slow: two more versions of torch are installed under build/.
"""

from __future__ import annotations

import pytest
from builds import ROOT, TORCHES, build_environment, needs_library, run, torch_environment

pytestmark = [pytest.mark.slow, needs_library]

MODULES = ("into", "compile", "autograd", "func", "memory", "operators")


@pytest.mark.parametrize("version", TORCHES)
def test_modules_of_the_suite_pass_beside_another_torch(version, tmp_path):
    files = [ROOT / "tests" / f"test_{module}.py" for module in MODULES]
    python = torch_environment(version) / "bin" / "python"
    command = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *files]
    own_files = {"PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    output = run(command, env=build_environment(PYTHONPATH=str(ROOT), **own_files))
    # Some have reasons of their own; but the library has to be there.
    assert not [line for line in output.splitlines() if line.startswith("SKIPPED") and "native" in line]
