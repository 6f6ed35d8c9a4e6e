"""Tests of the tests: what the simulated GPU sees when a kernel of the sweeps and tables is broken.

Every launch of a whole step and tail is recorded, and done again with a lie: a tensor that ends sooner, a barrier left
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import pytest
import simulated
import simulated_backend
import torch
from simulated_backend import Problem, Settings, settings
from torch import nn

from dia_kernels import SharedAttention

pytestmark = pytest.mark.usefixtures("one_thread")

Launch = tuple[Problem, str, dict, dict, dict]

#: Tensors that a kernel is handed for another's sake: both directions of the cell take all parameters and tables.
NOT_USED = {
    "cell_backward": {"p", "input_reduce_bias", "hidden_reduce_bias", "input_expand_bias", "hidden_expand_bias"},
    "split_gate_gradients": {
        *("p", "zx", "zh", "input_reduce_weight", "hidden_reduce_weight", "input_expand_weight", "hidden_expand_weight")
    },
    "split_gates": {
        *("input_reduce_weight", "input_reduce_bias", "input_expand_weight"),
        *("hidden_reduce_weight", "hidden_reduce_bias", "hidden_expand_weight"),
    },
}


@pytest.fixture(params=["sweeps", "products"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches of two blocks, with a batch norm in front, with one of running statistics, and with none."""
    simulated.machine()
    simulated_backend.add()
    recorded: list[Launch] = []
    launch = Problem.launch

    def record(self, kernel, given, results, **numbers):
        report = launch(self, kernel, given, results, **numbers)
        recorded.append((self, kernel, given, results, numbers))
        return report

    monkeypatch.setattr(Problem, "launch", record)
    settings.mode, settings.group, settings.threads = request.param, 3, 96
    for norm in (nn.BatchNorm2d(40), nn.BatchNorm2d(40).eval(), None):
        x, s = (torch.randn(3, 40, 3, 3, requires_grad=True) for _ in range(2))
        attention = SharedAttention(40, 8, backend="simulated")
        y, state = attention(x, shortcut=s, activation="relu", norm=norm)
        z, (h, c) = attention(y, state, shortcut=s, activation="relu", norm=norm)
        sum(t.sum() for t in (z, h, c)).backward()
    monkeypatch.setattr(Problem, "launch", launch)
    yield recorded
    for name, value in asdict(Settings()).items():
        setattr(settings, name, value)


def fails(launch: Launch, reason: str, **lie) -> bool:
    """Whether the machine sees the lie, for this reason."""
    problem, kernel, given, results, numbers = launch
    try:
        problem.launch(kernel, given, results, **lie, **numbers)
    except simulated.machine().LaunchError as error:
        return reason in str(error)
    return False


def test_each_tensor_is_used_to_both_ends(launches):
    seen: dict[tuple[str, str], list[bool]] = {}
    for launch in launches:
        _, kernel, given, results, _ = launch
        for name, tensor in (results | given).items():
            if tensor is None or name in NOT_USED.get(kernel, ()) or (kernel, name) == ("weight_gradients", "h"):
                continue
            for end, shrink in enumerate(((1, 0), (0, 1))):
                found = fails(launch, "out of bounds", shrink={name: shrink})
                seen.setdefault((kernel, name), [False, False])[end] |= found
    missed = [place for place, found in seen.items() if not all(found)]
    assert not missed


def test_each_barrier_is_needed(launches):
    needed: dict[tuple, bool] = {}
    for launch in launches:
        problem, kernel, given, results, numbers = launch
        for place in problem.launch(kernel, given, results, **numbers)["barriers"]:
            line = (simulated.ROOT / place[0]).read_text().splitlines()[place[1] - 1]
            if "sync" not in line:
                continue  # the sum of a warp, which is no barrier that could be left out
            key = (kernel, place[0].rsplit("/", 1)[-1], place[1], line.strip())
            if needed.setdefault(key, False):
                continue
            needed[key] = fails(launch, "", without=place)
    assert len(needed) > 5
    assert [place for place, missed in needed.items() if not missed] == []
