"""From the JSON of a benchmark run to a Markdown table and a plot.

Speed-ups are medians of ratios within a round, never ratios of medians of different rounds: what slows
the machine down for a while slows all implementations of a round alike. An implementation that was
found wrong has no samples, so it shows as "wrong" and enters no mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Result = dict[str, Any]

LABELS = {
    "copy": "copy",
    "plain": "no attention",
    "eager": "eager",
    "compile": "torch.compile",
    "fused": "ours",
    "eager_inplace": "eager in place",
    "fused_inplace": "ours in place",
}
ABSENT = "-"
WRONG = "wrong"


@dataclass(frozen=True)
class View:
    """One of our implementations in one mode, and what it is set against."""

    title: str
    mode: str
    ours: str
    peers: tuple[str, ...]


VIEWS = (
    View("Forward, no gradients", "forward", "fused", ("eager", "compile", "plain")),
    View("Forward + backward", "training", "fused", ("eager", "compile", "plain")),
    View("In-place inference", "forward", "fused_inplace", ("eager", "eager_inplace", "compile", "plain")),
)


@dataclass(frozen=True)
class Target:
    """A speed-up to reach as a geometric mean over the target shapes with maps larger than ``over_bytes``."""

    view: View
    peer: str
    speedup: float
    over_bytes: float = 0.0

    @property
    def name(self) -> str:
        where = f", maps over {self.over_bytes / 1e6:.0f} MB" if self.over_bytes else ""
        return f"{self.view.title}{where}, against {LABELS[self.peer]}"


TARGETS = (
    Target(VIEWS[0], "eager", 1.8),
    Target(VIEWS[0], "compile", 1.2),
    Target(VIEWS[1], "eager", 2.5),
    Target(VIEWS[1], "compile", 3.0),
    Target(VIEWS[2], "eager", 3.0, over_bytes=32e6),
)


# --- figures ---------------------------------------------------------------------------------------


def median_seconds(result: Result, name: str) -> float | None:
    samples = result["seconds"].get(name)
    return statistics.median(samples) if samples else None


def speedup(result: Result, ours: str, peer: str) -> float | None:
    """How many times faster ``ours`` is than ``peer``; None where one of them has no samples."""
    fast, slow = result["seconds"].get(ours), result["seconds"].get(peer)
    if not fast or not slow:
        return None
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def gigabytes_per_second(result: Result, ours: str) -> float | None:
    """Ideal traffic over time."""
    seconds = median_seconds(result, ours)
    return None if seconds is None else result["ideal_maps"] * result["map_bytes"] / seconds / 1e9


def share_of_copy(result: Result, ours: str) -> float | None:
    """Ideal traffic over time, as a part of what a copy (which moves two maps) reaches."""
    ratio = speedup(result, ours, "copy")
    return None if ratio is None else ratio * result["ideal_maps"] / 2


def of_view(results: Iterable[Result], view: View, layout: str) -> list[Result]:
    return [result for result in results if result["mode"] == view.mode and result["layout"] == layout]


def geometric_mean(results: Sequence[Result], target: Target, layout: str) -> tuple[float | None, int, int]:
    """The mean speed-up, how many shapes it covers, and how many of the target's shapes were run."""
    counted = [
        result
        for result in of_view(results, target.view, layout)
        if result["in_targets"] and result["map_bytes"] > target.over_bytes
    ]
    ratios = [ratio for r in counted if (ratio := speedup(r, target.view.ours, target.peer)) is not None]
    return statistics.geometric_mean(ratios) if ratios else None, len(ratios), len(counted)


def layouts(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(result["layout"] for result in results))


# --- Markdown --------------------------------------------------------------------------------------


def shape_name(result: Result) -> str:
    n, c, h, w = result["shape"]
    return f"{n}x{c}x{h}²" if h == w else f"{n}x{c}x{h}x{w}"


def three_digits(value: float) -> str:
    """``value`` > 0 with three significant digits and no exponent."""
    decimals = max(2 - math.floor(math.log10(value)), 0)
    return f"{value:.{decimals}f}"


def duration(seconds: float) -> str:
    return f"{three_digits(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{three_digits(seconds * 1e6)} µs"


def cell(result: Result, ours: str, value: float | None, form: Callable[[float], str]) -> str:
    """``value`` as text, or why there is none."""
    if value is not None:
        return form(value)
    return WRONG if ours in result["wrong"] else ABSENT


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def view_table(results: Sequence[Result], view: View) -> str:
    """Times of ours and the peers, our speed-ups, and the traffic that ours reaches."""
    peers = [peer for peer in view.peers if any(peer in result["seconds"] for result in results)]
    header = ["N x C x HW", *(LABELS[peer] for peer in peers), LABELS[view.ours]]
    header += [f"x {LABELS[peer]}" for peer in peers] + ["GB/s", "of copy"]
    rows = []
    for result in results:
        row = [shape_name(result)]
        row += [cell(result, name, median_seconds(result, name), duration) for name in (*peers, view.ours)]
        row += [cell(result, view.ours, speedup(result, view.ours, peer), "{:.2f}".format) for peer in peers]
        row.append(cell(result, view.ours, gigabytes_per_second(result, view.ours), "{:.1f}".format))
        row.append(cell(result, view.ours, share_of_copy(result, view.ours), "{:.0%}".format))
        rows.append(row)
    return table(header, rows)


def target_table(results: Sequence[Result]) -> str:
    """Every target beside what was reached in each layout."""
    found = layouts(results)
    rows = []
    for target in TARGETS:
        row = [target.name, f"{target.speedup:.1f}"]
        for layout in found:
            mean, covered, ran = geometric_mean(results, target, layout)
            verdict = "reached" if mean is not None and mean >= target.speedup else "missed"
            row.append(ABSENT if mean is None else f"{mean:.2f} {verdict} ({covered} of {ran})")
        rows.append(row)
    return table(["geometric mean of speed-ups (shapes counted of those run)", "target", *found], rows)


def slower_than_eager(results: Iterable[Result]) -> list[str]:
    """Where ours takes longer than eager: there should be no such place."""
    found = []
    for result in results:
        for view in VIEWS:
            ratio = speedup(result, view.ours, "eager") if view.mode == result["mode"] else None
            if ratio is not None and ratio < 1.0:
                found.append(f"{view.title}, {shape_name(result)}, {result['layout']}: {ratio:.2f}x")
    return found


def wrong_results(results: Iterable[Result]) -> list[str]:
    return [
        f"{LABELS[name]}, {result['mode']}, {shape_name(result)}, {result['layout']}: {reason}"
        for result in results
        for name, reason in result["wrong"].items()
    ]


def host_table(results: Sequence[Result]) -> str | None:
    """Microseconds a call at batch 1, and how many of them the host takes; None where not measured."""
    measured = [result for result in results if result["host_seconds"]]
    names = [name for name in LABELS if any(name in result["host_seconds"] for result in measured)]
    rows = []
    for result in measured:
        row = [f"{shape_name(result)} {result['mode']}"]
        for name in names:
            host = result["host_seconds"].get(name)
            total = median_seconds(result, name)
            own = None if host is None or total is None else statistics.median(host)
            row.append(
                cell(result, name, own, lambda s, total=total: f"{three_digits(total * 1e6)} ({three_digits(s * 1e6)})")
            )
        rows.append(row)
    return table(["N x C x HW", *(LABELS[name] for name in names)], rows) if rows else None


def environment_text(environment: dict[str, Any]) -> str:
    e = environment
    return (
        f"{e['date']}, {e['processor']} ({e['cores']} cores, {e['vector_instructions']}), {e['threads']} threads, "
        f"{e['system']}, Python {e['python']}, torch {e['torch']}, dia_kernels {e['dia_kernels']}, "
        f"backend: {e['backend']}."
    )


def bullets(items: Sequence[str], none: str) -> str:
    return "\n".join(f"* {item}" for item in items) if items else none


def summary(document: dict[str, Any]) -> str:
    """Targets beside what was reached, and whatever speaks against us."""
    results = document["results"]
    return "\n\n".join(
        (
            target_table(results),
            "Slower than eager:\n" + bullets(slower_than_eager(results), "nothing."),
            "Wrong, so not timed:\n" + bullets(wrong_results(results), "nothing."),
        )
    )


def markdown(document: dict[str, Any], plot: str) -> str:
    """The whole report; ``plot`` is the file name of the picture beside it."""
    results = document["results"]
    dtypes = ", ".join(dict.fromkeys(result["dtype"] for result in results))
    parts = [
        f"# The attention step against its peers, {dtypes}",
        environment_text(document["environment"]),
        "How to read this: [README.md](../README.md). Times are medians; `x eager` is how many times faster we are.",
        f"![Speed-up of the fused step]({plot})",
        "## Targets",
        summary(document),
    ]
    for view in VIEWS:
        for layout in layouts(results):
            parts += [f"## {view.title}, {layout}", view_table(of_view(results, view, layout), view)]
    host = host_table(results)
    if host is not None:
        parts += ["## One sample: microseconds a call (of which on the host)", host]
    return "\n\n".join(parts) + "\n"


# --- plot ------------------------------------------------------------------------------------------

PLOTTED = {"eager": "#3b6fb6", "compile": "#e08a2e"}
BAR_WIDTH = 0.38


def draw_bars(axes: Axes, results: Sequence[Result], view: View) -> None:
    """Speed-ups of one view in one layout: a group of bars for each shape."""
    peers = [peer for peer in PLOTTED if any(peer in result["seconds"] for result in results)]
    for k, peer in enumerate(peers):
        ratios = [speedup(result, view.ours, peer) for result in results]
        places = [i + (k - 0.5) * BAR_WIDTH for i, ratio in enumerate(ratios) if ratio is not None]
        heights = [ratio for ratio in ratios if ratio is not None]
        # Bars stand on 1.0: above it we are faster, below it slower.
        bars = axes.bar(
            places,
            [h - 1.0 for h in heights],
            BAR_WIDTH * 0.94,
            1.0,
            color=PLOTTED[peer],
            label=f"against {LABELS[peer]}",
        )
        texts = [f"{height:.1f}" for height in heights]
        axes.bar_label(bars, texts, padding=2, fontsize=7, color="#333333")
    for i, result in enumerate(results):
        if view.ours in result["wrong"]:
            axes.text(i, 1.0, f" {WRONG}", rotation=90, ha="center", va="bottom", color="#b22222")
    axes.axhline(1.0, color="#333333", linewidth=1.0)
    axes.set_xticks(
        range(len(results)), [shape_name(result) for result in results], rotation=35, ha="right", rotation_mode="anchor"
    )


def share_log_axis(grid: Sequence[Sequence[Axes]]) -> None:
    """One log2 scale for all panels, from half speed or lower to a little above the tallest bar."""
    low = min(axes.dataLim.y0 for row in grid for axes in row)
    high = max(axes.dataLim.y1 for row in grid for axes in row)
    for row in grid:
        for axes in row:
            axes.set_yscale("log", base=2)
            axes.set_ylim(min(low, 1.0) * 0.75, max(high, 2.0) * 1.4)
            axes.yaxis.set_major_formatter("{x:g}x")
            axes.grid(axis="y", color="#dddddd", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes the picture: a row of panels for each view, a column for each layout."""
    results = document["results"]
    columns = layouts(results)
    shapes = max(len(of_view(results, view, layout)) for view in VIEWS for layout in columns)
    size = (max(1.1 + 0.62 * shapes, 5.5) * len(columns), 2.6 * len(VIEWS) + 1.0)
    figure, grid = plt.subplots(
        len(VIEWS), len(columns), figsize=size, sharex="col", squeeze=False, layout="constrained"
    )
    for row, view in zip(grid, VIEWS, strict=True):
        for axes, layout in zip(row, columns, strict=True):
            draw_bars(axes, of_view(results, view, layout), view)
            axes.set_title(f"{view.title}, {layout}", fontsize=10, loc="left")
        row[0].set_ylabel("speed-up of ours")
    share_log_axis(grid)
    grid[0][0].legend(frameon=False, fontsize=8, loc="upper right")
    environment = document["environment"]
    figure.suptitle(
        f"One step of shared attention, {results[0]['dtype']}\n{environment['processor']}, "
        f"{environment['threads']} threads, torch {environment['torch']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
