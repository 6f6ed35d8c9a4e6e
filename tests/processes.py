"""What the processes of test_sync.py run: a step whose nn.SyncBatchNorm spans them. Started by name, so importable."""

from __future__ import annotations

import os
from pathlib import Path

import simulated_backend
import torch
from torch import Tensor, distributed, nn

from dia_kernels import functional
from dia_kernels.cells import LSTMParameters

#: Of the results, those with a row for each sample; the others are the process's own or shared.
ROWS = ("y", "h", "c", "z", "shortcut")
PER_SAMPLE = {*("y", "h", "c"), *(f"d{k}" for k in ROWS), *(f"dd{k}" for k in ROWS), *(f"ddd{k}" for k in ROWS)}


def norm_of(tensors: dict[str, Tensor], kind: type[nn.Module], momentum: float | None) -> nn.Module:
    channels = tensors["z"].shape[1]
    norm = kind(channels, momentum=momentum, affine="gamma" in tensors, dtype=tensors["input_reduce_bias"].dtype)
    if "gamma" in tensors:
        del norm.weight, norm.bias
        norm.weight, norm.bias = tensors["gamma"], tensors["beta"]
    return norm


def solve(case: dict, kind: type[nn.Module] = nn.SyncBatchNorm, backend: str | None = None, compiled=False) -> dict:
    """Results, gradients and buffers of two steps of training, by name."""
    leaves = {k: v.detach().requires_grad_(k not in case["frozen"]) for k, v in case["tensors"].items()}
    norm = norm_of(leaves, kind, case["momentum"])
    parameters = LSTMParameters(*(leaves[k] for k in LSTMParameters._fields))
    state = (leaves["h"], leaves["c"]) if "h" in leaves else None
    step = torch.compile(functional.step, backend="aot_eager") if compiled else functional.step
    for _ in range(2):
        y, (h, c) = step(
            leaves["z"], parameters, state, shortcut=leaves.get("shortcut"), activation=case["activation"], norm=norm,
            backend=backend,
        )  # fmt: skip
    results = {"y": y, "h": h, "c": c}
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    used = [k for k in results if k in case["incoming"]]
    incoming = {k: v.clone().requires_grad_(case["twice"]) for k, v in case["incoming"].items()}

    def gradients(outputs: list, cotangents: list, of: dict, **options) -> dict:
        found = torch.autograd.grad(outputs, list(of.values()), cotangents, allow_unused=True, **options)
        return {f"d{k}": g for k, g in zip(of, found, strict=True) if g is not None}

    first = gradients([results[k] for k in used], [incoming[k] for k in used], wanted, create_graph=case["twice"])
    second = {}
    if case["twice"]:
        of = wanted | {f"d{k}": v for k, v in incoming.items()}
        found = {k: g for k, g in first.items() if g.requires_grad}
        # The same for a process's part of a weight's gradient as for all of it.
        cotangents = [g.detach().sin() if k in PER_SAMPLE else torch.ones_like(g) for k, g in found.items()]
        second = {f"d{k}": v for k, v in gradients([*found.values()], cotangents, of).items()}
    return {k: v.detach() for k, v in (results | first | second | dict(norm.named_buffers())).items()}


def share(case: dict, first: int, last: int) -> dict:
    """The case with samples [first, last) only."""
    return case | {
        part: {k: v[first:last] if k in ROWS else v for k, v in case[part].items()} for part in ("tensors", "incoming")
    }


def hang_up() -> None:
    """Ends this process when all have come here, past the interpreter's farewell: see ``launch.leave``."""
    distributed.barrier()
    os._exit(0)


def run(rank: int, folder: str) -> None:
    """Solves this process's share of every case in ``folder``; writes its results there."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for case in torch.load(Path(folder) / "cases.pt"):
        if case["backend"] == "simulated":
            simulated_backend.load()
        cut, total = case["cut"], len(case["tensors"]["z"])
        part = share(case, 0, cut) if rank == 0 else share(case, cut, total)
        results.append(solve(part, backend=case["backend"], compiled=case["compiled"]))
    torch.save(results, Path(folder) / f"results{rank}.pt")
    hang_up()
