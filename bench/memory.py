"""Counts what training keeps in memory: bytes saved by the tail of a block, and by networks computed again in parts.

    python bench/memory.py                       every case (about 10 minutes on one core)
    python bench/memory.py --without compile     the tails without torch.compile
    python bench/memory.py --cases resnet164-32  one network

Tails: the implementations of ``tail.py``, in float32 and under autocast to bfloat16; bytes that autograd saves, each
storage once, parameters and buffers not counted, the output told apart (a next convolution keeps it anyway).
Networks: ``dia_kernels.memory.checkpoint`` in its variants; bytes alive after the forward pass and at the peak of a
training step, by the allocator's own account, and the step's time. Bytes are exact; times are CPU seconds of one
thread, in turns.
Writes ``results/memory.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import environment
import report
import tail
import torch
from timing import Samples, interleaved, rounded, undisturbed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dia_kernels import memory, models

SHAPES = (
    tail.Shape(128, 64, 32, 32),
    tail.Shape(32, 256, 56, 56),
    tail.Shape(32, 1024, 14, 14),
    tail.Shape(32, 2048, 7, 7, 20),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Seconds of samples for each network, and the least number of rounds.
BUDGET, MIN_ROUNDS = 60.0, 5

#: What is computed again, and what is kept of it; by the label of the variant.
VARIANTS: dict[str, tuple[memory.What, memory.Save]] = {
    "everything kept": ("block", "everything"),
    "blocks, convolutions kept": ("block", "convolutions"),
    "blocks": ("block", "nothing"),
    "stages, convolutions kept": ("stage", "convolutions"),
    "stages": ("stage", "nothing"),
}
BASE, WITHOUT = "everything kept", "no attention, everything kept"


@dataclass(frozen=True)
class Case:
    """A network of ``models.create`` and the images of a step."""

    network: str
    batch: int
    side: int = 32

    @property
    def name(self) -> str:
        return f"{self.network}-{self.batch}" + (f"-{self.side}²" if self.side != 32 else "")


CASES = (Case("resnet164", 32), Case("resnet56", 128), Case("resnet20", 128, 8))


# --- bytes of a tail -----------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], tuple[Tensor, ...]], own: Sequence[Tensor]) -> dict[str, int]:
    """Bytes that ``call`` saves for the backward pass: of its first result, and of all else; ``own`` not counted."""
    known = {t.untyped_storage().data_ptr() for t in own}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = call()  # which hold the graph: no storage is freed and its address used again
    output = sizes.pop(results[0].untyped_storage().data_ptr(), 0)
    return {"output": output, "rest": sum(sizes.values())}


def tail_bytes(shape: tail.Shape, dtype: str, compiled: bool) -> dict[str, Any]:
    """What each implementation saves in one call, and the bytes of one map."""
    modules = tail.modules_of(shape, "lstm")
    problem = tail.problem_of(shape, "lstm", "contiguous", 0, modules["eager"])
    z, shortcut, h, c = (t.detach() for t in problem.inputs)
    z, shortcut = (t.to(DTYPES[dtype]).requires_grad_() for t in (z, shortcut))
    found = {}
    for name, module in modules.items():
        # A state of the map's dtype keeps eager's maps in it; ours is float32 as the block before leaves it.
        of = torch.float32 if name in ("step", "ours") else DTYPES[dtype]
        state = tuple(t.to(of).requires_grad_() for t in (h, c))
        own = (*module.parameters(), *module.buffers())
        runs = {name: module}
        if compiled and name in ("plain", "eager"):
            torch._dynamo.reset()
            runs[f"{name}, compiled"] = torch.compile(module, dynamic=False)
        for label, run in runs.items():

            def call(run: Callable[..., tuple[Tensor, ...]] = run, state: tuple[Tensor, ...] = state):
                with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
                    return run(z, shortcut, *state)

            call()  # compiles, where there is something to compile
            found[label] = saved_bytes(call, own)
    return {"shape": shape.name, "dtype": dtype, "map": z.nbytes, "saved": found}


# --- bytes and time of a network --------------------------------------------------------------------------


def alive_bytes(call: Callable[[], object]) -> dict[str, int]:
    """Bytes allocated by ``call`` and still alive when it returns, and at most at any time, as the allocator tells."""
    gc.collect()  # what is freed meanwhile would count too
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return {"kept": sum(changes), "peak": max(accumulate(changes), default=0)}


def networks(case: Case) -> dict[str, nn.Module]:
    """The network in every variant, with the same weights; and the one without attention."""
    torch.manual_seed(0)
    base = models.create(case.network, attention="dia").train()
    built = {label: memory.checkpoint(copy.deepcopy(base), what, save=save) for label, (what, save) in VARIANTS.items()}
    return built | {WITHOUT: models.create(case.network).train()}


def loss_of(network: nn.Module, case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=generator)
    return F.cross_entropy(network(images), torch.randint(0, 10, (case.batch,), generator=generator))


def step_of(network: nn.Module, case: Case) -> Callable[[], None]:
    """Forward and backward into fresh gradients."""

    def step() -> None:
        network.zero_grad()
        loss_of(network, case).backward()

    return step


def breach(built: dict[str, nn.Module], case: Case) -> str | None:
    """Which variant's gradients or buffers are not those of the whole network to the bit; None if all are."""

    def results(network: nn.Module) -> list[Tensor]:
        network = copy.deepcopy(network)
        torch.manual_seed(1)  # of the dropout
        step_of(network, case)()
        return [*(p.grad for p in network.parameters()), *network.buffers()]

    expected = results(built[BASE])
    for label in VARIANTS:
        if not all(map(torch.equal, results(built[label]), expected)):
            return label
    return None


def cpu_seconds_a_call(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds of this process: what other processes of a shared machine take does not count."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def measure(case: Case, budget: float) -> dict[str, Any]:
    built = networks(case)
    wrong = breach(built, case)
    counted = {}
    for label, network in built.items():
        kept = alive_bytes(lambda network=network: loss_of(network, case))["kept"]
        counted[label] = {"kept": kept, "peak": alive_bytes(step_of(network, case))["peak"]}
        network.zero_grad()
    with undisturbed():
        calls = {label: step_of(network, case) for label, network in built.items()}
        seconds = interleaved(calls, budget, MIN_ROUNDS, cpu_seconds_a_call)
    return {"name": case.name, "wrong": wrong, "bytes": counted, "seconds": rounded(seconds)}


# --- report ----------------------------------------------------------------------------------------------


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}" if count < 1e8 else f"{count / 1e6:.0f}"


def tail_table(results: Sequence[dict], dtype: str) -> str:
    here = [result for result in results if result["dtype"] == dtype]
    names = [name for name in tail.LABELS if any(name in result["saved"] for result in here)]
    rows = []
    for result in here:
        row = [result["shape"], megabytes(result["map"])]
        for name in names:
            saved = result["saved"].get(name)
            row.append(report.ABSENT if saved is None else f"{megabytes(saved['rest'])} + {megabytes(saved['output'])}")
        rows.append(row)
    return report.table(["N x C x HW", "a map", *(tail.LABELS[name] for name in names)], rows)


def ratio(seconds: Samples, label: str) -> float:
    """Median of the ratios to the whole network within rounds."""
    return statistics.median(a / b for a, b in zip(seconds[label], seconds[BASE], strict=True))


def network_table(result: dict) -> str:
    rows = []
    for label in (*VARIANTS, WITHOUT):
        counted, base = result["bytes"][label], result["bytes"][BASE]
        row = [label]
        for what in ("kept", "peak"):
            row.append(f"{megabytes(counted[what])} ({counted[what] / base[what]:.2f}x)")
        rows.append([*row, f"{ratio(result['seconds'], label):.2f}"])
    return report.table([result["name"], "MB kept for backward", "MB at the peak of a step", "time"], rows)


def markdown(document: dict) -> str:
    tails, measured = document["tails"], document["networks"]
    parts = ["# Memory of training", report.environment_text(document["environment"])]
    if tails:
        parts += [
            "## Bytes that the tail of a block saves",
            "MB saved for the backward pass by batch norm, attention, shortcut and ReLU: all but the output + the "
            "output, which the next convolution keeps anyway. Parameters and buffers are not counted. bfloat16: maps "
            "and autocast, parameters in float32. r = 4 where nothing else is said.",
        ]
        for dtype in DTYPES:
            parts += [f"### {dtype}", tail_table(tails, dtype)]
    if measured:
        parts += [
            "## Networks computed again in parts",
            "A training step with `memory.checkpoint`, float32; names: network, batch. MB alive after the forward "
            "pass, and at the peak of forward and backward, of what a step allocates. Time as a multiple of the "
            "network that keeps everything (CPU seconds of one thread, medians of ratios within rounds).",
            *(network_table(result) for result in measured),
        ]
        wrong = [f"* {r['name']}: {r['wrong']}" for r in measured if r["wrong"]]
        parts.append("Gradients or buffers not equal to the bit:\n" + ("\n".join(wrong) or "none."))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    by_name = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description="Memory of training: tails, and networks computed again in parts.")
    parser.add_argument("--shapes", help="of tails, comma-separated as in 32x256x56x56,32x2048x7x7r20; '' for none")
    parser.add_argument("--cases", help=f"comma-separated out of {','.join(by_name)}; '' for none")
    parser.add_argument("--without", choices=("compile",), help="leave out torch.compile")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of samples for each network")
    parser.add_argument("--name", default="memory", help="stem of the two files")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    shapes = SHAPES if options.shapes is None else [tail.Shape.parse(s) for s in options.shapes.split(",") if s]
    chosen = list(by_name) if options.cases is None else [name for name in options.cases.split(",") if name]
    if unknown := set(chosen) - set(by_name):
        parser.error(f"--cases: no case {', '.join(sorted(unknown))}; expected some of {', '.join(by_name)}")
    torch.set_num_threads(1)
    tails = [tail_bytes(shape, dtype, options.without != "compile") for dtype in DTYPES for shape in shapes]
    document = {"environment": environment.describe(), "tails": tails, "networks": []}
    for name in chosen:
        document["networks"].append(measure(by_name[name], options.budget))
        print(network_table(document["networks"][-1]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / options.name
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    return 1 if any(result["wrong"] for result in document["networks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
