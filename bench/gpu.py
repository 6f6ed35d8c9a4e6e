"""Checks and times the CUDA backend on a card, in parts that `bench/gpu_check.sh` runs; or their logic on a CPU.

    python bench/gpu.py small                      small problems once through every kernel: for compute-sanitizer
    python bench/gpu.py times --out DIR            the step and the tail against their peers
    python bench/gpu.py compile --out DIR          the same beside torch.compile, for some of the cases
    python bench/gpu.py cells --out DIR            the tail with other cells than the LSTM
    python bench/gpu.py kernels --out DIR          each kernel of ours alone
    python bench/gpu.py nets --out DIR             training steps of whole networks
    python bench/gpu.py report --out DIR           merges what the parts have left into report.json and report.md

Times are the device's, by events around one call, with a second-level cache that other data has filled, and those of
calls one after another, which the host may be too slow for; peers take turns. Nothing is timed before it has been
compared with float64. A case that fails says so in its part's file, and the others go on; so do those for which there
was no time.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import json
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment
import report as tables
import torch
from timing import L2_FILLER_BYTES, Clock, clock_of, interleaved, synchronised_seconds_a_call
from torch import Tensor, nn

from dia_kernels import backends, create_attention, models, operators, plan
from dia_kernels.autograd import keeps_mask

#: Those that are timed beside torch.compile, and held against the copy and the model.
SHOWN = ("any",)
#: N, C, side of the map, r.
SHAPES = (
    (256, 256, 56, 4),
    (128, 64, 32, 4),
    (256, 512, 28, 4),
    (256, 1024, 14, 20),
    (256, 2048, 7, 20),
    (32, 256, 56, 4),
    (128, 128, 16, 4),
    (128, 256, 8, 4),
    (256, 1024, 14, 4),
)
#: Those that torch.compile, which takes a while to compile, and other cells are timed at.
FEW_SHAPES = SHAPES[:3]
#: Cells of other statistics.
CELLS = ("se", "srm", "cbam")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
QUICK_SHAPES = ((2, 8, 8, 4),)
#: Passes over the map that nobody can avoid, with shortcut and ReLU: forward, and forward and backward if the gradient
#: reads the result. (From the ReLU's mask it is 7.1 in all; the measure stays what it was before there was one.)
LEAST_PASSES = {"forward": 3, "forward + backward": 8}
ROUNDS = 15


def moved_passes(tail: bool, masked: bool) -> dict[str, float]:
    """Those that our kernels make, with shortcut and ReLU; ``masked``: the gradient reads the ReLU's mask, not y."""
    backward = (7 if tail else 6) - (15 / 16 if masked else 0)
    return {"forward": 4, "forward + backward": 4 + (1 / 16 if masked else 0) + backward}


@dataclass(frozen=True)
class Case:
    samples: int
    channels: int
    side: int
    reduction: int
    channels_last: bool
    dtype: str
    tail: bool
    cell: str = "lstm"

    @property
    def name(self) -> str:
        what, layout = "tail" if self.tail else "step", "channels_last" if self.channels_last else "contiguous"
        what += "" if self.cell == "lstm" else f" with {self.cell}"
        return f"{what} {self.samples}x{self.channels}x{self.side}², r = {self.reduction}, {layout}, {self.dtype}"

    @property
    def map_bytes(self) -> int:
        return self.samples * self.channels * self.side**2 * getattr(torch, self.dtype).itemsize


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, where it has plans to choose from."""
    has_plans = operators.library_has_cuda
    return ctypes.CDLL(str(operators.LIBRARY_PATH)) if has_plans else None


def choose(layouts: str) -> None:
    """Which plans the library takes from now on."""
    if (found := library()) is not None:
        found.dia_kernels_gpu_layouts(plan.LAYOUTS.index(layouts))


def predicted(case: Case, card: str) -> dict[str, dict[str, float]]:
    """The seconds of our plans by their model, by mode and kind of plan, if it knows the card."""
    name = next((gpu for gpu in plan.gpus() if gpu in card.lower()), None)
    if name is None or case.cell != "lstm":  # of other cells the model knows nothing
        return {}
    shape = (case.samples, case.channels, case.side, case.side)
    options = {"dtype": case.dtype, "reduction": case.reduction, "channels_last": case.channels_last}
    norm = "batch" if case.tail else "none"
    forward, backward = (
        {kind: plan.plan(shape, name, **options, backward=b, norm=norm, layouts=kind).seconds for kind in plan.LAYOUTS}
        for b in (False, True)
    )
    return {"forward": forward, "forward + backward": {kind: forward[kind] + backward[kind] for kind in plan.LAYOUTS}}


# --- the step and the tail ---------------------------------------------------------------------------------


class Problem:
    """The modules and maps of a case."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.attention = create_attention(case.cell, case.channels, case.reduction).to(device)
        self.norm = nn.BatchNorm2d(case.channels).to(device)
        self.eager = copy.deepcopy(self.attention)
        self.eager.backend = "reference"
        self.triton = copy.deepcopy(self.attention)
        self.triton.backend = "triton"
        shape = (case.samples, case.channels, case.side, case.side)
        format_ = torch.channels_last if case.channels_last else torch.contiguous_format
        dtype = getattr(torch, case.dtype)
        self.x, self.s, self.dy = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=format_) for _ in range(3)
        )
        # Of the other cells those here have no state, or one without tensors (SRM counts the blocks).
        state = [torch.rand(case.samples, case.channels, device=device) for _ in range(2)]
        self.state = tuple(state) if case.cell == "lstm" else ()
        self.tail = case.tail
        self.leaves = [self.x, self.s, *self.state]
        self.modules = [self.attention, self.norm, self.eager, self.triton]

    def forward(self, attention: nn.Module, norm: nn.Module) -> tuple[Tensor, ...]:
        folded = norm if self.tail else None
        y, state = attention(self.x, self.state or None, shortcut=self.s, activation="relu", norm=folded)
        return y, *self.tensors_of(state)

    def tensors_of(self, state: Any) -> tuple[Tensor, ...]:
        return state if self.state else ()

    def plain(self) -> Tensor:
        """The block's tail without attention."""
        x = self.norm(self.x) if self.tail else self.x
        return torch.relu(x + self.s)

    def call(self, function: Callable[[], Any], backward: bool) -> Callable[[], object]:
        if not backward:

            def infer() -> None:
                with torch.no_grad():
                    function()

            return infer

        # As after an optimizer's zero_grad: sums of gradients over blocks or steps are not timed.
        leaves = [*self.leaves, *(p for module in self.modules for p in module.parameters())]

        def train() -> None:
            for leaf in leaves:
                leaf.requires_grad_().grad = None
            results = function()
            y = results[0] if isinstance(results, tuple) else results
            y.backward(self.dy)

        return train

    def breach(self) -> str | None:
        """How our results break the accuracy contract, by any kind of plan, on a few samples; None if they do not."""
        for kind in plan.LAYOUTS:
            choose(kind)
            if (found := self._breach()) is not None:
                return f"{kind}, {found}"
        return None

    def _breach(self) -> str | None:
        part = slice(0, 4)
        wide = copy.deepcopy(self.eager).double()
        results = {}
        for name, module, dtype in (("ours", self.attention, None), ("eager", self.eager, None), ("true", wide, 64)):
            x, s, *given = (t[part].double() if dtype else t[part] for t in (self.x, self.s, *self.state))
            norm = (copy.deepcopy(self.norm).double() if dtype else copy.deepcopy(self.norm)) if self.tail else None
            with torch.no_grad():
                y, state = module(x, tuple(given) or None, shortcut=s, activation="relu", norm=norm)
            results[name] = (y, *self.tensors_of(state))
        names = "yhc" if self.state else "y"
        for name, ours, eager, true in zip(names, *results.values(), strict=True):
            scale = true.abs().max()
            allowed = 2 * (eager.double() - true).abs().max() + torch.finfo(ours.dtype).eps * scale
            error = (ours.double() - true).abs().max()
            if not error <= allowed:
                return f"{name}: error {error:.3g}, at most {allowed:.3g} allowed"
        return None


def peers(problem: Problem, backward: bool, device: str, modes: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Every implementation of a case, as a call; with ``modes`` of torch.compile those of them too."""
    ours, eager = (
        problem.call(lambda m=m: problem.forward(m, problem.norm), backward) for m in (problem.attention, problem.eager)
    )
    calls = {"plain": problem.call(problem.plain, backward), "eager": eager}

    def with_layouts(kind: str) -> Callable[[], object]:
        def call() -> None:
            choose(kind)
            ours()

        return call

    if problem.state and backends.missing("triton") is None:
        calls["triton"] = problem.call(lambda: problem.forward(problem.triton, problem.norm), backward)
    calls |= {f"ours, {kind}": with_layouts(kind) for kind in (SHOWN if modes else plan.LAYOUTS)}
    if backward:
        calls["ours, no mask"] = without_masks(with_layouts("any"))
    if modes:
        for mode in modes:
            run = torch.compile(lambda: problem.forward(problem.eager, problem.norm), mode=mode, dynamic=False)
            calls[f"compile, {mode}"] = problem.call(run, backward)
        plain = torch.compile(problem.plain, dynamic=False)
        calls["plain, compiled"] = problem.call(plain, backward)
    # Not beside torch.compile, whose mode reduce-overhead may spoil memory beside other graphs (so it was found in
    # github.com/sgl-project/sglang-omni/pull/1046, torch 2.11; here a run of both ended in an illegal access).
    if device == "cuda" and not backward and not modes:
        calls["eager, graph"] = graphed(eager)
    return calls


def without_masks(call: Callable[[], object]) -> Callable[[], object]:
    """The call with gradients that read the result of a ReLU."""

    def run() -> None:
        kept, operators.native.masked_dtypes = operators.native.masked_dtypes, {}
        try:
            call()
        finally:
            operators.native.masked_dtypes = kept

    return run


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call captured into a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(), call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def medians(calls: dict[str, Callable[[], object]], clock: Clock, rounds: int, seconds: float = 0) -> dict[str, float]:
    """The median of each call; a sample is one call, or as many as take ``seconds``."""
    samples = interleaved(calls, budget=0, least=rounds, clock=clock, sample_seconds=seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


def copy_bandwidth(size: int, device: str, rounds: int) -> float:
    """Bytes a second, read and written, of copying so many bytes."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, clock_of(device), rounds)["copy"]


def usable(calls: dict[str, Callable[[], object]]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The calls that run, and why others do not: a peer that fails must not take the others' times with it."""
    run, failed = {}, {}
    for name, call in calls.items():
        try:
            call(), call()
            run[name] = call
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    return run, failed


def time_case(case: Case, device: str, modes: Sequence[str], rounds: int) -> dict[str, Any]:
    problem = Problem(case, device)
    result: dict[str, Any] = {"case": asdict(case), "name": case.name, "wrong": problem.breach(), "seconds": {}}
    if result["wrong"]:
        return result
    clock, clock_of_calls = clock_of(device), synchronised_seconds_a_call if device == "cuda" else clock_of(device)
    result["copy_bandwidth"] = copy_bandwidth(case.map_bytes, device, rounds)
    moved = moved_passes(case.tail, keeps_mask(operators.native, problem.x, 1))
    predictions = predicted(case, torch.cuda.get_device_name()) if device == "cuda" else {}
    for mode, passes in LEAST_PASSES.items():
        calls, failed = usable(peers(problem, mode != "forward", device, modes))
        seconds = medians(calls, clock, rounds)
        a_pass = case.map_bytes / result["copy_bandwidth"]
        ours = {kind: seconds[f"ours, {kind}"] for kind in SHOWN if f"ours, {kind}" in seconds}
        result["seconds"][mode] = {
            "median": seconds,
            "one after another": medians(calls, clock_of_calls, 5, seconds=2e-3),
            "of_copy": {kind: passes * a_pass / t for kind, t in ours.items()},
            "of_copy_moved": {kind: moved[mode] * a_pass / t for kind, t in ours.items()},
            "predicted": predictions.get(mode, {}),
            "failed": failed,
        }
    choose("any")
    return result


def profile_case(case: Case, device: str) -> dict[str, Any]:
    """The seconds of every kernel of ours in a forward and backward pass, cold, in their order."""
    problem = Problem(case, device)
    train = problem.call(lambda: problem.forward(problem.attention, problem.norm), True)
    train(), train()
    activities = [getattr(torch.profiler.ProfilerActivity, device.upper())]
    calls = []
    for _ in range(5):
        with torch.profiler.profile(activities=activities) as profiler:
            if device == "cuda":
                torch.empty(L2_FILLER_BYTES, dtype=torch.uint8, device=device).zero_()
            train()
            if device == "cuda":
                torch.cuda.synchronize()
        events = sorted(profiler.events(), key=lambda event: event.time_range.start)
        # On a GPU everything that ran there but what emptied the cache; on a CPU our operators.
        on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        ours = on_gpu[1:] if device == "cuda" else [e for e in events if "dia" in e.name]
        calls.append([(e.name, e.time_range.elapsed_us() * 1e-6) for e in ours])
    times = [statistics.median(seconds) for seconds in zip(*([t for _, t in call] for call in calls), strict=True)]
    kernels = [{"name": name, "seconds": t} for (name, _), t in zip(calls[0], times, strict=True)]
    return {"case": asdict(case), "name": case.name, "map_bytes": case.map_bytes, "kernels": kernels}


def cell_cases(shapes: Sequence[tuple[int, int, int, int]], dtype: str) -> list[Case]:
    """Tails of channels_last maps."""
    return [Case(*shape, True, dtype, True, cell) for shape in shapes for cell in CELLS]


def cases(shapes: Sequence[tuple[int, int, int, int]], dtype: str) -> list[Case]:
    return [
        Case(*shape, channels_last, dtype, tail)
        for channels_last in (True, False)
        for shape in shapes
        for tail in (False, True)
    ]


# --- whole networks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network, its images, and r of its attention.

    ``small``: its maps are of the sizes that clusters are for, so sweeps are timed beside them, and its steps so short
    that they are timed in CUDA graphs too.
    """

    network: str
    batch: int
    side: int
    reduction: int
    small: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        return ("plain", "eager", "ours", *(["ours, sweeps"] if self.small else []))

    @property
    def name(self) -> str:
        return f"{self.network}, batch {self.batch} of {self.side}², r = {self.reduction}"

    def build(self, variant: str) -> nn.Module:
        """``plain``, ``eager`` (DIA by PyTorch's own operations) or one of ours, with the weights of seed 0."""
        torch.manual_seed(0)
        if self.network == "resnet50":
            from resnet50 import resnet50  # torchvision's

            return resnet50(variant, self.reduction)
        if variant == "plain":
            return models.create(self.network, num_classes=10)
        dia = {"attention": "dia", "reduction": self.reduction}
        eager = {"backend": "reference", "fold_norm": False} if variant == "eager" else {}
        return models.create(self.network, num_classes=10, **dia, **eager)


NETWORKS = (
    Network("resnet164", 32, 32, 4, small=True),
    Network("resnet164", 128, 32, 4, small=True),
    Network("resnet50", 256, 224, 4),
    Network("resnet50", 256, 224, 20),
)
QUICK_NETWORKS = (Network("resnet20", 4, 32, 4), Network("resnet50", 2, 64, 20))


def training_step(network: nn.Module, images: Tensor, labels: Tensor, layouts: str) -> Callable[[], None]:
    """Mixed precision and SGD with momentum; our operators by plans of the kind ``layouts``."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        choose(layouts)
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return step


def time_network(case: Network, device: str, rounds: int) -> dict[str, Any]:
    """A training step with and without attention, bfloat16 by autocast, channels_last; and peak memory."""
    result: dict[str, Any] = {"name": case.name, "case": asdict(case), "seconds": {}, "peak_bytes": {}}
    images = torch.randn(case.batch, 3, case.side, case.side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (case.batch,), device=device)
    steps = {}
    for variant in case.variants:
        network = case.build(variant).to(device).to(memory_format=torch.channels_last)
        step = training_step(network, images, labels, layouts=variant.partition(", ")[2] or "any")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step(), step()
        if device == "cuda":
            result["peak_bytes"][variant] = torch.cuda.max_memory_allocated()
        steps[variant] = step
    clock = synchronised_seconds_a_call if device == "cuda" else clock_of(device)
    result["seconds"] = medians(steps, clock, rounds)
    if case.small and device == "cuda":
        result["seconds"] |= medians({f"{name}, graph": graphed(step) for name, step in steps.items()}, clock, rounds)
    choose("any")
    return result


# --- parts -------------------------------------------------------------------------------------------------


def small(device: str) -> None:
    """Every kernel once, forward and backward."""
    for kind in plan.LAYOUTS:
        choose(kind)
        for dtype in ("float32", "bfloat16"):
            for case in cases([(5, 25, 7, 4), (4, 64, 8, 4)], dtype):
                problem = Problem(case, device)
                for training in (True, False):
                    problem.norm.train(training)
                    problem.call(lambda p=problem: p.forward(p.attention, p.norm), True)()
    choose("any")
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def alive(device: str) -> bool:
    """Whether this process can use the device: not after an illegal access, say."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def apart(function: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """The same for each subject in a process of its own, with whose end it is gone what a failure spoils there."""

    def run(subject: Any) -> dict[str, Any]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, subject).result()

    return run


@dataclass
class Part:
    """A part's results, in its file as soon as there are some."""

    name: str
    folder: Path
    device: str
    seconds: float

    def run(self, subjects: Sequence[Any], function: Callable[[Any], dict[str, Any]]) -> bool:
        """Whether no subject failed. Those for which there is no time are listed without results."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment_, results, begin = environment.describe(self.device), [], time.monotonic()
        run = function
        for subject in subjects:
            if time.monotonic() - begin > self.seconds:
                results.append({"name": subject.name, "skipped": "no time was left"})
                continue
            print(subject.name, "...", flush=True)
            try:
                results.append(run(subject))
            except Exception:
                results.append({"name": subject.name, "error": traceback.format_exc(limit=4)})
                if run is function and not alive(self.device):
                    run = apart(function)
            print("   ", summary(results[-1]), flush=True)
            self.write({"environment": environment_, "results": results})
        self.write({"environment": environment_, "results": results})
        return not any(map(failure, results))

    def write(self, document: dict[str, Any]) -> None:
        (self.folder / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")


def report(folder: Path) -> str:
    """All parts that are there, as Markdown; ``report.json`` beside it."""
    files = {part: folder / f"{part}.json" for part in TABLES}
    parts = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    (folder / "report.json").write_text(json.dumps(parts, indent=1) + "\n")
    sections = ["# The CUDA backend on a card"]
    for part, document in parts.items():
        sections += [f"## {part}", ", ".join(f"{k}: {v}" for k, v in document["environment"].items())]
        good = [r for r in document["results"] if not failure(r) and "skipped" not in r]
        sections += TABLES[part](good) if good else []
        sections += [f"* **{r['name']}** failed: {failure(r)}" for r in document["results"] if failure(r)]
        sections += [f"* **{r['name']}** was left out: {r['skipped']}" for r in document["results"] if "skipped" in r]
    for log in sorted(folder.glob("*.log")):
        tail = log.read_text(errors="replace").strip().splitlines()[-3:]
        sections += [f"## {log.stem}", "\n".join(f"    {line}" for line in tail)]
    text = "\n\n".join(sections) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def failure(result: dict[str, Any]) -> str | None:
    """In a line why there are no results."""
    return result.get("wrong") or (result["error"].strip().splitlines()[-1] if result.get("error") else None)


def tables_of_times(results: list[dict[str, Any]]) -> list[str]:
    """Microseconds of every implementation, by mode: the device's, and of calls one after another."""
    sections = []
    for mode, passes in LEAST_PASSES.items():
        names = list(dict.fromkeys(name for r in results for name in r["seconds"][mode]["median"]))
        device, calls = [], []
        for result in results:
            seconds = result["seconds"][mode]
            shares = [
                " / ".join(f"{seconds[which][k]:.0%}" if k in seconds[which] else "-" for k in SHOWN)
                for which in ("of_copy", "of_copy_moved")
            ]
            model = " / ".join(microseconds(seconds["predicted"], SHOWN))
            device.append([result["name"], *microseconds(seconds["median"], names), *shares, model])
            calls.append([result["name"], *microseconds(seconds["one after another"], names)])
        sections += [
            f"### {mode}, microseconds of the device",
            f"Of copy: the time of {passes} passes over the map at a copy's bandwidth, over ours; moved: the same of "
            f"the passes that our kernels make; model: the plan's. All of ours, {' / '.join(SHOWN)}.",
            tables.table(["case", *names, "of copy", "moved", "model"], device),
            f"### {mode}, microseconds of calls one after another",
            tables.table(["case", *names], calls),
        ]
    return sections


def microseconds(seconds: dict[str, float], names: Sequence[str]) -> list[str]:
    return [f"{seconds[name] * 1e6:.0f}" if name in seconds else "-" for name in names]


def tables_of_kernels(results: list[dict[str, Any]]) -> list[str]:
    return ["\n".join(f"* **{r['name']}**: {summary(r)}" for r in results)]


def tables_of_nets(results: list[dict[str, Any]]) -> list[str]:
    """A training step of each variant, beside the plain network's, and peak memory."""
    names = list(dict.fromkeys(name for r in results for name in r["seconds"]))
    measured = list(dict.fromkeys(name for r in results for name in r["peak_bytes"]))
    rows = []
    for r in results:
        seconds, peaks = r["seconds"], r["peak_bytes"]
        row = [r["name"], *(f"{seconds[n] * 1e3:.2f}" if n in seconds else "-" for n in names)]
        row += [
            f"{seconds[f'ours{how}'] / seconds[f'plain{how}']:.3f}" if f"ours{how}" in seconds else "-"
            for how in ("", ", graph")
        ]
        rows.append(row + [f"{peaks[n] / 2**30:.2f}" if n in peaks else "-" for n in measured])
    header = ["network", *(f"{n}, ms" for n in names), "ours / plain", "ours / plain, graphs"]
    return [tables.table([*header, *(f"{n}, GiB" for n in measured)], rows)]


TABLES: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "times": tables_of_times,
    "cells": tables_of_times,
    "compile": tables_of_times,
    "kernels": tables_of_kernels,
    "nets": tables_of_nets,
}


def short(kernel: str) -> str:
    """The kernel's own name and types, out of the symbol's."""
    for part in ("void ", "dia::cuda::", "(anonymous namespace)::", "dia::kernels::", "dia::"):
        kernel = kernel.replace(part, "")
    return kernel.partition("(")[0].removeprefix("kernel<").rstrip(", ")


def summary(result: dict[str, Any]) -> str:
    if failure(result):
        return f"failed: {failure(result)}"
    if "kernels" in result:
        return ", ".join(f"{short(k['name'])} {k['seconds'] * 1e6:.1f}" for k in result["kernels"]) + " us"
    if "peak_bytes" in result:
        peaks = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in result["peak_bytes"].items())
        times = ", ".join(f"{k} {v * 1e3:.2f}" for k, v in result["seconds"].items())
        return f"{times} ms" + (f"; peak memory {peaks} GiB" if peaks else "")
    found = []
    for mode, seconds in result["seconds"].items():
        device, calls = (
            ", ".join(f"{k} {v * 1e6:.0f}" for k, v in seconds[which].items())
            for which in ("median", "one after another")
        )
        share = ", ".join(f"{kind} {share:.0%} of the copy bandwidth" for kind, share in seconds["of_copy"].items())
        share += "".join(
            f", {kind} {seconds['predicted'][kind] * 1e6:.0f} us predicted"
            for kind in SHOWN
            if kind in seconds["predicted"]
        )
        failures = "".join(f"; {k} failed" for k in seconds["failed"])
        found.append(f"{mode} us: {device} ({share}{failures}); one after another: {calls}")
    return "; ".join(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks and times the CUDA backend.")
    parser.add_argument("part", choices=("small", "times", "cells", "compile", "kernels", "nets", "report"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds, nothing compiled")
    parser.add_argument("--layouts", choices=plan.LAYOUTS, default="any", help="plans that `kernels` takes")
    parser.add_argument("--modes", nargs="+", choices=COMPILE_MODES, default=COMPILE_MODES, help="of `compile`")
    parser.add_argument("--seconds", type=float, default=450, help="begin no case after so many (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    options = parser.parse_args(arguments)
    if options.part == "report":
        print(report(options.out))
        return 0
    if options.device == "cuda" and (missing := backends.missing("cuda")):
        parser.error(f"--device cuda: {missing}")
    if options.part == "small":
        small(options.device)
        return 0
    rounds = 2 if options.quick else ROUNDS
    shapes = QUICK_SHAPES if options.quick else SHAPES
    part = Part(options.part, options.out, options.device, options.seconds)
    if options.part == "nets":
        networks = QUICK_NETWORKS if options.quick else NETWORKS
        return 0 if part.run(networks, functools.partial(time_network, device=options.device, rounds=rounds)) else 1

    few = QUICK_SHAPES if options.quick else FEW_SHAPES
    chosen = cell_cases(few, options.dtype) if options.part == "cells" else cases(shapes, options.dtype)
    if options.part == "compile":
        compiled = [case for case in cases(FEW_SHAPES, options.dtype) if case.channels_last]
        # Shapes compiled before would be taken for ones that change.
        timed = functools.partial(time_case, device=options.device, modes=options.modes, rounds=rounds)
        return 0 if part.run(compiled, apart(timed)) else 1
    if options.part in ("times", "cells"):
        timed = functools.partial(time_case, device=options.device, modes=(), rounds=rounds)
        return 0 if part.run(chosen, timed) else 1
    choose(options.layouts)
    return 0 if part.run(chosen, functools.partial(profile_case, device=options.device)) else 1


if __name__ == "__main__":
    sys.exit(main())
