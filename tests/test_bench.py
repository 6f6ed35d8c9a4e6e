"""The benchmark: its report, its yardsticks, and a whole run at a tiny shape, right and wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dia_kernels import SharedAttention, reference

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def load(name: str) -> ModuleType:
    """A module of bench/, which is no package, under a name that meets no other."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


report, contract, unfused = load("report"), load("contract"), load("unfused")


def result(shape: tuple[int, ...], seconds: dict[str, list[float]], **changes) -> dict:
    """One entry of the JSON, a forward case in float32 unless ``changes`` say otherwise."""
    return {
        "mode": "forward",
        "shape": list(shape),
        "layout": "contiguous",
        "dtype": "float32",
        "reduction": 4,
        "map_bytes": 4 * math.prod(shape),
        "ideal_maps": 3,
        "in_targets": True,
        "seconds": seconds,
        "host_seconds": {},
        "wrong": {},
    } | changes


def document(*results: dict) -> dict:
    environment = {
        "date": "2030-01-02",
        "device": "cpu",
        "processor": "Some Processor",
        "vector_instructions": "AVX2",
        "cores": 2,
        "threads": 2,
        "system": "Linux x86_64",
        "python": "3.11.0",
        "torch": "2.14.1",
        "dia_kernels": "0.1.0",
        "backend": "cpu",
    }
    return {"environment": environment, "results": list(results)}


def times(eager: float, fused: float, copy: float = 0.001) -> dict[str, list[float]]:
    return {"copy": [copy] * 3, "eager": [eager] * 3, "fused": [fused] * 3}


# --- the report ------------------------------------------------------------------------------------


def test_speedup_is_the_median_of_the_ratios_of_rounds():
    # The machine was ten times slower in the last round: that round's ratio is as good as any other.
    seconds = {"eager": [2.0, 4.0, 60.0], "fused": [1.0, 1.0, 20.0]}
    assert report.speedup(result((1, 1, 1, 1), seconds), "fused", "eager") == 3.0


def test_traffic_is_ideal_bytes_over_time():
    one = result((1, 250, 1000, 1000), times(eager=4.0, fused=1.5, copy=1.0))
    assert report.gigabytes_per_second(one, "fused") == pytest.approx(3 * 1.0 / 1.5)
    # A copy of 1 GB in 1 s moves 2 GB/s, and so does the step.
    assert report.share_of_copy(one, "fused") == pytest.approx(1.0)


def test_geometric_mean_covers_the_target_shapes_only():
    results = [
        result((2, 4, 8, 8), times(eager=8.0, fused=1.0)),
        result((2, 4, 4, 4), times(eager=2.0, fused=1.0)),
        result((9, 4, 4, 4), times(eager=99.0, fused=1.0), in_targets=False),
        result((2, 4, 4, 4), times(eager=99.0, fused=1.0), mode="training"),
        result((2, 4, 4, 4), times(eager=99.0, fused=1.0), layout="channels_last"),
    ]
    mean, covered, ran = report.geometric_mean(results, report.TARGETS[0], "contiguous")
    assert mean == pytest.approx(4.0)
    assert (covered, ran) == (2, 2)


def test_in_place_target_counts_maps_over_32_megabytes_only():
    target = next(target for target in report.TARGETS if target.view.ours == "fused_inplace")
    over, under = (32, 512, 28, 28), (32, 1024, 14, 14)
    seconds = {"eager": [5.0], "fused_inplace": [1.0]}, {"eager": [9.0], "fused_inplace": [1.0]}
    results = [result(over, seconds[0]), result(under, seconds[1])]
    mean, covered, ran = report.geometric_mean(results, target, "contiguous")
    assert mean == pytest.approx(5.0)
    assert (covered, ran) == (1, 1)


def test_targets_are_those_of_the_project():
    stated = {(t.view.mode, t.view.ours, t.peer): t.speedup for t in report.TARGETS}
    assert stated == {
        ("forward", "fused", "eager"): 1.8,
        ("forward", "fused", "compile"): 1.2,
        ("training", "fused", "eager"): 2.5,
        ("training", "fused", "compile"): 3.0,
        ("forward", "fused_inplace", "eager"): 3.0,
    }


def test_markdown_holds_times_ratios_and_targets():
    text = report.markdown(document(result((32, 16, 8, 8), times(eager=0.005, fused=0.002))), "plot.png")
    assert "| 32x16x8² | 5.00 ms | 2.00 ms | 2.50 | 0.2 | 75% |" in text
    assert "| Forward, no gradients, against eager | 1.8 | 2.50 reached (1 of 1) |" in text
    assert "| Forward, no gradients, against torch.compile | 1.2 | - |" in text
    assert "2030-01-02, Some Processor (2 cores, AVX2), 2 threads" in text
    assert "![Speed-up of the fused step](plot.png)" in text


def test_a_target_that_is_missed_says_so():
    text = report.summary(document(result((2, 4, 4, 4), times(eager=1.5, fused=1.0))))
    assert "| Forward, no gradients, against eager | 1.8 | 1.50 missed (1 of 1) |" in text
    assert "Slower than eager:\nnothing." in text


def test_a_result_slower_than_eager_is_named():
    text = report.summary(document(result((2, 4, 4, 4), times(eager=1.0, fused=2.0))))
    assert "* Forward, no gradients, 2x4x4², contiguous: 0.50x" in text


def test_a_wrong_result_has_no_time_and_no_part_in_the_mean():
    wrong = result((2, 4, 4, 4), {"eager": [0.005]}, wrong={"fused": "y: error 1, at most 0 allowed"})
    right = result((2, 4, 8, 8), times(eager=0.006, fused=0.002))
    text = report.markdown(document(wrong, right), "plot.png")
    assert "| 2x4x4² | 5.00 ms | wrong | wrong | wrong | wrong |" in text
    assert "3.00 reached (1 of 2)" in text
    assert "* ours, forward, 2x4x4², contiguous: y: error 1, at most 0 allowed" in text


def test_host_microseconds_stand_beside_those_of_the_call():
    one = result((1, 4, 4, 4), times(eager=50e-6, fused=20e-6), host_seconds={"eager": [40e-6], "fused": [5e-6]})
    text = report.markdown(document(one), "plot.png")
    assert "| 1x4x4² forward | 50.0 (40.0) | 20.0 (5.00) |" in text


@pytest.mark.parametrize(("seconds", "text"), [(1.2345, "1234 ms"), (0.0105, "10.5 ms"), (9.87e-6, "9.87 µs")])
def test_durations_have_three_digits(seconds, text):
    assert report.duration(seconds) == text


def test_plot_is_written(tmp_path):
    right = result((2, 4, 8, 8), times(eager=3.0, fused=1.0))
    wrong = result((2, 4, 4, 4), {"eager": [1.0]}, wrong={"fused": "y: error 1, at most 0 allowed"})
    report.draw(document(right, wrong), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- the yardsticks --------------------------------------------------------------------------------


def test_eager_peer_is_the_same_step_as_the_reference():
    torch.manual_seed(0)
    eager = unfused.EagerAttention(12, 4).double()
    ours = SharedAttention(12, 4, dtype=torch.float64)
    ours.load_state_dict({name.replace(".", "_"): value for name, value in eager.state_dict().items()})
    x, shortcut = torch.randn(2, 3, 12, 5, 5, dtype=torch.float64)
    h, c = torch.rand(2, 3, 12, dtype=torch.float64)
    with torch.no_grad():
        y, state = eager(x, (h, c), shortcut)
        expected = reference.step(x, shortcut, h, c, ours.lstm_parameters(), 1, True, "sigmoid")
        in_place, _ = eager.forward_inplace(x.clone(), (h, c), shortcut)
    longest_sum = 4 * 12
    for found, true in zip((y, *state), expected, strict=True):
        assert contract.error(found, true) <= 4 * math.sqrt(longest_sum) * contract.ulp(true, torch.float64)
    assert torch.equal(in_place, y)


def accuracy(ours: float, eager: float, dtype: torch.dtype = torch.float32) -> str | None:
    """The verdict on a result that is off by so many ulp of its largest value, which is 1."""
    truth = torch.tensor([0.25, 1.0], dtype=torch.float64)
    ulp = torch.finfo(dtype).eps
    off = torch.tensor([1.0, 0.0], dtype=torch.float64)
    record = contract.Accuracy(dtype, longest_sum=4)
    record.add({"y": truth + ours * ulp * off}, {"y": truth + eager * ulp * off}, {"y": truth})
    return record.breach()


@pytest.mark.parametrize("eager", [0.0, 1.5])
def test_twice_the_error_of_eager_and_one_ulp_are_allowed(eager, monkeypatch):
    monkeypatch.setattr(contract, "ulp", lambda truth, dtype: torch.finfo(torch.float32).eps)
    assert accuracy(2 * eager + 1.0, eager) is None
    assert "y: error" in accuracy(2 * eager + 1.25, eager)


def test_float64_is_held_to_the_length_of_its_sums():
    # 4 sqrt(4) = 8 ulp, however far off eager is.
    assert accuracy(8.0, 100.0, torch.float64) is None
    assert "y: error" in accuracy(8.5, 100.0, torch.float64)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_wrong(value):
    assert "y: error inf" in accuracy(value, 0.0)
    assert "y: error inf" in accuracy(value, math.inf)


def test_a_zero_truth_allows_zero_only():
    zero = torch.zeros(2, dtype=torch.float64)
    assert contract.error(zero, zero) == 0.0
    assert contract.error(zero + 1e-30, zero) == math.inf


def test_shortcut_keeps_the_sum_clear_of_the_kink():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scaled = torch.randn(10_000, dtype=torch.float64)
        shortcut = torch.randn(10_000).to(dtype)
        moved = contract.away_from_kink(shortcut, scaled + shortcut.double())
        assert moved.dtype == dtype
        assert (scaled + moved.double()).abs().min() > 1e-3


# --- a whole run -----------------------------------------------------------------------------------

#: Runs bench/run.py, with a fused forward that is wrong by 1 % if ``wrong`` is true.
RUN = """
import sys
sys.path.insert(0, {bench!r})
from dia_kernels import operators
right = operators.native.step
def wrong(*arguments):
    y, *rest = right(*arguments)
    return y * 1.01, *rest
if {wrong!r}:
    operators.native.step = wrong
import run
sys.exit(run.main(sys.argv[1:]))
"""


def run_benchmark(folder: Path, *, wrong: bool) -> subprocess.CompletedProcess[str]:
    """A run at one tiny shape, whose files go to ``folder / "results"``."""
    program = RUN.format(bench=str(BENCH), wrong=wrong)
    options = ["--quick", "--without=compile", "--shapes=1x8x4x4", "--layouts=channels_last", "--name=tiny"]
    # pytest-benchmark times nothing where it takes itself for a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-c", program, *options, f"--output={folder / 'results'}"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.slow
def test_a_run_writes_samples_table_and_plot(tmp_path):
    finished = run_benchmark(tmp_path, wrong=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = tmp_path / "results"
    assert sorted(path.name for path in results.iterdir()) == ["tiny.json", "tiny.md", "tiny.png"]
    written = json.loads((results / "tiny.json").read_text())
    forward, training = written["results"]
    assert (forward["mode"], training["mode"]) == ("forward", "training")
    assert (forward["shape"], forward["layout"], forward["map_bytes"]) == ([1, 8, 4, 4], "channels_last", 512)
    assert set(forward["seconds"]) == {"copy", "plain", "eager", "fused", "eager_inplace", "fused_inplace"}
    assert set(training["seconds"]) == {"copy", "plain", "eager", "fused"}
    rounds = {len(samples) for samples in forward["seconds"].values()}
    assert len(rounds) == 1
    assert min(rounds) >= 9
    assert forward["wrong"] == training["wrong"] == {}
    assert written["environment"]["torch"] == torch.__version__
    assert "## Forward + backward, channels_last" in (results / "tiny.md").read_text(encoding="utf-8")
    # pytest-benchmark has got the samples: its own table shows them.
    assert "test_step[forward-1x8x4x4-channels_last-float32-fused]" in finished.stdout


@pytest.mark.slow
def test_a_wrong_kernel_reports_no_time(tmp_path):
    finished = run_benchmark(tmp_path, wrong=True)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    results = tmp_path / "results"
    for one in json.loads((results / "tiny.json").read_text())["results"]:
        assert set(one["wrong"]) == {"fused"}
        assert one["wrong"]["fused"].startswith("y: error")
        assert "fused" not in one["seconds"]
        assert "eager" in one["seconds"]
    assert "wrong | wrong" in (results / "tiny.md").read_text(encoding="utf-8")
    assert "* ours, training, 1x8x4², channels_last: y: error" in finished.stdout
