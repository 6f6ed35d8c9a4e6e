"""Checks and times the CUDA backend on a card, in parts that `bench/gpu_check.sh` runs; or their logic on a CPU.

    python bench/gpu.py small                      small problems once through every kernel: for compute-sanitizer
    python bench/gpu.py times --out DIR            the step and the tail against their peers
    python bench/gpu.py nets --out DIR             training steps of whole networks
    python bench/gpu.py report --out DIR           merges what the parts have left into report.json and report.md

Times are the device's, by events around one call, with a second-level cache that other data has filled; peers take
turns. Nothing is timed before it has been compared with float64. A part that fails says so in its file, and the
others go on.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment
import torch
from timing import clock_of, interleaved
from torch import Tensor, nn

from dia_kernels import SharedAttention, backends, models, operators

LAYOUTS = ("any", "on chip", "sweeps", "products")
#: N, C, side of the map, r.
SHAPES = (
    (256, 256, 56, 4),
    (256, 512, 28, 4),
    (256, 1024, 14, 4),
    (256, 1024, 14, 20),
    (256, 2048, 7, 20),
    (32, 256, 56, 4),
    (128, 64, 32, 4),
    (128, 128, 16, 4),
    (128, 256, 8, 4),
)
QUICK_SHAPES = ((2, 8, 8, 4),)
#: Passes over the map that nobody can avoid, with shortcut and ReLU: forward, and forward and backward.
LEAST_PASSES = {"forward": 3, "forward + backward": 8}
ROUNDS = 15


@dataclass(frozen=True)
class Case:
    samples: int
    channels: int
    side: int
    reduction: int
    channels_last: bool
    dtype: str
    tail: bool

    @property
    def name(self) -> str:
        what, layout = "tail" if self.tail else "step", "channels_last" if self.channels_last else "contiguous"
        return f"{what} {self.samples}x{self.channels}x{self.side}², r = {self.reduction}, {layout}, {self.dtype}"

    @property
    def map_bytes(self) -> int:
        return self.samples * self.channels * self.side**2 * getattr(torch, self.dtype).itemsize


def choose(layouts: str) -> None:
    """Which plans the library takes from now on."""
    if operators.library_error is None and operators.library_has_cuda():
        ctypes.CDLL(str(operators.LIBRARY_PATH)).dia_kernels_gpu_layouts(LAYOUTS.index(layouts))


# --- the step and the tail ---------------------------------------------------------------------------------


class Problem:
    """The modules and maps of a case."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.attention = SharedAttention(case.channels, case.reduction).to(device)
        self.norm = nn.BatchNorm2d(case.channels).to(device)
        self.eager = copy.deepcopy(self.attention)
        self.eager.backend = "reference"
        shape = (case.samples, case.channels, case.side, case.side)
        format_ = torch.channels_last if case.channels_last else torch.contiguous_format
        dtype = getattr(torch, case.dtype)
        self.x, self.s, self.dy = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=format_) for _ in range(3)
        )
        self.h, self.c = (torch.rand(case.samples, case.channels, device=device) for _ in range(2))
        self.tail = case.tail
        self.leaves = [self.x, self.s, self.h, self.c]

    def forward(self, attention: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        folded = norm if self.tail else None
        y, (h, c) = attention(self.x, (self.h, self.c), shortcut=self.s, activation="relu", norm=folded)
        return y, h, c

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

        def train() -> None:
            for leaf in self.leaves:
                leaf.requires_grad_().grad = None
            results = function()
            y = results[0] if isinstance(results, tuple) else results
            y.backward(self.dy)

        return train

    def breach(self) -> str | None:
        """How our results break the accuracy contract, on a few samples; None if they do not."""
        part = slice(0, 4)
        wide = copy.deepcopy(self.eager).double()
        results = {}
        for name, module, dtype in (("ours", self.attention, None), ("eager", self.eager, None), ("true", wide, 64)):
            x, s, h, c = (t[part].double() if dtype else t[part] for t in (self.x, self.s, self.h, self.c))
            norm = (copy.deepcopy(self.norm).double() if dtype else copy.deepcopy(self.norm)) if self.tail else None
            with torch.no_grad():
                y, state = module(x, (h, c), shortcut=s, activation="relu", norm=norm)
            results[name] = (y, *state)
        for name, ours, eager, true in zip("yhc", *results.values(), strict=True):
            scale = true.abs().max()
            allowed = 2 * (eager.double() - true).abs().max() + torch.finfo(ours.dtype).eps * scale
            error = (ours.double() - true).abs().max()
            if not error <= allowed:
                return f"{name}: error {error:.3g}, at most {allowed:.3g} allowed"
        return None


def peers(problem: Problem, backward: bool, device: str, compiled: bool) -> dict[str, Callable[[], object]]:
    """Every implementation of a case, as a call."""
    ours, eager = (
        problem.call(lambda m=m: problem.forward(m, problem.norm), backward) for m in (problem.attention, problem.eager)
    )
    calls = {"plain": problem.call(problem.plain, backward), "eager": eager}

    def with_layouts(kind: str) -> Callable[[], object]:
        def call() -> None:
            choose(kind)
            ours()

        return call

    calls |= {f"ours, {kind}": with_layouts(kind) for kind in LAYOUTS}
    if compiled:
        for mode in ("default", "reduce-overhead", "max-autotune"):
            run = torch.compile(lambda: problem.forward(problem.eager, problem.norm), mode=mode)
            calls[f"compile, {mode}"] = problem.call(run, backward)
        plain = torch.compile(problem.plain)
        calls["plain, compiled"] = problem.call(plain, backward)
    if device == "cuda" and not backward:
        calls["eager, graph"] = graphed(eager)
    return calls


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


def medians(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    samples = interleaved(calls, budget=0, least=rounds, clock=clock_of(device))
    return {name: statistics.median(values) for name, values in samples.items()}


def copy_bandwidth(size: int, device: str, rounds: int) -> float:
    """Bytes a second, read and written, of copying so many bytes."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]


def time_case(case: Case, device: str, compiled: bool, rounds: int) -> dict[str, Any]:
    problem = Problem(case, device)
    result: dict[str, Any] = {"case": asdict(case), "name": case.name, "wrong": problem.breach(), "seconds": {}}
    if result["wrong"]:
        return result
    result["copy_bandwidth"] = copy_bandwidth(case.map_bytes, device, rounds)
    for mode, passes in LEAST_PASSES.items():
        calls, failed = peers(problem, mode != "forward", device, compiled), {}
        for name in list(calls):
            try:
                calls[name]()
                calls[name]()
            except Exception as error:  # a peer that does not run must not take the others' times with it
                failed[name] = f"{type(error).__name__}: {error}"[:200]
                del calls[name]
        seconds = medians(calls, device, rounds)
        ideal = passes * case.map_bytes / result["copy_bandwidth"]
        result["seconds"][mode] = {"median": seconds, "of_copy": ideal / seconds["ours, any"], "failed": failed}
    choose("any")
    return result


def cases(shapes: Sequence[tuple[int, int, int, int]], dtype: str) -> list[Case]:
    return [
        Case(*shape, channels_last, dtype, tail)
        for shape in shapes
        for tail in (False, True)
        for channels_last in (False, True)
    ]


# --- whole networks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network, its images, and r of its attention."""

    network: str
    batch: int
    side: int
    reduction: int

    @property
    def name(self) -> str:
        return f"{self.network}, batch {self.batch} of {self.side}², r = {self.reduction}"

    def build(self, variant: str) -> nn.Module:
        """``plain``, ``eager`` (DIA by PyTorch's own operations) or ``ours``, with the weights of seed 0."""
        torch.manual_seed(0)
        if self.network == "resnet50":
            from resnet50 import resnet50  # torchvision's

            return resnet50(variant, self.reduction)
        dia = {"attention": "dia", "reduction": self.reduction}
        eager = {"backend": "reference", "fold_norm": False}
        options = {"plain": {}, "eager": dia | eager, "ours": dia}[variant]
        return models.create(self.network, num_classes=10, **options)


NETWORKS = (
    Network("resnet164", 32, 32, 4),
    Network("resnet164", 128, 32, 4),
    Network("resnet50", 256, 224, 4),
    Network("resnet50", 256, 224, 20),
)
QUICK_NETWORKS = (Network("resnet20", 4, 32, 4), Network("resnet50", 2, 64, 20))


def time_network(case: Network, device: str, rounds: int) -> dict[str, Any]:
    """A training step with and without attention, bfloat16 by autocast, channels_last; and peak memory."""
    result: dict[str, Any] = {"name": case.name, "case": asdict(case), "seconds": {}, "peak_bytes": {}}
    images = torch.randn(case.batch, 3, case.side, case.side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (case.batch,), device=device)
    steps = {}
    for variant in ("plain", "eager", "ours"):
        network = case.build(variant).to(device).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)

        def step(network=network, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step(), step()
        if device == "cuda":
            result["peak_bytes"][variant] = torch.cuda.max_memory_allocated()
        steps[variant] = step
    result["seconds"] = medians(steps, device, rounds)
    return result


# --- parts -------------------------------------------------------------------------------------------------


def small(device: str) -> None:
    """Every kernel once, forward and backward."""
    for kind in LAYOUTS:
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


def guarded(function: Callable[..., dict[str, Any]], name: str, *arguments) -> dict[str, Any]:
    try:
        print(name, "...", flush=True)
        return function(*arguments)
    except Exception:
        return {"name": name, "error": traceback.format_exc(limit=4)}


def write(folder: Path, part: str, device: str, results: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment.describe(device), "results": results}
    (folder / f"{part}.json").write_text(json.dumps(document, indent=1) + "\n")


def report(folder: Path) -> str:
    """All parts that are there, as Markdown; ``report.json`` beside it."""
    files = {part: folder / f"{part}.json" for part in ("times", "nets")}
    parts = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    (folder / "report.json").write_text(json.dumps(parts, indent=1) + "\n")
    lines = ["# The CUDA backend on a card"]
    for part, document in parts.items():
        lines += ["", f"## {part}", "", ", ".join(f"{k}: {v}" for k, v in document["environment"].items()), ""]
        for result in document["results"]:
            lines += [f"* **{result['name']}**: {summary(result)}"]
    for log in sorted(folder.glob("*.log")):
        tail = log.read_text(errors="replace").strip().splitlines()[-3:]
        lines += ["", f"## {log.stem}", "", *(f"    {line}" for line in tail)]
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def summary(result: dict[str, Any]) -> str:
    if result.get("error") or result.get("wrong"):
        return "failed: " + (result.get("wrong") or result["error"].strip().splitlines()[-1])
    found = []
    for mode, seconds in result["seconds"].items():
        if not isinstance(seconds, dict):  # of a network: by variant
            return ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in result["seconds"].items())
        times = ", ".join(f"{k} {v * 1e6:.0f}" for k, v in seconds["median"].items())
        failures = "".join(f"; {k} failed" for k in seconds["failed"])
        found.append(f"{mode} us: {times} ({seconds['of_copy']:.0%} of the copy bandwidth{failures})")
    return "; ".join(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks and times the CUDA backend.")
    parser.add_argument("part", choices=("small", "times", "nets", "report"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds, nothing compiled")
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
    if options.part == "times":
        chosen = cases(QUICK_SHAPES if options.quick else SHAPES, options.dtype)
        results = [guarded(time_case, c.name, c, options.device, not options.quick, rounds) for c in chosen]
    else:
        chosen = QUICK_NETWORKS if options.quick else NETWORKS
        results = [guarded(time_network, n.name, n, options.device, rounds) for n in chosen]
    write(options.out, options.part, options.device, results)
    return 1 if any(r.get("error") or r.get("wrong") for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
