"""Options of the benchmark suite, the cases they choose, and the file that the suite leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import environment
import pytest
import step
import torch

from dia_kernels import backends

#: A case and a mode.
Subject = tuple[step.Case, str]
COMPARISONS = pytest.StashKey[dict[Subject, step.Comparison]]()

#: Seconds to sample one case in one mode.
BUDGET, QUICK_BUDGET = 6.0, 1.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("step", "benchmark of the attention step")
    group.addoption("--dtype", choices=list(step.DTYPES), default="float32", help="of the maps and the parameters")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the step runs (default: cpu)")
    group.addoption("--threads", type=int, help="threads of PyTorch (default: as many as it takes by itself)")
    group.addoption("--shapes", help="comma-separated, as in 32x256x56x56,1x64x32x32 (default: all ten)")
    group.addoption("--layouts", help="comma-separated out of contiguous,channels_last (default: both)")
    group.addoption("--without", default="", help="comma-separated implementations to leave out, as in compile")
    group.addoption("--quick", action="store_true", help="two small shapes, one layout, fewer rounds: a trial run")
    group.addoption("--results", type=Path, help="write samples and environment to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COMPARISONS] = {}
    missing = backends.missing(config.option.device)
    if config.option.device != "cpu" and missing is not None:
        raise pytest.UsageError(f"--device {config.option.device}: {missing}")
    if config.option.threads is not None:
        torch.set_num_threads(config.option.threads)


def listed(text: str | None) -> tuple[str, ...]:
    return tuple(part for part in (text or "").split(",") if part)


def chosen_cases(config: pytest.Config) -> list[step.Case]:
    """The cases that the options ask for."""
    option = config.option
    shapes = tuple(map(step.Shape.parse, listed(option.shapes))) or (step.QUICK_SHAPES if option.quick else step.SHAPES)
    layouts = listed(option.layouts) or (("contiguous",) if option.quick else tuple(step.LAYOUTS))
    return [step.Case(shape, layout, option.dtype, option.device) for layout in layouts for shape in shapes]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case, mode and implementation."""
    without = listed(metafunc.config.option.without)
    rows = [
        pytest.param((case, mode), name, id=f"{mode}-{case.shape}-{case.layout}-{case.dtype}-{name}")
        for case in chosen_cases(metafunc.config)
        for mode, names in step.IMPLEMENTATIONS.items()
        for name in names
        if name not in without
    ]
    metafunc.parametrize(("comparison", "implementation"), rows, indirect=["comparison"])


@pytest.fixture
def comparison(request: pytest.FixtureRequest) -> step.Comparison:
    """A case in a mode, measured when the first of its implementations asks."""
    config, subject = request.config, request.param
    done = config.stash[COMPARISONS]
    if subject not in done:
        budget = QUICK_BUDGET if config.option.quick else BUDGET
        done[subject] = step.compare(*subject, without=listed(config.option.without), budget=budget)
    return done[subject]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes what was measured, also where the session was cut short."""
    path = session.config.option.results
    if path is not None:
        # One comparison a line: a reader can find a shape, and a diff shows which have changed.
        rows = ",\n".join(json.dumps(measured.record()) for measured in session.config.stash[COMPARISONS].values())
        path.parent.mkdir(parents=True, exist_ok=True)
        where = json.dumps(environment.describe(session.config.option.device))
        path.write_text(f'{{"environment": {where},\n"results": [\n{rows}\n]}}\n')
