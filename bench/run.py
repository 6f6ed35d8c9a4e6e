"""Runs the benchmark of the attention step and writes its JSON, Markdown table and plot.

    python bench/run.py                      all shapes, both layouts, float32 (under 15 minutes on two cores)
    python bench/run.py --quick              a trial in under a minute
    python bench/run.py --dtype bfloat16 --threads 1 --shapes 32x256x56x56,1x64x32x32 --without compile

Exit status 1 if a fused implementation is wrong or failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import report

BENCH = Path(__file__).resolve().parent

#: Options that the suite takes as they are (see conftest.py), and that make a run cover less than all.
PASSED_ON = ("dtype", "device", "threads", "shapes", "layouts", "without")
NARROWING = ("shapes", "layouts", "without")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark of the attention step.")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the step runs (default: cpu)")
    parser.add_argument("--threads", help="threads of PyTorch (default: as many as it takes by itself)")
    parser.add_argument("--shapes", help="comma-separated, as in 32x256x56x56,1x64x32x32 (default: all ten)")
    parser.add_argument("--layouts", help="comma-separated out of contiguous,channels_last (default: both)")
    parser.add_argument("--without", help="comma-separated implementations to leave out, as in compile")
    parser.add_argument("--quick", action="store_true", help="two small shapes, one layout, fewer rounds")
    parser.add_argument("--name", help="stem of the three files (default: from the options)")
    parser.add_argument("--output", type=Path, default=BENCH / "results", help="folder of the three files")
    return parser.parse_args(arguments)


def default_name(options: argparse.Namespace) -> str:
    """A stem under which no smaller run overwrites a full one."""
    threads = f"-{options.threads}threads" if options.threads else ""
    narrowed = "-part" if any(getattr(options, name) for name in NARROWING) else ""
    device = "" if options.device == "cpu" else f"-{options.device}"
    return f"step-{options.dtype}{device}{threads}{narrowed}" + ("-quick" if options.quick else "")


def suite_arguments(options: argparse.Namespace, results: Path) -> list[str]:
    chosen = [f"--{name}={getattr(options, name)}" for name in PASSED_ON if getattr(options, name)]
    if options.quick:
        chosen.append("--quick")
    look = ["-p", "no:cacheprovider", "--benchmark-columns=median,iqr,rounds", "--benchmark-group-by=group"]
    return [str(BENCH / "test_step_bench.py"), f"--results={results}", *chosen, *look]


def write_reports(document: dict, folder: Path, name: str) -> None:
    plot = folder / f"{name}.png"
    report.draw(document, plot)
    (folder / f"{name}.md").write_text(report.markdown(document, plot.name), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    name = options.name or default_name(options)
    results = options.output.resolve() / f"{name}.json"
    status = pytest.main(suite_arguments(options, results))
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    document = json.loads(results.read_text())
    if not document["results"]:
        return int(status)
    write_reports(document, results.parent, name)
    print(f"\n{report.summary(document)}\n\nWritten: {name}.json, {name}.md and {name}.png in {results.parent}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
