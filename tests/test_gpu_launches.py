"""Tests of the tests: what the simulated GPU sees when a kernel is broken.

A whole step and tail, forward and backward, run with a lie about one kernel: a table that ends sooner, a barrier left
out.
"""

from __future__ import annotations

import pytest
import simulated
import torch
from every_statistic import EveryStatistic
from simulated_backend import device, library, lie, seen
from torch import nn
from two_blocks import gradient_in_halves

from dia_kernels import CellAttention, backends, create_attention

pytestmark = pytest.mark.usefixtures("one_thread")

#: Tables that a kernel is handed for another's sake: both directions of the cell take all parameters and tables, and
#: the split ones leave the weights to the products.
WEIGHTS = {f"{path}_{part}_weight" for path in ("input", "hidden") for part in ("reduce", "expand")}
NOT_USED = {
    "SplitGates<false>": WEIGHTS | {"p", "zx", "zh", "h", "input_reduce_bias", "hidden_reduce_bias"},
    "SplitGates<true>": WEIGHTS | {"p", "zx", "zh", "h", "shift", "input_reduce_bias", "hidden_reduce_bias"},
    "ClusterGradient<float, false>": {"p"},
    "ClusterGradient<float, true>": {"p"},
    "SplitGateGradients<false>": WEIGHTS | {"p", "zx", "zh", "dzx", "dzh", "old_dh"},
    "SplitGateGradients<true>": WEIGHTS | {"p", "zx", "zh", "dzx", "dzh", "old_dh", "shift"},
}


#: A batch norm in front, one of running statistics, none; one over several processes, by its operators; one around a
#: cell that is not here; and one before a cell that looks at more than the mean.
NORMS = {"batch": nn.BatchNorm2d(40), "running": nn.BatchNorm2d(40).eval(), "none": None, "processes": None}
NORMS["apart"] = nn.BatchNorm2d(40)
NORMS["statistics"], NORMS["statistics, none"] = nn.BatchNorm2d(8), None


def run(norm: str) -> None:
    """Two blocks, forward and backward."""
    if norm == "processes":
        ops = backends._backends["simulated"].operators
        gradient_in_halves(ops, "cpu", torch.float32, False, relu=True, need_shortcut=False, mask=False)
        return
    torch.manual_seed(0)
    if norm.startswith("statistics"):
        attention = CellAttention(EveryStatistic(8), backend="simulated")
        # More than the blocks of one launch take at a time, and extremes at both ends of the map.
        for shape, layout in (((20, 8, 8, 8), torch.contiguous_format), ((150, 8, 2, 2), torch.channels_last)):
            x, s, dy = (t.contiguous(memory_format=layout) for t in torch.randn(3, *shape))
            x[0, 0, 0, 0] = x[-1, -1, -1, -1] = 9
            x, s = x.requires_grad_(), s.requires_grad_()
            attention(x, shortcut=s, activation="relu", norm=NORMS[norm])[0].backward(dy)
        return
    x, s = (torch.randn(5, 40, 3, 3, requires_grad=True) for _ in range(2))
    attention = create_attention("dsu" if norm == "apart" else "lstm", 40, 5, backend="simulated")
    y, state = attention(x, shortcut=s, activation="relu", norm=NORMS[norm])
    z, (h, c) = attention(y, state, shortcut=s, activation="relu", norm=NORMS[norm])
    sum(t.sum() for t in (z, h, c)).backward()


#: All samples at once by several blocks, and chunks of them by few.
DEVICES = ({"multiprocessors": 8, "flops": 1e10, "l2": 64 << 20}, {"multiprocessors": 2, "l2": 64 << 10})


@pytest.fixture(params=["sweeps", "products", "clusters"])
def places(request: pytest.FixtureRequest):
    """Every (norm, kernel, table) and (norm, kernel, barrier), each at the first norm that has it."""
    library()
    tables, barriers, known = [], [], set()
    with device(request.param, **DEVICES[0]):
        for norm in NORMS:
            seen()
            run(norm)
            of_tables, of_barriers = seen()
            tables += [(norm, *place) for place in sorted(of_tables - known)]
            barriers += [(norm, *place) for place in sorted(of_barriers - known)]
            known |= of_tables | of_barriers
    return request.param, tables, barriers


def noticed(layouts: str, norm: str, reason: str, **what) -> bool:
    """Whether the machine sees the lie for this reason, on one of the devices."""
    for limits in DEVICES:
        with device(layouts, **limits), lie(**what):
            try:
                run(norm)
            except RuntimeError as error:
                if reason in str(error):
                    return True
    return False


def test_each_table_is_used_to_both_ends(places):
    layouts, tables, _ = places
    missed = [
        (kernel, table, *ends)
        for norm, kernel, table in tables
        if table not in NOT_USED.get(kernel, ())
        for ends in ({"before": 1}, {"after": 1})
        if not noticed(layouts, norm, "out of bounds", kernel=kernel, table=table, **ends)
    ]
    assert tables
    assert missed == []


def test_each_barrier_is_needed(places):
    """By one of the kernels that pass it: between the tasks of a block, say, of which not every launch has several."""
    layouts, _, barriers = places
    needed: dict[tuple[str, int, int], bool] = {}
    for norm, kernel, place in barriers:
        line = (simulated.ROOT / place[0]).read_text().splitlines()[place[1] - 1]
        # Else it is the sum of a warp, which cannot be left out.
        if "sync" in line and not needed.get(place):
            needed[place] = noticed(layouts, norm, "", kernel=kernel, barrier=place)
    assert needed
    assert [place for place, missed in needed.items() if not missed] == []
