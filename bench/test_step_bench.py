"""The pytest-benchmark suite of the attention step: one test for each case, mode and implementation.

pytest-benchmark times one function at a time, while times on a shared machine compare only if they are
taken in turns. So ``step.compare`` samples all implementations of a case interleaved, and each test
hands its samples to pytest-benchmark through a clock that replays them. The tables, ``--benchmark-json``
and ``--benchmark-compare`` work as usual. A fused implementation that is wrong fails and has no time.
"""

from __future__ import annotations

import pytest
from step import Comparison


class ReplayClock:
    """A clock that, read before and after each round, shows the given samples as those rounds' durations."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pending: list[float] = []

    def load(self, samples: list[float]) -> None:
        # Zeros stand between the samples: no time passes from one round's end to the next one's start.
        self.pending = [tick for sample in samples for tick in (0.0, sample)]

    def __call__(self) -> float:
        self.now += self.pending.pop(0)
        return self.now


clock = ReplayClock()


def nothing() -> None:
    """What pytest-benchmark calls while the clock replays."""


@pytest.mark.benchmark(timer=clock)
def test_step(comparison: Comparison, implementation: str, benchmark) -> None:
    if implementation in comparison.wrong:
        pytest.fail(f"{implementation} is wrong: {comparison.wrong[implementation]}", pytrace=False)
    case = comparison.case
    benchmark.group = f"{comparison.mode} {case.shape} {case.layout} {case.dtype}"
    samples = comparison.seconds[implementation]
    clock.load(samples)
    benchmark.pedantic(nothing, rounds=len(samples))
