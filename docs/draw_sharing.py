"""Draws docs/sharing.png: a stage of a residual network before and after ``share_attention``.

python docs/draw_sharing.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

PLAIN, FUSED, UNIT = "#e8eef7", "#cfe8cf", "#f6d9a8"
BLOCKS = 3
BLOCK_WIDTH, GAP = 4.6, 1.5


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 9) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=colour, edgecolor="#444444"
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", **style) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": "#222222", "shrinkA": 0, "shrinkB": 0, **style}
    )
    if text:
        axes.text((start[0] + end[0]) / 2, start[1] + 0.14, text, ha="center", va="bottom", fontsize=8)


def block(axes: Axes, x: float, name: str, shared: bool) -> None:
    """Branch, shortcut and tail of a block whose left edge is at ``x``."""
    axes.add_patch(
        FancyBboxPatch(
            (x, 0), BLOCK_WIDTH, 2.3, boxstyle="round,pad=0.02,rounding_size=0.15", facecolor="none",
            edgecolor="#999999", linestyle="--",
        )
    )  # fmt: skip
    axes.text(x + 0.1, 2.36, name, fontsize=8, color="#555555")
    if shared:
        box(axes, x + 0.5, 1.2, 1.5, 0.7, "convolutions", PLAIN)
        box(axes, x + 2.35, 0.35, 2.0, 1.6, "act(norm(z) h\n+ shortcut)\none call", FUSED)
        arrow(axes, (x + 2.0, 1.55), (x + 2.35, 1.55))
        arrow(axes, (x + 0.2, 0.6), (x + 2.35, 0.6))
    else:
        box(axes, x + 0.5, 1.2, 1.5, 0.7, "convolutions", PLAIN)
        for place, text in enumerate(("norm", "add", "act")):
            box(axes, x + 2.3 + 0.75 * place, 1.2, 0.6, 0.7, text, PLAIN)
            arrow(axes, (x + (2.15 + 0.75 * place if place else 2.0), 1.55), (x + 2.3 + 0.75 * place, 1.55))
        arrow(axes, (x + 0.2, 0.6), (x + 3.35, 1.2), connectionstyle="angle,angleA=0,angleB=90,rad=3")
    axes.plot([x, x + 0.2, x + 0.2, x + 0.5], [1.0, 1.0, 1.55, 1.55], color="#222222", linewidth=1)
    axes.plot([x + 0.2, x + 0.2], [1.0, 0.6], color="#222222", linewidth=1)


def stage(axes: Axes, shared: bool) -> None:
    for index in range(BLOCKS):
        x = index * (BLOCK_WIDTH + GAP)
        block(axes, x, f"layer1.{index}", shared)
        carried = "(map, state)" if shared and index > 0 else "map"
        arrow(axes, (x - (GAP if index else 0.9), 1.0), (x, 1.0), carried)
    end = BLOCKS * (BLOCK_WIDTH + GAP) - GAP
    arrow(axes, (end, 1.0), (end + 0.9, 1.0), "map")
    if shared:
        box(axes, 2.35, -1.35, 2.0, 0.8, "layer1.0.attention\nLSTM, C channels", UNIT, 8.5)
        for index in range(BLOCKS):
            x = index * (BLOCK_WIDTH + GAP) + 3.35
            if index:
                axes.plot([4.35, x], [-0.95, -0.95], color="#b07a20", linestyle=":", linewidth=1.4)
            arrow(axes, (x, -0.55 if index == 0 else -0.95), (x, 0.35), color="#b07a20", linestyle=":")
        axes.text(
            end - 0.1, -1.2, "registered once, linked from the other blocks", ha="right", fontsize=8, color="#805510"
        )
    axes.set_xlim(-1.1, end + 1.1)
    axes.set_ylim(-1.6 if shared else -0.2, 2.8)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title("after share_attention" if shared else "before", loc="left", fontsize=10)


def main() -> None:
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 4.9), height_ratios=(3.0, 4.4))
    stage(above, shared=False)
    stage(below, shared=True)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("sharing.png"), dpi=130)


if __name__ == "__main__":
    main()
