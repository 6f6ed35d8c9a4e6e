"""Draws the GPU step: what the blocks of a team do, and where they meet.

    python docs/draw_gpu_step.py

Writes ``gpu_step.png`` beside itself.
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
from matplotlib.patches import FancyBboxPatch

MAP, CELL, BARRIER = "#1f5fa8", "#c9a227", "#b3402f"
OWNERS = 3


@dataclass(frozen=True)
class Phase:
    """What every block does between two meetings: ``width`` on the paper, of maps or of the cell's tables."""

    text: str
    width: float
    colour: str


#: None is a meeting of the team.
FORWARD: tuple[Phase | None, ...] = (
    Phase("own x\n→ chip", 2.0, MAP),
    Phase("own means;\nhidden\nbottleneck", 1.6, CELL),
    None,
    Phase("own rows of\nthe input\nbottleneck", 1.6, CELL),
    None,
    Phase("gates, c', h'\nof own\nchannels", 1.6, CELL),
    Phase("y = act(x h' + s)\nfrom the chip", 2.6, MAP),
)
BACKWARD: tuple[Phase | None, ...] = (
    Phase("g = dy masked → chip\nand dshortcut;\nx streams: sums of x g", 2.9, MAP),
    Phase("du, own part\nof dz", 1.5, CELL),
    None,
    Phase("some dz,\nall owners'\nparts", 1.4, CELL),
    None,
    Phase("dp, dh of\nown channels", 1.5, CELL),
    Phase("dx = g h' + dp / HW\nfrom the chip", 2.6, MAP),
)


def draw_direction(axes: Axes, title: str, phases: Sequence[Phase | None]) -> None:
    """A row for each owner, time to the right."""
    height, gap = 1.0, 0.25
    for owner in range(OWNERS):
        y = -owner * (height + gap)
        axes.text(-0.15, y + height / 2, f"block {owner}\nits channels", ha="right", va="center", fontsize=8)
        x = 0.0
        for phase in phases:
            if phase is None:
                x += 0.3
                continue
            box = FancyBboxPatch((x, y), phase.width - 0.08, height, boxstyle="round,pad=0,rounding_size=0.08")
            box.set(facecolor=phase.colour, edgecolor="none", alpha=0.9)
            axes.add_patch(box)
            if owner == 0:
                middle = (x + phase.width / 2 - 0.04, y + height / 2)
                axes.text(*middle, phase.text, ha="center", va="center", fontsize=7, color="white")
            x += phase.width
    x = 0.0
    low, high = -(OWNERS - 1) * (height + gap) - 0.15, height + 0.15
    for phase in phases:
        if phase is None:
            axes.plot([x + 0.11] * 2, [low, high], color=BARRIER, linewidth=3, solid_capstyle="round")
            axes.text(x + 0.11, high + 0.05, "team", color=BARRIER, fontsize=8, ha="center", va="bottom")
        x += 0.3 if phase is None else phase.width
    axes.set(xlim=(-1.4, x + 0.1), ylim=(low - 0.1, high + 0.5))
    axes.set_title(title, fontsize=10, loc="left")
    axes.axis("off")


def draw(path: Path) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 6), layout="constrained")
    draw_direction(above, "Forward, a group of samples: x read once, shortcut read once, y written once", FORWARD)
    draw_direction(below, "Backward: dy, y, x read once; dshortcut, dx written once", BACKWARD)
    handles = [plt.Line2D([], [], color=c, linewidth=8) for c in (MAP, CELL)]
    handles.append(plt.Line2D([], [], color=BARRIER, linewidth=3))
    names = ["moves the map", "the cell: small tables", "barrier of the team"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws the GPU step.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "gpu_step.png")
    draw(parser.parse_args(arguments).output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
