"""The step's GPU kernels on the simulated machine: right, with ideal traffic, no barrier too few, none too many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simulated import ROOT, Case, Problem, assert_right, machine

# float16 takes the same path as bfloat16 but for two conversions.
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
SHAPES = [(3, 12, 49, 3), (2, 25, 9, 6), (5, 16, 64, 4), (1, 102, 4, 25), (2, 3, 130, 1), (4, 1, 1, 1)]
#: Blocks and tiles: one block; tasks for several; more blocks than some kernels have tasks.
GRIDS = [
    {"blocks": 1, "rows": 64, "piece": 1000, "parts": 1},
    {},
    {"blocks": 5, "rows": 5, "piece": 7, "lanes": 64, "parts": 3},
]
OPTIONS = [
    {},
    {"relu": False, "shortcut": False, "state": False, "tanh": True},
    {"shortcut": False, "phase": (1, 3, 0, 2, 5), "gap": 3},
    {"relu": False, "tanh": True, "phase": (5, 5, 5)},
]
# Half of the pairs: each grid and each option twice or more.
PAIRS = [(g, o) for i, g in enumerate(GRIDS) for j, o in enumerate(OPTIONS) if (i + j) % 2 == 0]


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
    for grid, options in PAIRS:
        case = case_of(shape, dtype=dtype, interleaved=interleaved, **grid, **options)
        assert_right(case, Problem(case).forward())


@over_shapes_and_types
def test_by_clusters(shape, dtype, interleaved):
    """One sample to a cluster, some, all of them and room for more; with a norm in front and without."""
    for together, options in zip((1, 2, 3, 16), OPTIONS, strict=True):
        for affine in (False, True):
            case = case_of(shape, dtype=dtype, interleaved=interleaved, together=together, affine=affine, **options)
            problem = Problem(case)
            for result in (problem.forward(), problem.backward(), problem.weight_gradients()):
                assert_right(case, result)


@over_shapes_and_types
def test_backward(shape, dtype, interleaved):
    for grid, options in PAIRS:
        case = case_of(shape, dtype=dtype, interleaved=interleaved, **grid, **options)
        problem = Problem(case)
        assert_right(case, problem.backward())
        for tile in (32, 64):
            for steps in (1, case.samples):
                assert_right(case, problem.weight_gradients(tile, steps))


@over_shapes_and_types
def test_a_norm_with_given_statistics_in_front(shape, dtype, interleaved):
    for grid, options in zip(GRIDS, OPTIONS, strict=False):
        case = case_of(shape, dtype=dtype, interleaved=interleaved, affine=True, **grid, **options)
        problem = Problem(case)
        for result in (problem.forward(), problem.backward(), problem.weight_gradients(), problem.norm_gradients()):
            assert_right(case, result)


@pytest.mark.parametrize(
    "options",
    [
        {"need_x": False},
        {"need_state": False},
        {"dstate": False},
        {"relu": False},
        {"relu": False, "shortcut": False},
        {"need_x": False, "affine": True},
    ],
)
@pytest.mark.parametrize("together", [0, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_only_what_is_asked_for(options, interleaved, together):
    case = Case(interleaved=interleaved, together=together, **options)
    result = Problem(case).backward()
    assert_right(case, result)
    # What nobody asked for is not in memory either: the machine would have refused to touch it.
    assert ("dx" in result.found) == case.need_x
    assert ("dshortcut" in result.found) == (case.relu and case.shortcut)


@pytest.mark.parametrize("interleaved", [False, True])
def test_orders_of_threads_give_the_same_bits(interleaved):
    case = Case(samples=5, blocks=4, interleaved=interleaved, dtype=torch.bfloat16)
    problems = [Problem(replace(case, seed=seed)) for seed in range(4)]
    by_clusters = [Problem(replace(case, seed=seed, together=2)) for seed in range(4)]
    runs = ([p.forward(), p.backward(), p.weight_gradients()] for p in problems)
    for results in [*zip(*runs, strict=True), *zip(*([p.forward(), p.backward()] for p in by_clusters), strict=True)]:
        for result in results[1:]:
            for name, value in result.found.items():
                assert torch.equal(value, results[0].found[name]), name


# --- traffic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_each_map_is_moved_once_or_twice(blocks, interleaved, dtype, shortcut):
    """Twice what the second sweep meets again in the second-level cache; where rows begin at packs no sector more."""
    case = Case(
        samples=4, channels=32, positions=64, bottleneck=8, dtype=dtype, interleaved=interleaved, blocks=blocks,
        rows=32, piece=24, shortcut=shortcut, relu=shortcut,
    )  # fmt: skip
    problem = Problem(case)
    forward, backward = problem.forward().report, problem.backward().report
    check_traffic(case, forward, {"x": 2, "shortcut": 1 if shortcut else 0}, {"y": 1})
    if shortcut:
        reads, writes = {"x": 1, "dy": 1, "y": 1, "dshortcut": 1}, {"dx": 1, "dshortcut": 1}
    else:
        reads, writes = {"x": 1, "dy": 2}, {"dx": 1}
    check_traffic(case, backward, reads, writes)
    problem = Problem(replace(case, together=2))
    check_traffic(case, problem.forward().report, {"x": 2, "shortcut": 1 if shortcut else 0}, {"y": 1})
    check_traffic(case, problem.backward().report, reads, writes)


def check_traffic(case: Case, report: dict, reads: dict[str, int], writes: dict[str, int]) -> None:
    for name in ("x", "shortcut", "y", "dy", "dx", "dshortcut"):
        read, written, sectors_read, sectors_written = report["tensors"].get(name, (0,) * 4)
        assert read == case.map_bytes * reads.get(name, 0), name
        assert written == case.map_bytes * writes.get(name, 0), name
        assert sectors_read * 32 <= read + 31 * (read > 0), name
        assert sectors_written * 32 <= written + 31 * (written > 0), name


@pytest.mark.parametrize("samples", [16, 32, 64])
def test_a_weight_is_read_once_for_32_samples(samples):
    case = Case(samples=samples, channels=128, bottleneck=64, positions=4, rows=64, parts=2)
    problem = Problem(case)
    forward, backward = problem.forward().report["tensors"], problem.backward().report["tensors"]
    for name, weight in problem.weights().items():
        if name.endswith("weight"):
            for tensors in (forward, backward):
                assert tensors[name][0] == max(samples // 32, 1) * weight.numel() * 4, name
    # Parts of both bottlenecks are written and read once.
    for tensors in (forward, backward):
        assert tensors["parts"][:2] == (samples * 2 * 2 * 64 * 4,) * 2


@pytest.mark.parametrize("together", [1, 4, 16])
def test_a_weight_is_read_once_a_cluster(together):
    case = Case(samples=16, channels=128, bottleneck=64, positions=4, rows=64, together=together)
    problem = Problem(case)
    forward, backward = problem.forward().report["tensors"], problem.backward().report["tensors"]
    for name, weight in problem.weights().items():
        for tensors in (forward, backward) if name.endswith("weight") else (forward,):
            assert tensors[name][0] == 16 // together * weight.numel() * 4, name


# --- tests of the tests ------------------------------------------------------------------------------------

HARD = [
    Case(samples=4, bottleneck=5),
    Case(samples=4, blocks=4, interleaved=True, channels=40, bottleneck=40, positions=9, piece=4, rows=40),
    Case(samples=3, blocks=3, channels=6, positions=200, bottleneck=2, lanes=128),
    Case(samples=4, channels=70, parts=1),
    Case(samples=4, blocks=3, bottleneck=5, affine=True),
    Case(samples=4, blocks=3, interleaved=True, affine=True),
    Case(samples=5, together=2, channels=40, bottleneck=20),
    Case(samples=12, together=12, channels=40, bottleneck=5),
    Case(samples=4, together=4, channels=70, bottleneck=20, interleaved=True, rows=16, affine=True),
]
KERNELS = {
    "forward": lambda problem, **options: problem.forward(**options),
    "backward": lambda problem, **options: problem.backward(**options),
    "weight_gradients": lambda problem, **options: (problem.backward(), problem.weight_gradients(**options))[1],
    "weight_gradients 64": lambda problem, **options: (problem.backward(), problem.weight_gradients(64, **options))[1],
    "weight_gradients of steps": lambda problem, **options: (
        problem.backward(),
        problem.weight_gradients(steps=2, **options),
    )[1],
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


@pytest.mark.parametrize(
    ("kernel", "together"), [*((kernel, 0) for kernel in KERNELS), ("forward", 3), ("backward", 3)]
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_each_tensor_is_used_to_both_ends(kernel, together, interleaved):
    """A tensor said to be shorter by an element at either end is touched where it is not: every bound is reached."""
    case = Case(samples=4, interleaved=interleaved, phase=(1, 2, 3, 4, 5), together=together)
    run = KERNELS[kernel]
    for name in run(Problem(case)).report["tensors"]:
        if (kernel, name) == ("backward", "p"):
            continue  # handed over, but of the weights' gradients alone
        for shrink in ((1, 0), (0, 1)):
            with pytest.raises(machine().LaunchError, match="out of bounds"):
                run(Problem(case), shrink={name: shrink})


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_132_blocks(interleaved):
    case = Case(
        samples=12, channels=264, positions=16, bottleneck=8, blocks=132, rows=8, piece=4,
        dtype=torch.bfloat16, interleaved=interleaved,
    )  # fmt: skip
    problem = Problem(case)
    assert_right(case, problem.forward())
    assert_right(case, problem.backward())
    assert_right(case, problem.weight_gradients())
