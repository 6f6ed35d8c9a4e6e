"""Draws a step on a GPU as one kernel: the order of its tasks, and what each waits for.

    python docs/draw_gpu_flow.py

Writes ``gpu_flow.png`` beside itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

MAP, CELL, WAIT = "#1f5fa8", "#c9a227", "#b3402f"
TURNS, CHUNKS = 6, 4


@dataclass(frozen=True)
class Phase:
    """A place in each turn: of the chunk so many turns before, with some tasks."""

    name: str
    behind: int
    tasks: int
    colour: str


#: In their order within a turn (csrc/kernels/flow.h).
PHASES = (
    Phase("reduce", 0, 6, MAP),
    Phase("bottleneck", 1, 2, CELL),
    Phase("spread", 2, 6, MAP),
    Phase("cell", 1, 2, CELL),
)
#: What a phase waits for, of the same chunk.
WAITS = {"bottleneck": "reduce", "cell": "bottleneck", "spread": "cell"}


def draw_turns(axes: Axes) -> None:
    """A row a turn, a box a task, in the order in which blocks take them."""
    width, height, step = 0.62, 0.62, 1.5
    places: dict[tuple[str, int], tuple[float, float, float]] = {}
    for turn in range(TURNS):
        y, x = -turn * step, 0.0
        axes.text(-0.3, y + height / 2, f"turn {turn}", ha="right", va="center", fontsize=9)
        for phase in PHASES:
            chunk = turn - phase.behind
            there = 0 <= chunk < CHUNKS
            for task in range(phase.tasks):
                box = FancyBboxPatch(
                    (x + task * width, y), width - 0.08, height, boxstyle="round,pad=0,rounding_size=0.06"
                )
                box.set(facecolor=phase.colour if there else "#e6e6e6", edgecolor="none", alpha=0.9)
                axes.add_patch(box)
            if there:
                middle = x + phase.tasks * width / 2
                axes.text(middle, y - 0.1, f"{phase.name} {chunk}", ha="center", va="top", fontsize=8)
                places[phase.name, chunk] = (middle, y, y + height)
            x += phase.tasks * width + 0.25
    chunk = 1
    for name, before in WAITS.items():
        (x_to, low_to, high_to), (x_from, low_from, high_from) = places[name, chunk], places[before, chunk]
        same = low_to == low_from
        arrow = FancyArrowPatch(
            (x_from, high_from if same else low_from - 0.4),
            (x_to, high_to),
            arrowstyle="-|>",
            mutation_scale=12,
            color=WAIT,
            linewidth=1.6,
            connectionstyle="arc3,rad=-0.25" if same else "arc3,rad=0",
            zorder=3,
        )
        axes.add_patch(arrow)
    axes.set(xlim=(-1.4, 11.4), ylim=(-(TURNS - 1) * step - 0.6, height + 0.5))
    axes.axis("off")


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 5.6), layout="constrained")
    draw_turns(axes)
    axes.set_title(
        "Tasks in the order in which blocks take them: a box each; numbers are chunks of samples", fontsize=10
    )
    handles = [plt.Line2D([], [], color=colour, linewidth=8) for colour in (MAP, CELL)]
    handles.append(plt.Line2D([], [], color=WAIT, linewidth=2))
    names = ["moves the map", "the cell: small tables", "what chunk 1 waits for"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws a step on a GPU as one kernel.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "gpu_flow.png")
    draw(parser.parse_args(arguments).output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
