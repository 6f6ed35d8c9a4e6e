"""The step's GPU kernels on the simulated machine: right, with ideal traffic, no barrier too few, none too many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simulated import ROOT, Case, Problem, assert_right, machine

# float16 takes the same path as bfloat16 but for two conversions.
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
SHAPES = [(3, 12, 49, 3), (2, 25, 9, 6), (5, 16, 64, 4), (1, 102, 4, 25), (2, 3, 130, 1), (4, 1, 1, 1)]
TEAMS = [{"ranks": 1, "group": 1}, {"ranks": 2, "group": 2}, {"ranks": 3, "group": 2, "teams": 2, "threads": 96}]
OPTIONS = [
    {},
    {"relu": False, "shortcut": False, "state": False, "tanh": True},
    {"shortcut": False, "phase": (1, 3, 0, 2, 5), "gap": 3},
    {"relu": False, "tanh": True, "phase": (5, 5, 5)},
]
# Half of the pairs: each team and each option twice or more.
PAIRS = [(t, o) for i, t in enumerate(TEAMS) for j, o in enumerate(OPTIONS) if (i + j) % 2 == 0]


def case_of(shape, **options) -> Case:
    samples, channels, positions, bottleneck = shape
    return Case(samples=samples, channels=channels, positions=positions, bottleneck=bottleneck, **options)


def over_shapes_and_types(test):
    """Every shape and type, both layouts."""
    for name, values, ids in (("interleaved", [False, True], None), ("dtype", DTYPES, str), ("shape", SHAPES, str)):
        test = pytest.mark.parametrize(name, values, ids=ids)(test)
    return test


@over_shapes_and_types
def test_forward(shape, dtype, interleaved):
    for teams, options in PAIRS:
        case = case_of(shape, dtype=dtype, interleaved=interleaved, **teams, **options)
        assert_right(case, Problem(case).forward())


@over_shapes_and_types
def test_backward(shape, dtype, interleaved):
    for teams, options in PAIRS:
        case = case_of(shape, dtype=dtype, interleaved=interleaved, **teams, **options)
        problem = Problem(case)
        assert_right(case, problem.backward())
        for tile in (32, 64):
            assert_right(case, problem.weight_gradients(tile))


@over_shapes_and_types
def test_a_norm_with_given_statistics_in_front(shape, dtype, interleaved):
    for teams, options in zip(TEAMS, OPTIONS, strict=False):
        case = case_of(shape, dtype=dtype, interleaved=interleaved, affine=True, **teams, **options)
        problem = Problem(case)
        for result in (problem.forward(), problem.backward(), problem.weight_gradients(), problem.norm_gradients()):
            assert_right(case, result)


@pytest.mark.parametrize(
    "options",
    [
        {"dy": False},
        {"need_x": False},
        {"need_state": False},
        {"dstate": False},
        {"dy": False, "relu": False},
        {"dy": False, "affine": True},
        {"need_x": False, "affine": True},
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_only_what_is_asked_for(options, interleaved):
    case = Case(ranks=2, group=2, interleaved=interleaved, **options)
    result = Problem(case).backward()
    assert_right(case, result)
    # What nobody asked for is not in memory either: the machine would have refused to touch it.
    assert ("dx" in result.found) == case.need_x
    if not case.dy:
        assert "x" not in result.report["tensors"] or result.report["tensors"]["x"][0] == 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_orders_of_threads_give_the_same_bits(interleaved):
    case = Case(ranks=3, group=2, teams=2, interleaved=interleaved, dtype=torch.bfloat16)
    problems = [Problem(replace(case, seed=seed)) for seed in range(4)]
    for results in zip(*([p.forward(), p.backward(), p.weight_gradients()] for p in problems), strict=True):
        for result in results[1:]:
            for name, value in result.found.items():
                assert torch.equal(value, results[0].found[name]), name


# --- traffic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("ranks", "group"), [(1, 1), (2, 2)])
def test_each_map_is_moved_once(ranks, group, interleaved, dtype, shortcut):
    case = Case(
        samples=4, channels=32, positions=64, bottleneck=8, dtype=dtype, interleaved=interleaved, ranks=ranks,
        group=group, quantum=16, shortcut=shortcut, relu=shortcut,
    )  # fmt: skip
    problem = Problem(case)
    forward, backward = problem.forward().report, problem.backward().report
    reads = {"x", "dy", "y"} if shortcut else {"x", "dy"}
    check_traffic(case, forward, reads={"x", "shortcut"} if shortcut else {"x"}, writes={"y"}, most=1.0)
    check_traffic(case, backward, reads=reads, writes={"dx", "dshortcut"} if shortcut else {"dx"}, most=1.0)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1.06), (torch.bfloat16, 1.2)], ids=str)
def test_owners_of_odd_maps_share_few_sectors(dtype, most):
    """7 x 7 positions: owners begin at whole vectors, runs end where they end."""
    quantum = 16 // torch.empty(0, dtype=dtype).element_size()
    case = Case(samples=4, channels=64, positions=49, bottleneck=4, dtype=dtype, ranks=2, group=2, quantum=quantum)
    problem = Problem(case)
    check_traffic(case, problem.forward().report, reads={"x", "shortcut"}, writes={"y"}, most=most)
    check_traffic(case, problem.backward().report, reads={"x", "dy", "y"}, writes={"dx", "dshortcut"}, most=most)


def check_traffic(case: Case, report: dict, reads: set[str], writes: set[str], most: float) -> None:
    maps = {"x", "shortcut", "y", "dy", "dx", "dshortcut"}
    for name, (read, written, sectors_read, sectors_written) in report["tensors"].items():
        if name not in maps:
            continue
        assert read == (case.map_bytes if name in reads else 0), name
        assert written == (case.map_bytes if name in writes else 0), name
        assert sectors_read * 32 <= most * case.map_bytes + 31 * (read > 0), name
        assert sectors_written * 32 <= most * case.map_bytes + 31 * (written > 0), name


@pytest.mark.parametrize(("ranks", "group", "readings"), [(1, 8, 1), (3, 8, 1), (2, 4, 2), (2, 1, 8)])
def test_a_weight_is_read_once_by_a_team_for_eight_samples(ranks, group, readings):
    case = Case(samples=8, channels=24, bottleneck=6, positions=4, ranks=ranks, group=group)
    problem = Problem(case)
    forward, backward = problem.forward().report["tensors"], problem.backward().report["tensors"]
    for name, weight in problem.weights().items():
        if name.endswith("weight"):
            for tensors in (forward, backward):
                assert tensors[name][0] == readings * weight.numel() * 4, name
    # What the blocks tell each other: their parts of both bottlenecks, written and read once.
    for tensors in (forward, backward):
        assert tensors["partial"][:2] == (8 * ranks * 2 * 6 * 4,) * 2


@pytest.mark.parametrize("groups", [1, 2])
def test_teams_meet_twice_a_group(groups):
    case = Case(samples=4, ranks=2, group=4 // groups)
    problem = Problem(case)
    for result in (problem.forward(), problem.backward()):
        assert result.report["passed"][2] == 2 * groups
        assert result.report["passed"][3] == 0, "no barrier of the whole grid"


# --- tests of the tests ------------------------------------------------------------------------------------

HARD = [
    Case(samples=4, ranks=2, group=2, bottleneck=5, threads=96),
    Case(samples=4, ranks=1, group=2, interleaved=True, channels=40, bottleneck=40, positions=9),
    Case(samples=3, ranks=3, group=3, channels=6, positions=200, bottleneck=2, threads=128),
    Case(samples=4, group=1, dy=False, channels=70),
    Case(samples=4, ranks=2, group=2, bottleneck=5, threads=96, affine=True),
]
KERNELS = {
    "forward": lambda problem, **options: problem.forward(**options),
    "backward": lambda problem, **options: problem.backward(**options),
    "weight_gradients": lambda problem, **options: (problem.backward(), problem.weight_gradients(**options))[1],
    "weight_gradients 64": lambda problem, **options: (problem.backward(), problem.weight_gradients(64, **options))[1],
}


def test_each_barrier_is_needed():
    """Leaving out any barrier is seen by the machine, in one kernel and case at least."""
    places = {
        place for run in KERNELS.values() for case in HARD for place in run(Problem(case)).report["barriers"]
        if "sync" in line_of(place)
    }  # fmt: skip
    assert len(places) > 8
    for place in sorted(places):
        assert any(misses(run, case, place) for run in KERNELS.values() for case in HARD), (
            f"nobody misses the barrier at {place[0].rsplit('/', 1)[-1]}:{place[1]}: {line_of(place)}"
        )


def misses(run, case: Case, place: tuple[str, int, int]) -> bool:
    """Whether the machine sees that a barrier was left out."""
    try:
        run(Problem(case), without=place)
    except machine().LaunchError:
        return True
    return False


def line_of(place: tuple[str, int, int]) -> str:
    """The source line of a barrier, or of a sum of a warp, which is no barrier that could be left out."""
    return source_of(place[0])[place[1] - 1].strip()


def source_of(path: str) -> list[str]:
    return (ROOT / path).read_text().splitlines()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_each_tensor_is_used_to_both_ends(kernel, interleaved):
    """A tensor said to be shorter by an element at either end is touched where it is not: every bound is reached."""
    case = Case(samples=3, ranks=2, group=2, interleaved=interleaved, phase=(1, 2, 3, 4, 5))
    run = KERNELS[kernel]
    for name in run(Problem(case)).report["tensors"]:
        if (kernel, name) == ("backward", "p"):
            continue  # handed over, but of the weights' gradients alone
        for shrink in ((1, 0), (0, 1)):
            if kernel == "backward" and name == "partial" and shrink == (0, 1):
                shrink = (0, 1 + 2 * case.bottleneck)  # the last group is not full
            with pytest.raises(machine().LaunchError, match="out of bounds"):
                run(Problem(case), shrink={name: shrink})


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_team_of_132_blocks(interleaved):
    case = Case(
        samples=4, channels=264, positions=16, bottleneck=8, ranks=66, teams=2, group=1, threads=64, quantum=4,
        dtype=torch.bfloat16, interleaved=interleaved,
    )  # fmt: skip
    problem = Problem(case)
    assert_right(case, problem.forward())
    assert_right(case, problem.backward())
    assert_right(case, problem.weight_gradients())
