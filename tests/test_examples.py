"""Each script in ``examples/`` runs as a reader would run it, and says that it worked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dia_kernels

EXAMPLES = Path(__file__).parents[1] / "examples"
# The last word of each script, which it reaches only if its own checks hold.
PRINTED = {"own_block.py": "one training step: loss"}


def test_every_example_is_tried():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("script", PRINTED)
def test_example_runs(script, tmp_path):
    package_root = Path(dia_kernels.__file__).parents[1]
    finished = subprocess.run(
        [sys.executable, EXAMPLES / script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert PRINTED[script] in finished.stdout.splitlines()[-1]
