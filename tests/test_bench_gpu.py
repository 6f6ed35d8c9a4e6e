"""bench/gpu.py and bench/gpu_check.sh, as far as they go without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dia_kernels import backends, plan

ROOT = Path(__file__).parents[1]
BENCH_MODULE = "gpu"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpu(bench_module):
    return bench_module


@pytest.mark.skipif(backends.missing("cpu") is not None, reason=f"{backends.missing('cpu')}")
def test_parts_and_report(gpu, tmp_path, capsys):
    for part in ("small", "times", "cells", "nets"):
        assert gpu.main([part, "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (tmp_path / "tests.log").write_text("one\ntwo\nthree\n4 passed in 1 s\n")
    assert gpu.main(["report", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for part in (
        "## times",
        "## cells",
        "tail with cbam",
        "## nets",
        "## tests",
        "4 passed in 1 s",
        "of copy",
        "ours, sweeps",
        "ours / plain",
    ):
        assert part in text
    (result, *_) = json.loads((tmp_path / "report.json").read_text())["times"]["results"]
    assert result["wrong"] is None
    assert set(result["seconds"]) == {"forward", "forward + backward"}
    assert {"plain", "eager", "ours, any"} <= result["seconds"]["forward"]["median"].keys()


def test_what_is_wrong_is_not_timed(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Problem, "breach", lambda _: "y: wrong on purpose")
    assert gpu.main(["times", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert "failed: y: wrong on purpose" in gpu.report(tmp_path)


def test_one_failure_leaves_the_rest(gpu, tmp_path, monkeypatch):
    time_case = gpu.time_case

    def failing(case, **rest):
        if case.tail:
            raise RuntimeError("out of memory")
        return time_case(case, **rest)

    monkeypatch.setattr(gpu, "time_case", failing)
    assert gpu.main(["times", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    text = gpu.report(tmp_path)
    assert text.count("failed: RuntimeError: out of memory") == 2
    assert text.count("| step 2x8x8") == 8  # two layouts, in two modes with two clocks


class Subject(NamedTuple):
    name: str


def process_of(subject: Subject) -> dict:
    if "spoils the device" in subject.name:
        raise RuntimeError("an illegal memory access")
    return {"name": subject.name, "process": os.getpid(), "seconds": {}, "peak_bytes": {}}


def test_a_spoilt_device_leaves_the_rest(gpu, tmp_path, monkeypatch):
    """What comes after runs in processes of its own."""
    monkeypatch.setattr(gpu, "alive", lambda _: False)
    subjects = [
        Subject(name) for name in ("before", "spoils the device", "after", "spoils the device too", "after that")
    ]
    assert not gpu.Part("nets", tmp_path, "cpu", 100).run(subjects, process_of)
    before, spoilt, after, spoilt_too, after_that = json.loads((tmp_path / "nets.json").read_text())["results"]
    assert before["process"] == os.getpid()
    for result in (spoilt, spoilt_too):
        assert "an illegal memory access" in result["error"]
    assert len({os.getpid(), after["process"], after_that["process"]}) == 3


def test_what_there_is_no_time_for_is_left_out(gpu, tmp_path):
    assert gpu.main(["times", "--device", "cpu", "--quick", "--seconds", "-1", "--out", str(tmp_path)]) == 0
    assert gpu.report(tmp_path).count("was left out: no time was left") == 4


@pytest.mark.skipif(backends.missing("cpu") is not None, reason=f"{backends.missing('cpu')}")
def test_predictions_are_those_of_the_card(gpu):
    case = gpu.Case(256, 256, 56, 4, True, "bfloat16", tail=True)
    of_h100 = gpu.predicted(case, "NVIDIA H100 80GB HBM3")
    for kind in plan.LAYOUTS:
        assert 0 < of_h100["forward"][kind] < of_h100["forward + backward"][kind]
    assert of_h100 != gpu.predicted(case, "NVIDIA A100-SXM4-40GB")
    assert gpu.predicted(case, "an abacus") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["small"])
    assert "--device cuda: " in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [(["--part", "dance"], "no part 'dance'"), (["--fast"], "usage: ")])
def test_the_script_names_a_wrong_argument(arguments, message, tmp_path):
    command = ["bash", ROOT / "bench" / "gpu_check.sh", *arguments]
    finished = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert finished.returncode == 2
    assert message in finished.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_suite_refuses_a_device_that_is_not_there():
    suite = ROOT / "bench" / "test_step_bench.py"
    command = [sys.executable, "-m", "pytest", suite, "--device", "cuda", "-p", "no:cacheprovider"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: " in finished.stderr
