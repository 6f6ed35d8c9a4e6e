"""nn.SyncBatchNorm in the step: two processes with a part of the batch each do what one does with all of it."""

from __future__ import annotations

import pytest
import simulated_backend
import torch
from problems import lstm_parameters, tail_arguments
from processes import PER_SAMPLE, run, share, solve
from torch import multiprocessing, nn
from two_blocks import gradient_in_halves

from dia_kernels import LSTMParameters, operators

EPS = torch.finfo(torch.float64).eps


def make(shape, cut, *, dtype=torch.float64, frozen=(), outputs=("y", "h", "c"), backend=None, **options) -> dict:
    """A problem: its tensors, the gradients that come in, and how many samples the first process gets."""
    g = torch.Generator().manual_seed(len(shape) + cut)
    n, c = shape[:2]
    table = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*size, like=dtype):
        return torch.randn(size, generator=g, dtype=torch.float64).to(like)

    z = draw(*shape) + 2
    if options.get("last"):
        z = z.contiguous(memory_format=torch.channels_last)
    tensors = {"z": z, **lstm_parameters(c, max(c // 4, 1), table, 0)._asdict()}
    if options.get("affine", True):
        tensors |= {"gamma": draw(c, like=table), "beta": draw(c, like=table)}
    if options.get("shortcut", True):
        tensors["shortcut"] = draw(*shape)
    if options.get("state", True):
        tensors |= {"h": draw(n, c, like=table).sigmoid(), "c": draw(n, c, like=table)}
    incoming = {"y": draw(*shape), "h": draw(n, c, like=table), "c": draw(n, c, like=table)}
    return {
        "tensors": tensors,
        "incoming": {k: incoming[k] for k in outputs},
        "cut": cut,
        "frozen": frozen,
        "backend": backend,
        "twice": options.get("twice", False),
        "compiled": options.get("compiled", False),
        "momentum": options.get("momentum", 0.1),
        "activation": "relu" if options.get("relu", True) else None,
    }


CASES = {
    "even": make((4, 8, 5, 7), 2),
    "uneven, channels_last": make((5, 25, 4, 4), 1, last=True),
    "one has no samples": make((3, 6, 3, 5), 3),
    "no shortcut, no ReLU, no state": make((4, 6, 3, 5), 2, shortcut=False, relu=False, state=False),
    "ReLU alone": make((4, 6, 3, 5), 1, shortcut=False),
    "shortcut without gradient": make((4, 6, 9), 2, frozen=("shortcut",)),
    "z without gradient": make((4, 6, 3, 5), 2, frozen=("z",)),
    "not affine, cumulative": make((4, 6, 3, 5), 2, affine=False, momentum=None),
    "no gradient of y": make((4, 6, 3, 5), 2, outputs=("h", "c")),
    "one value in one of them": make((4, 6, 1), 1),
    "reference": make((4, 8, 5, 7), 1, backend="reference"),
    "second derivatives": make((4, 6, 3, 5), 1, twice=True),
    "second derivatives without ReLU": make((4, 6, 3, 5), 2, twice=True, relu=False, state=False),
    "second derivatives of the shortcut's alone": make(
        (4, 6, 3, 5), 2, twice=True, state=False, outputs=("y",), frozen=("z", "gamma", "beta", *LSTMParameters._fields)
    ),
    "compiled": make((4, 8, 5, 7), 2, compiled=True),
    "float32": make((6, 12, 7, 7), 2, dtype=torch.float32),
    "bfloat16": make((6, 12, 7, 7), 3, dtype=torch.bfloat16),
    "simulated": make((5, 25, 4, 4), 1, dtype=torch.float32, backend="simulated"),
    "simulated, channels_last, a mask": make((6, 16, 3, 5), 2, last=True, dtype=torch.bfloat16, backend="simulated"),
    "simulated, a mask, shortcut without gradient": make(
        (4, 6, 4, 4), 1, dtype=torch.float16, backend="simulated", frozen=("shortcut",)
    ),
    "simulated, no shortcut, no state, not affine": make(
        (4, 6, 3, 5), 2, dtype=torch.float32, backend="simulated", shortcut=False, state=False, affine=False
    ),
    "simulated, one has no samples": make((3, 6, 3, 5), 3, dtype=torch.float32, backend="simulated"),
    "simulated, no gradient of y": make((4, 6, 3, 5), 2, dtype=torch.float32, backend="simulated", outputs=("h", "c")),
    "simulated, no ReLU": make((4, 6, 9), 2, dtype=torch.float32, backend="simulated", relu=False),
    "simulated, second derivatives, a mask": make(
        (4, 8, 3, 5), 1, dtype=torch.bfloat16, last=True, backend="simulated", twice=True
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list]:
    """What each of two processes found, for every case."""
    simulated_backend.library()
    folder = tmp_path_factory.mktemp("processes")
    torch.save(list(CASES.values()), folder / "cases.pt")
    multiprocessing.spawn(run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


def joined(parts: tuple[dict, dict]) -> dict:
    """The results of all processes as one's: rows one after the other, gradients of weights added up."""
    whole = {}
    for name in parts[0]:
        a, b = (part[name] for part in parts)
        if name in PER_SAMPLE:
            whole[name] = torch.cat((a, b))
        elif name.startswith("d"):
            whole[name] = a + b
        else:
            assert torch.equal(a, b), f"{name}: the processes disagree"
            whole[name] = a
    return whole


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, results, one_thread):
    case, number = CASES[name], list(CASES).index(name)
    found = joined(tuple(part[number] for part in results))
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[case["tensors"]["z"].ndim]
    expected = solve(case, norm, backend="reference")
    # Autograd hands the shortcut zeros through the ReLU's mask, where we say that it is a constant.
    expected = {k: v for k, v in expected.items() if k in found or v.any()}
    assert found.keys() == expected.keys()
    dtype = case["tensors"]["z"].dtype
    # Sums over all of the batch, in another order; a map of 16 bits is rounded once by each.
    eps = EPS if dtype == torch.float64 else torch.finfo(torch.float32).eps
    terms = case["tensors"]["z"].numel()
    for key, value in found.items():
        scale = max(expected[key].double().abs().max().item(), 1e-3)
        bound = 64 * terms**0.5 * eps * scale
        if value.dtype in (torch.bfloat16, torch.float16):
            bound += torch.finfo(value.dtype).eps * scale
        error = (value.double() - expected[key].double()).abs().max().item()
        assert error <= bound, (key, error / bound)


def test_alone_it_is_a_batch_norm(one_thread):
    """Without other processes a SyncBatchNorm is folded like any batch norm, second derivatives and all."""
    case = CASES["even"]
    expected = solve(case, nn.BatchNorm2d)
    for key, value in solve(case).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("need_shortcut", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("ops", [operators.native, operators.plain], ids=str)
def test_the_halves_of_the_gradient_are_the_whole(ops, relu, need_shortcut, last, one_thread):
    for whole, halves in gradient_in_halves(ops, "cpu", torch.float32, last, relu, need_shortcut, False):
        assert torch.equal(whole, halves)


def test_operators():
    case = share(CASES["float32"], 0, 2)
    t, incoming = case["tensors"], case["incoming"]
    parameters = [t[k] for k in type(lstm_parameters(4, 1))._fields]
    y, h, c, tables, *_ = operators.native.tail(*tail_arguments(t, None, None, True))
    torch.library.opcheck(operators.native.statistics, (t["z"], 1))
    arguments = tail_arguments(t, *operators.native.statistics(t["z"], 1)[:2], True)
    means = operators.native.statistics(t["z"], 1)[2]
    torch.library.opcheck(operators.native.tail_join, (*arguments[:8], means, *arguments[8:]))
    reduce = (
        incoming["y"], incoming["h"], incoming["c"], t["z"], y, t["h"], t["c"], c, tables, t["gamma"], t["beta"],
        *parameters[::2], 1, True, False, True, True, True,
    )  # fmt: skip
    torch.library.opcheck(operators.native.tail_reduce, reduce)
    sums, g, dp, *_ = operators.native.tail_reduce(*reduce)
    spread = [g, None, t["z"], h, dp, tables, t["gamma"], sums, 1]
    torch.library.opcheck(operators.native.tail_spread, tuple(spread))
    names = {0: "dy", 3: "new_h", 4: "dp", 5: "tables", 6: "norm weight", 7: "shares"}
    for place, name in names.items():
        for wrong in (spread[place][..., :1].contiguous(), spread[place].double()):
            bad = [*spread]
            bad[place] = wrong
            with pytest.raises(RuntimeError, match=rf"\b{name}: "):
                operators.native.tail_spread(*bad)
