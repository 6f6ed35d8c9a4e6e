"""Times whole networks: a training step and inference, with and without attention, eager or compiled.

    python bench/networks.py                         every case, eager (about 25 minutes on two cores)
    python bench/networks.py --compiled              every case under torch.compile (about an hour)
    python bench/networks.py --cases resnet164-32    one case

Variants: ``plain`` (no attention), ``se`` (squeeze-and-excitation in plain PyTorch), ``our se`` (the same by our
operators, the batch norm folded in), ``pytorchcv`` (its DIA unit, r = 4 only), ``eager`` (our network, its step in
plain PyTorch), ``step`` (our step after the batch norm), ``ours`` (the batch norm folded in). ResNet-164 is for images
of 32x32; ResNet-50 is torchvision's, at 224x224, with the units put into its blocks. A network whose logits break the
accuracy contract reports no time. Writes ``results/networks.json``, ``.md`` and ``.png``, or ``networks-compiled.*``,
after every case.

Every network has a process of its own, as one that is trained has: of several in one process each finds another heap,
and what fresh memory costs is not its own. That of a variant and that of the network without attention take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import contract
import environment
import matplotlib
import report
import torch
from pytorchcv.model_provider import get_model
from resnet50 import resnet50
from timing import interleaved, rounded, undisturbed
from torch import Tensor, nn
from torch.nn import functional as F

from dia_kernels import models
from dia_kernels.demo import saved_bytes

matplotlib.use("Agg")

import matplotlib.pyplot as plt

VARIANTS = ("plain", "se", "our se", "pytorchcv", "eager", "step", "ours")
#: Of this library: they have to be right.
OURS = ("our se", "step", "ours")
LABELS = {
    "plain": "no attention",
    "se": "SE",
    "our se": "SE, ours",
    "pytorchcv": "DIA, pytorchcv",
    "eager": "DIA, eager",
    "step": "DIA, ours after the norm",
    "ours": "DIA, ours",
}
MODES = ("training", "inference")
#: By variant the seconds of a call, and those of the network without attention in the same round.
Pairs = dict[str, list[tuple[float, float]]]
#: Seconds to sample one variant of a case in one mode.
BUDGET = 10.0
MIN_ROUNDS = 5
CHECKED_BATCHES = 4


@dataclass(frozen=True)
class Case:
    """A network, the images of a step, and r of its attention."""

    network: str
    batch: int
    reduction: int

    @property
    def name(self) -> str:
        return f"{self.network}-{self.batch}" + (f"-r{self.reduction}" if self.network == "resnet50" else "")

    @property
    def side(self) -> int:
        return 32 if self.network == "resnet164" else 224

    @property
    def blocks(self) -> int:
        return 54 if self.network == "resnet164" else 16

    def variants(self) -> tuple[str, ...]:
        return tuple(v for v in VARIANTS if v != "pytorchcv" or self.reduction == 4)


CASES = (
    Case("resnet164", 32, 4),
    Case("resnet164", 128, 4),
    Case("resnet50", 8, 4),
    Case("resnet50", 8, 20),
)


# --- networks ------------------------------------------------------------------------------------------


def resnet164(variant: str, reduction: int) -> nn.Module:
    if variant == "pytorchcv":
        return get_model("diaresnet164bn_cifar10")
    attention = {"plain": None, "se": "se", "our se": "se"}.get(variant, "dia")
    backend = "reference" if variant == "eager" else None
    return models.create(
        "resnet164",
        attention=attention,
        reduction=None if attention == "se" else reduction,
        backend=backend,
        fold_norm=variant in ("ours", "our se"),
        shared=False if variant == "our se" else None,
    )


def network(case: Case, variant: str) -> nn.Module:
    """The network with the weights of seed 0."""
    torch.manual_seed(0)
    return (resnet164 if case.network == "resnet164" else resnet50)(variant, case.reduction)


def batch(case: Case, seed: int = 0, size: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (size or case.batch, 3, case.side, case.side)
    return torch.randn(shape, generator=generator), torch.randint(0, 10, shape[:1], generator=generator)


def breach(case: Case) -> str | None:
    """How our networks break the accuracy contract, with eager's for a yardstick; None if they do not."""
    return _breach(case, ("ours", "step"), "eager") or _breach(case, ("our se",), "se")


def _breach(case: Case, checked: Sequence[str], eager: str) -> str | None:
    networks = {name: network(case, name) for name in (*checked, eager)} | {"truth": network(case, eager).double()}
    for other in networks.values():  # the same parameters in the same order, under names of their own
        values = networks[eager].state_dict().values()
        other.load_state_dict(dict(zip(other.state_dict(), values, strict=True)))
    record = contract.Accuracy(torch.float32, case.side**2)
    with torch.no_grad():
        for seed in range(CHECKED_BATCHES):
            for other in networks.values():
                other.train(seed % 2 == 0)  # the batch's statistics, then the running ones
            images, _ = batch(case, seed, size=4)
            logits = {name: other(images.to(next(other.parameters()).dtype)) for name, other in networks.items()}
            for name in checked:
                found, yardstick, true = ({f"logits of {name}": logits[key]} for key in (name, eager, "truth"))
                record.add(found, yardstick, true)
    return record.breach()


def call_of(case: Case, variant: str, mode: str, compiled: bool) -> Callable[[], object]:
    """One training step, or one inference."""
    model = network(case, variant).train(mode == "training")
    images, labels = batch(case)
    run = torch.compile(model, dynamic=False) if compiled else model
    if mode == "inference":

        def infer() -> None:
            with torch.no_grad():
                run(images)

        return infer
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(images), labels).backward()
        optimizer.step()

    return train


# --- measurement -----------------------------------------------------------------------------------------


def memory(case: Case, variant: str) -> dict[str, int]:
    """``own_memory`` of a process that does nothing else: networks of several leave up to 19 GB of heap."""
    command = [sys.executable, __file__, "--memory", case.name, variant]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (resident now) or ``VmHWM`` (its peak) of this process, as Linux tells them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def own_memory(case: Case, variant: str) -> dict[str, int]:
    """Bytes: what two training steps add to the ``peak`` of resident memory, and what a forward pass has ``saved``."""
    step = call_of(case, variant, "training", compiled=False)
    before = resident("VmRSS")
    step(), step()
    peak = resident("VmHWM") - before
    del step
    return {"saved": saved_bytes(network(case, variant), batch(case)[0]), "peak": peak}


def serve(case: Case, variant: str, mode: str, compiled: bool) -> None:
    """Calls once for each line of stdin, and writes the seconds it took; an empty line first, when it is ready."""
    call = call_of(case, variant, mode, compiled)
    call()
    with undisturbed():
        print(flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            call()
            print(time.perf_counter() - start, flush=True)


@contextmanager
def served(case: Case, variant: str, mode: str, compiled: bool, threads: int | None) -> Iterator[Callable[[], float]]:
    """What samples a call of a network in a process of its own, in seconds."""
    command = [sys.executable, __file__, "--serve", case.name, variant, mode, *(["--compiled"] if compiled else [])]
    command += ["--threads", str(threads)] if threads else []
    # Compiled anew: torch's cache of graphs does not see a change of our operators.
    fresh = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=fresh, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        answers = process.stdout

        def answer() -> str:
            line = answers.readline()
            if not line:
                raise RuntimeError(f"the process of {case.name}, {variant} in {mode} ended with {process.wait()}")
            return line

        def sample() -> float:
            print(file=process.stdin, flush=True)
            return float(answer())

        answer()
        yield sample
        process.stdin.close()


def in_turns(sample: Callable[[], float], base: Callable[[], float], budget: float) -> list[tuple[float, float]]:
    """Samples of both, a pair a round, either of them first in turn."""
    calls = {"own": sample, "base": base}
    found = rounded(interleaved(calls, budget, MIN_ROUNDS, lambda call, _: cast(float, call()), sample_seconds=0.0))
    return list(zip(found["own"], found["base"], strict=True))


def timed(case: Case, mode: str, variants: Sequence[str], compiled: bool, budget: float, threads: int | None) -> Pairs:
    """Of every variant in one mode, eager or compiled."""
    ending, found = ", compiled" if compiled else "", {}
    with served(case, "plain", mode, compiled, threads) as base:
        for variant in variants:
            if variant != "plain":
                with served(case, variant, mode, compiled, threads) as sample:
                    found[variant + ending] = in_turns(sample, base, budget)
        plain = [of_base for pairs in found.values() for _, of_base in pairs] or [base() for _ in range(MIN_ROUNDS)]
    return {f"plain{ending}": [(seconds, seconds) for seconds in plain]} | found


def measure(case: Case, asked: Sequence[str], timings: Callable[[str, Sequence[str]], Pairs]) -> dict[str, Any]:
    """Everything of one case, as plain data for JSON; ``timings(mode, variants)`` gives the times."""
    wrong = breach(case)
    variants = [v for v in case.variants() if v in asked and (v not in OURS or wrong is None)]
    memories = {v: memory(case, v) for v in variants}
    return {
        "case": asdict(case) | {"network_blocks": case.blocks},
        "name": case.name,
        "wrong": wrong,
        "seconds": {mode: timings(mode, variants) for mode in MODES},
        "saved_bytes": {v: found["saved"] for v, found in memories.items()},
        "peak_bytes": {v: found["peak"] for v, found in memories.items()},
    }


# --- report ----------------------------------------------------------------------------------------------


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Median of the ratios within rounds."""
    return statistics.median(own / base for own, base in pairs)


def label(name: str) -> str:
    variant, comma, rest = name.partition(", ")
    return LABELS[variant] + comma + rest


def mode_table(results: Sequence[dict], mode: str) -> str:
    """Median time of every variant, and its ratio to the plain network of the same kind."""
    names = list(dict.fromkeys(name for result in results for name in result["seconds"][mode]))
    rows = []
    for name in names:
        row = [label(name)]
        for result in results:
            seconds = result["seconds"][mode]
            if name not in seconds:
                row.append(report.WRONG if name.startswith(OURS) and result["wrong"] else report.ABSENT)
                continue
            median = statistics.median(own for own, _ in seconds[name])
            row.append(f"{report.duration(median)} ({ratio(seconds[name]):.2f}x)")
        rows.append(row)
    return report.table([mode, *(result["name"] for result in results)], rows)


def memory_table(results: Sequence[dict]) -> str:
    """MB kept for backward by each block beyond the plain network's, and the peak of a training step."""
    rows = []
    for variant in VARIANTS:
        row = [LABELS[variant]]
        for result in results:
            saved, peak = result["saved_bytes"], result["peak_bytes"]
            if variant not in saved:
                row.append(report.ABSENT)
                continue
            more = (saved[variant] - saved["plain"]) / result["case"]["network_blocks"] / 1e6
            row.append(f"{more:+.2f} / {peak[variant] / 1e6:.0f}")
        rows.append(row)
    return report.table(["MB a block / peak", *(result["name"] for result in results)], rows)


def markdown(document: dict, plot: str) -> str:
    results = document["results"]
    wrong = [f"* {result['name']}: {result['wrong']}" for result in results if result["wrong"]]
    parts = [
        "# Whole networks",
        report.environment_text(document["environment"]),
        "float32, SGD with momentum; names: network, batch, r. Every network in a process of its own; medians of "
        "calls in turn with the same network without attention, and in brackets the time as a multiple of that one's "
        "(median of ratios within rounds).",
        f"![Time of a training step]({plot})",
        *(mode_table(results, mode) for mode in MODES),
        "Memory: MB that each block keeps for the backward pass beyond those of the plain network, and what two "
        "training steps add to the peak of resident memory.",
        memory_table(results),
        "Wrong, so not timed:\n" + ("\n".join(wrong) or "nothing."),
    ]
    return "\n\n".join(parts) + "\n"


COLOURS = {
    "plain": "#8a8f98",
    "se": "#9b6fb6",
    "our se": "#6b3fa0",
    "pytorchcv": "#c9a227",
    "eager": "#e07b39",
    "step": "#7fb2de",
    "ours": "#1f5fa8",
}


def draw(document: dict, path: Path) -> None:
    """Bars of a training step's time as a multiple of the plain network's."""
    results = document["results"]
    figure, axes = plt.subplots(figsize=(1.5 + 2.3 * len(results), 3.8), layout="constrained")
    width = 0.12
    for k, variant in enumerate(VARIANTS):
        points = [
            (i, ratio(pairs))
            for i, result in enumerate(results)
            for name, pairs in result["seconds"]["training"].items()
            if name in (variant, f"{variant}, compiled")
        ]
        bars = axes.bar(
            [i + (k - 3) * width for i, _ in points], [r for _, r in points], 0.94 * width,
            color=COLOURS[variant], label=LABELS[variant],
        )  # fmt: skip
        axes.bar_label(bars, [f"{r:.2f}" for _, r in points], fontsize=7, padding=2)
    axes.axhline(1.0, color="#333333", linewidth=1.0)
    axes.set_xticks(range(len(results)), [result["name"] for result in results])
    axes.set(ylabel="time, no attention = 1", title="Training step", ylim=(0.8, None))
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(document: dict, stem: Path) -> None:
    """The three files of ``document``."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(document, f"{stem.name}.png"), encoding="utf-8")
    draw(document, stem.with_suffix(".png"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Benchmark of whole networks.")
    parser.add_argument("--cases", help=f"comma-separated out of {','.join(case.name for case in CASES)}")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; plain has to be among them")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of samples for each variant and mode")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: as many as it takes by itself)")
    parser.add_argument("--name", help="stem of the three files (default: networks, or networks-compiled)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=3, metavar=("CASE", "VARIANT", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    by_name = {case.name: case for case in CASES}
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(own_memory(by_name[options.memory[0]], options.memory[1])))
        return 0
    if options.serve:
        name, variant, mode = options.serve
        serve(by_name[name], variant, mode, options.compiled)
        return 0
    chosen = options.cases.split(",") if options.cases else list(by_name)
    if unknown := set(chosen) - set(by_name):
        parser.error(f"--cases: no case {', '.join(sorted(unknown))}; expected some of {', '.join(by_name)}")
    asked = options.variants.split(",")
    if "plain" not in asked or (unknown := set(asked) - set(VARIANTS)):
        parser.error(f"--variants: expected plain and some of {', '.join(VARIANTS)}, got {options.variants}")

    stem = options.output / (options.name or ("networks-compiled" if options.compiled else "networks"))
    results: list[dict[str, Any]] = []
    for name in chosen:
        print(f"{name} ...", flush=True)
        case = by_name[name]

        def timings(mode: str, variants: Sequence[str], case: Case = case) -> Pairs:
            return timed(case, mode, variants, options.compiled, options.budget, options.threads)

        results.append(measure(case, asked, timings))
        write({"environment": environment.describe(), "results": results}, stem)
    print("\n\n".join([*(mode_table(results, mode) for mode in MODES), memory_table(results)]))
    return 1 if any(result["wrong"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
