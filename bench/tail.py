"""Times the tail of a residual block in training: batch norm, attention, shortcut and ReLU, forward and backward.

    python bench/tail.py                      every shape, both layouts (about 15 minutes on two cores)
    python bench/tail.py --without compile    without torch.compile
    python bench/tail.py --shapes 32x512x28x28,32x2048x7x7r20
    python bench/tail.py --cell se            another cell than the LSTM: ``dsu``, ``se``, ``eca``, ``srm``, ``cbam``

Implementations: ``plain`` (batch norm, addition, ReLU: the block without attention), ``eager`` (batch norm and the
attention step in plain PyTorch), ``step`` (batch norm, then our step), ``ours`` (the batch norm folded in), and
``plain`` and ``eager`` under torch.compile. Ours is first held to the accuracy contract, on results and gradients; if
it breaks it, it has no time. Writes ``results/tail.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contract
import environment
import matplotlib
import report
import torch
from timing import Samples, interleaved, rounded, undisturbed
from torch import Tensor, nn
from unfused import EagerAttention

from dia_kernels import SharedAttention, create_attention
from dia_kernels.functional import STD_EPS

matplotlib.use("Agg")

import matplotlib.pyplot as plt

LABELS = {
    "plain": "no attention",
    "plain, compiled": "no attention, compiled",
    "eager": "attention, eager",
    "eager, compiled": "attention, compiled",
    "step": "norm, then our attention",
    "ours": "ours, norm folded in",
}
#: Cells that can be timed, and whether they have a state (h, c).
CELLS = {"lstm": True, "dsu": True, "se": False, "eca": False, "srm": False, "cbam": False}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: Seconds of samples for each shape and layout.
BUDGET = 12.0
#: Random draws to check: of maps of so many elements, and of smaller ones, whose largest errors are of few values.
DRAWS, LARGE, DRAWS_OF_SMALL = 3, 1 << 20, 12


@dataclass(frozen=True)
class Shape:
    """N x C x H x W, and r of the attention."""

    n: int
    c: int
    h: int
    w: int
    reduction: int = 4

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads ``32x256x56x56`` or ``32x2048x7x7r20``."""
        size, _, reduction = text.partition("r")
        parts = size.split("x")
        if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in (*parts, reduction or "4")):
            raise ValueError(
                f"shape: expected four positive numbers as in 32x256x56x56 or 32x2048x7x7r20, got {text!r}"
            )
        return cls(*map(int, parts), int(reduction or 4))

    @property
    def name(self) -> str:
        return f"{self.n}x{self.c}x{self.h}²" + (f", r = {self.reduction}" if self.reduction != 4 else "")


#: Where the target is a geometric mean, and where it is a limit for each.
MEAN_SHAPES = (
    Shape(32, 256, 56, 56),
    Shape(32, 512, 28, 28),
    Shape(128, 64, 32, 32),
    Shape(128, 128, 16, 16),
    Shape(32, 64, 32, 32),
)
LIMITED_SHAPES = (Shape(32, 1024, 14, 14), Shape(128, 256, 8, 8), Shape(32, 2048, 7, 7, 20))
MEAN_TARGET, LIMIT = 0.85, 1.2


class PlainTail(nn.Module):
    """The tail without attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, z: Tensor, shortcut: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(self.norm(z) + shortcut),)


class EagerTail(nn.Module):
    """Batch norm, then the attention as a user writes it."""

    def __init__(self, channels: int, reduction: int, cell: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.attention = (
            EagerAttention(channels, reduction) if cell == "lstm" else create_attention(cell, channels, reduction).cell
        )

    def rescaled(self, x: Tensor, *state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A map behind its norm, by the attention, before the addition; and the state."""
        if isinstance(self.attention, EagerAttention):
            after = self.attention.cell(x, state)
            scale = after[0]
        else:
            scale, after = self.attention(statistics_of(self.attention.statistics, x, (2, 3)), state or None)
        y = x * scale[..., None, None]
        if not isinstance(self.attention, EagerAttention) and self.attention.position_statistics:
            y = y * self.attention.position_scale(statistics_of(self.attention.position_statistics, y, 1))[:, None]
        return y, after if state else ()

    def forward(self, z: Tensor, shortcut: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, after = self.rescaled(self.norm(z), *state)
        return torch.relu(y + shortcut), *after


def statistics_of(names: Sequence[str], x: Tensor, dims: int | tuple[int, ...]) -> Tensor | tuple[Tensor, ...]:
    """What a cell wants to know of a map, as a user writes it."""
    by_name = {
        "mean": lambda: x.mean(dims), "max": lambda: x.amax(dims), "std": lambda: (x.var(dims) + STD_EPS).sqrt()
    }  # fmt: skip
    found = tuple(by_name[name]() for name in names)
    return found[0] if len(found) == 1 else found


class OurTail(nn.Module):
    """Ours, with the batch norm folded in or before it."""

    def __init__(self, channels: int, reduction: int, cell: str, folded: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.attention = create_attention(cell, channels, reduction)
        self.folded = folded

    def forward(self, z: Tensor, shortcut: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        if self.folded:
            y, after = self.attention(z, state or None, norm=self.norm, shortcut=shortcut, activation="relu")
        else:
            y, after = self.attention(self.norm(z), state or None, shortcut=shortcut, activation="relu")
        return y, *(after if state else ())


@dataclass
class Problem:
    """What comes into a tail, and which gradients come back to it."""

    inputs: tuple[Tensor, ...]  # z, shortcut and the state, of cells that have one
    cotangents: tuple[Tensor, ...]

    def double(self) -> Problem:
        inputs = tuple(t.detach().double().requires_grad_() for t in self.inputs)
        return Problem(inputs, tuple(t.double() for t in self.cotangents))


def common_name(name: str) -> str:
    """A parameter's name in our modules, from that in eager ones: there the LSTM's layers are no modules."""
    return name.replace("_reduce.", "_reduce_").replace("_expand.", "_expand_")


def modules_of(shape: Shape, cell: str) -> dict[str, nn.Module]:
    """All modules, those with attention with the same weights."""
    torch.manual_seed(0)
    eager = EagerTail(shape.c, shape.reduction, cell)
    nn.init.uniform_(eager.norm.weight, 0.5, 1.5)
    nn.init.normal_(eager.norm.bias)
    modules: dict[str, nn.Module] = {"plain": PlainTail(shape.c), "eager": eager}
    for name in ("step", "ours"):
        modules[name] = OurTail(shape.c, shape.reduction, cell, name == "ours")
        own = modules[name].attention
        (own if isinstance(own, SharedAttention) else own.cell).load_state_dict(
            {common_name(k) if cell == "lstm" else k: v for k, v in eager.attention.state_dict().items()}
        )
        modules[name].norm.load_state_dict(eager.norm.state_dict())
    return modules


def problem_of(shape: Shape, cell: str, layout: str, seed: int, eager: EagerTail) -> Problem:
    """Random inputs whose sum before the ReLU stays clear of 0, see ``contract.away_from_kink``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        t = torch.randn(size, generator=generator)
        return t.contiguous(memory_format=LAYOUTS[layout]) if t.ndim == 4 else t.sigmoid()

    size = (shape.n, shape.c, shape.h, shape.w)
    tables = 2 if CELLS[cell] else 0
    z, shortcut, *state = draw(*size), draw(*size), *(draw(*size[:2]) for _ in range(tables))
    with torch.no_grad():
        x = torch.nn.functional.batch_norm(z, None, None, eager.norm.weight, eager.norm.bias, training=True)
        shortcut = contract.away_from_kink(shortcut, eager.rescaled(x, *state)[0] + shortcut)
    inputs = tuple(t.requires_grad_() for t in (z, shortcut, *state))
    return Problem(inputs, (draw(*size), *(draw(*size[:2]) for _ in range(tables))))


def results(module: nn.Module, problem: Problem) -> contract.Tensors:
    names = ["z", "shortcut", "h", "c"][: len(problem.inputs)]
    parameters = {common_name(name.replace(".cell.", ".")): p for name, p in module.named_parameters()}
    leaves = dict(zip(names, problem.inputs, strict=True)) | parameters
    return contract.gradients(lambda: module(*problem.inputs), leaves, problem.cotangents)


def breach(shape: Shape, cell: str, layout: str) -> str | None:
    """How our tail breaks the accuracy contract; None if it does not."""
    modules = modules_of(shape, cell)
    truth = modules_of(shape, cell)["eager"].double()
    record = contract.Accuracy(torch.float32, max(shape.h * shape.w * shape.n, 4 * shape.c))
    large = shape.n * shape.c * shape.h * shape.w >= LARGE
    # Norms within a cell make much of rounding, eager's and ours, and now and then very much. (Of CBAM there cannot be
    # many: one in some million of its maxima is another element's by rounding.)
    large = large and not (cell == "srm" and shape.n * shape.c * shape.h * shape.w < 8 * LARGE)
    draws = (DRAWS if large else DRAWS_OF_SMALL) * {"srm": 4, "cbam": 2}.get(cell, 1)
    for seed in range(draws):
        problem = problem_of(shape, cell, layout, seed, modules["eager"])
        found = [results(modules[name], problem) for name in ("ours", "eager")]
        record.add(*found, results(truth, problem.double()))
    return record.breach()


def call_of(module: Callable, parameters: Sequence[Tensor], problem: Problem) -> Callable[[], None]:
    """Forward and backward into fresh gradients."""
    leaves = (*problem.inputs, *parameters)

    def train() -> None:
        for leaf in leaves:
            leaf.grad = None
        outputs = module(*problem.inputs)
        torch.autograd.backward(outputs, problem.cotangents[: len(outputs)])

    return train


def measure(shape: Shape, layout: str, compiled: bool, budget: float, cell: str = "lstm") -> dict[str, Any]:
    wrong = breach(shape, cell, layout)
    modules = modules_of(shape, cell)
    problem = problem_of(shape, cell, layout, 0, modules["eager"])
    torch._dynamo.reset()
    calls = {}
    for name, module in modules.items():
        if name in ("ours", "step") and wrong:
            continue
        calls[name] = call_of(module, tuple(module.parameters()), problem)
        if compiled and name in ("plain", "eager"):
            calls[f"{name}, compiled"] = call_of(
                torch.compile(module, dynamic=False), tuple(module.parameters()), problem
            )
    with undisturbed():
        seconds = interleaved({name: calls[name] for name in LABELS if name in calls}, budget)
    group = "mean" if shape in MEAN_SHAPES else "limit" if shape in LIMITED_SHAPES else ""
    group = group if cell == "lstm" else ""  # nothing was wanted of others
    return {"shape": shape.name, "layout": layout, "group": group, "wrong": wrong, "seconds": rounded(seconds)}


# --- report ----------------------------------------------------------------------------------------------


def ratio(seconds: Samples, name: str) -> float:
    """Median of the ratios to the plain eager tail within rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))


def layout_table(found: Sequence[dict]) -> str:
    names = [name for name in LABELS if any(name in result["seconds"] for result in found)]
    rows = []
    for result in found:
        seconds = result["seconds"]
        row = [result["shape"]]
        for name in names:
            if name not in seconds:
                row.append(report.WRONG if result["wrong"] else report.ABSENT)
            elif name == "plain":
                row.append(report.duration(statistics.median(seconds[name])))
            else:
                row.append(f"{ratio(seconds, name):.2f}")
        rows.append(row)
    return report.table(["N x C x HW", *(LABELS[name] for name in names)], rows)


def target_text(results: Sequence[dict]) -> str:
    lines = []
    for layout in dict.fromkeys(result["layout"] for result in results):
        here = [result for result in results if result["layout"] == layout and "ours" in result["seconds"]]
        mean = [ratio(result["seconds"], "ours") for result in here if result["group"] == "mean"]
        if mean:
            value = statistics.geometric_mean(mean)
            verdict = "reached" if value <= MEAN_TARGET else "missed"
            scope = f"{layout}, geometric mean of {len(mean)} of {len(MEAN_SHAPES)} shapes"
            lines.append(f"* {scope}: {value:.2f}, at most {MEAN_TARGET} wanted: {verdict}")
        for result in here:
            if result["group"] == "limit":
                value = ratio(result["seconds"], "ours")
                verdict = "reached" if value <= LIMIT else "missed"
                lines.append(f"* {layout}, {result['shape']}: {value:.2f}, at most {LIMIT} wanted: {verdict}")
    return "\n".join(lines)


def markdown(document: dict, plot: str) -> str:
    results = document["results"]
    parts = [
        f"# The tail of a block, with attention (cell: {document['cell']}) and without",
        report.environment_text(document["environment"]),
        "float32, training, forward + backward. The first column is the time of batch norm, addition and ReLU in eager "
        "PyTorch; all others are multiples of it (medians of ratios within rounds). r = 4 where nothing else is said.",
        f"![Tail]({plot})",
        target_text(results),
    ]
    for layout in dict.fromkeys(result["layout"] for result in results):
        found = [result for result in results if result["layout"] == layout]
        parts += [f"## {layout}", layout_table(found)]
    wrong = [f"* {r['shape']}, {r['layout']}: {r['wrong']}" for r in results if r["wrong"]]
    parts.append("Wrong, so not timed:\n" + ("\n".join(wrong) or "nothing."))
    return "\n\n".join(parts) + "\n"


COLOURS = {"eager": "#e07b39", "eager, compiled": "#c9a227", "step": "#7fb2de", "ours": "#1f5fa8"}


def draw(document: dict, path: Path) -> None:
    """Bars: time as a multiple of the plain eager tail's."""
    results = document["results"]
    layouts = list(dict.fromkeys(result["layout"] for result in results))
    figure, grid = plt.subplots(len(layouts), 1, figsize=(11, 3.4 * len(layouts)), squeeze=False, layout="constrained")
    for (axes,), layout in zip(grid, layouts, strict=True):
        found = [result for result in results if result["layout"] == layout]
        for k, (name, colour) in enumerate(COLOURS.items()):
            points = [(i, ratio(r["seconds"], name)) for i, r in enumerate(found) if name in r["seconds"]]
            bars = axes.bar(
                [i + (k - 1.5) * 0.2 for i, _ in points], [v for _, v in points], 0.19, color=colour, label=LABELS[name]
            )
            axes.bar_label(bars, [f"{v:.2f}" for _, v in points], fontsize=7, padding=2)
        axes.axhline(1.0, color="#333333", linewidth=1.0)
        axes.set_xticks(range(len(found)), [result["shape"] for result in found])
        axes.set(title=f"Tail, forward + backward, {layout}", ylabel="time, no attention = 1")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8, ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Benchmark of the tail of a residual block.")
    parser.add_argument("--shapes", help="comma-separated, as in 32x256x56x56,32x2048x7x7r20 (default: all eight)")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated (default: both)")
    parser.add_argument("--cell", choices=tuple(CELLS), default="lstm")
    parser.add_argument("--without", choices=("compile",), help="leave out torch.compile")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of samples for each shape and layout")
    parser.add_argument("--name", default="tail", help="stem of the three files")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    shapes = tuple(map(Shape.parse, options.shapes.split(","))) if options.shapes else (*MEAN_SHAPES, *LIMITED_SHAPES)
    results = []
    for layout in options.layouts.split(","):
        for shape in shapes:
            result = measure(shape, layout, options.without != "compile", options.budget, options.cell)
            print(layout_table([result]).splitlines()[-1], layout, flush=True)
            results.append(result)
    document = {"environment": environment.describe(), "cell": options.cell, "results": results}
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / options.name
    rows = ",\n".join(json.dumps(result) for result in results)
    head = f'"environment": {json.dumps(document["environment"])},\n"cell": "{options.cell}"'
    stem.with_suffix(".json").write_text(f'{{{head},\n"results": [\n{rows}\n]}}\n')
    stem.with_suffix(".md").write_text(markdown(document, f"{options.name}.png"), encoding="utf-8")
    draw(document, stem.with_suffix(".png"))
    print(target_text(results))
    return 1 if any(result["wrong"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
