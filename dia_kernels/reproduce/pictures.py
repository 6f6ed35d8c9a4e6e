"""From the results of an experiment to a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .parameters import DEPTHS
from .speed import ratio
from .tables import Record, Results, by_label, speeds

_COLOURS = ("#8a8f98", "#e07b39", "#3a9a5b", "#1f5fa8", "#8c4fa3", "#b8860b", "#c23b4b")


def _points(axes: Axes, groups: dict[str, list[float]]) -> None:
    """Every run a dot, their mean a bar; one line a group."""
    for row, values in enumerate(groups.values()):
        axes.plot(values, [row] * len(values), "o", color=_COLOURS[3], alpha=0.5, markersize=5)
        axes.plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color=_COLOURS[1], linewidth=2)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def of_trials(results: Results) -> Figure:
    """Test accuracy in the last epoch: each run a dot, the mean of the seeds a bar."""
    groups = {
        " · ".join(label): [100 * record["last"] for record in group]
        for label, group in by_label(results["records"]).items()
    }
    figure = Figure(figsize=(8, 1 + 0.28 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    _points(axes, groups)
    axes.set_xlabel("test accuracy in the last epoch, %")
    axes.set_title(results["title"])
    return figure


def of_depths(results: Results) -> Figure:
    """By network: accuracy over the epochs, the gradients of the layers in the first epoch and in the last, and a heat
    map of them over all epochs for each kind of attention. Means over the runs."""
    groups = by_label(results["records"])
    networks, kinds = (list(dict.fromkeys(words)) for words in zip(*groups, strict=True))
    norms = {label: _by_epoch(group) for label, group in groups.items()}
    colours = LogNorm(*_least_and_most(norms.values()))
    figure = Figure(figsize=(3.6 * len(networks), 4.8 + 1.7 * len(kinds)), layout="constrained")
    rows = figure.subplots(
        2 + len(kinds), len(networks), squeeze=False, height_ratios=[1.4, 1.4] + [1.0] * len(kinds)
    )  # fmt: skip
    image: Any = None
    for (network, kind), group in groups.items():
        of_network, colour = rows[:, networks.index(network)], _COLOURS[kinds.index(kind)]
        curve = _means(record["accuracies"] for record in group)
        of_network[0].plot(range(1, len(curve) + 1), [100 * a for a in curve], color=colour, label=kind)
        for epoch, style in ((0, ":"), (-1, "-")):
            of_layers = norms[network, kind][epoch]
            of_network[1].plot(range(1, len(of_layers) + 1), of_layers, style, color=colour)
        axes = of_network[2 + kinds.index(kind)]
        layers = list(zip(*norms[network, kind], strict=True))
        image = axes.imshow(layers, norm=colours, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set(title=kind, xlabel="epoch", ylabel="layer", xticks=[], yticks=[])
    for network, of_network in zip(networks, rows.T, strict=True):
        of_network[0].set(title=network, xlabel="epoch", ylabel="test accuracy, %")
        of_network[1].set(xlabel="layer (dotted: first epoch)", ylabel="norm of its gradient", yscale="log")
    rows[0][0].legend()
    figure.colorbar(image, ax=rows[2:], shrink=0.6, label="norm of a layer's gradient")
    figure.suptitle(results["title"])
    return figure


def _by_epoch(group: list[Record]) -> list[list[float]]:
    """The gradient norm of each layer in each epoch, as far as all runs of ``group`` go: the mean over them."""
    return [_means(norms) for norms in zip(*(record["gradient_norms"] for record in group), strict=False)]


def _least_and_most(matrices: Iterable[list[list[float]]]) -> tuple[float, float]:
    """For a logarithmic scale; some numbers where there are none."""
    found = [value for rows in matrices for row in rows for value in row if math.isfinite(value) and value > 0]
    return (min(found), max(found)) if found else (1e-3, 1.0)


def _means(curves: Iterable[list[float | None]]) -> list[float]:
    """Over the seeds, as far as all of them go; where one is not finite, so is the mean."""
    return [
        math.nan if any(value is None for value in values) else statistics.mean(v for v in values if v is not None)
        for values in zip(*curves, strict=False)
    ]


def of_correlations(results: Results) -> Figure:
    """Heat maps, the means over the runs: a row of stages for each variant."""
    groups = by_label(results["records"])
    figure = Figure(figsize=(9, 2.6 * len(groups)), layout="constrained")
    rows = figure.subplots(len(groups), 3, squeeze=False)
    image: Any = None
    for axes_of_row, (label, group) in zip(rows, groups.items(), strict=True):
        for stage, axes in enumerate(axes_of_row):
            mean = np.mean([record["measured"][stage] for record in group], axis=0)
            image = axes.imshow(mean, vmin=-1, vmax=1, cmap="RdBu_r")
            axes.set_title(f"{' · '.join(label)}, stage {stage + 1}", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    figure.colorbar(image, ax=rows, shrink=0.6, label="correlation of the scales of two blocks")
    figure.suptitle(results["title"])
    return figure


def of_parameters(results: Results) -> Figure:
    """What attention adds to each of the papers' networks for CIFAR-100, and to a ResNet of growing depth."""
    records = {r["network"]: r for r in results["records"] if r["table"] == "networks"}
    deeper = [records[name] for name in DEPTHS if name in records]
    figure = Figure(figsize=(10, 4), layout="constrained")
    networks, depths = figure.subplots(1, 2, width_ratios=[2, 1])
    for offset, (name, label) in enumerate((("se", "SE, one a block"), ("dia", "DIA, one a stage"))):
        colour = _COLOURS[1 + 2 * offset]
        added = [(r[name] - r["plain"]) / 1e3 for r in records.values()]
        networks.bar([k + 0.4 * offset for k in range(len(records))], added, 0.4, color=colour, label=label)
        depths.plot(
            [int(r["network"].removeprefix("resnet")) for r in deeper],
            [(r[name] - r["plain"]) / 1e3 for r in deeper],
            "o-", color=colour,
        )  # fmt: skip
    networks.set_xticks([k + 0.2 for k in range(len(records))], list(records), rotation=30, ha="right")
    networks.set(ylabel="parameters that attention adds, thousands", yscale="log")
    networks.legend()
    depths.set(xlabel="depth of the ResNet", ylim=(0, None))
    depths.grid(alpha=0.3)
    figure.suptitle(results["title"])
    return figure


def of_speed(results: Results) -> Figure:
    """Time of a training step, as a multiple of that of the network without attention, and the memory that it needs."""
    rows = [(f"{name} · {r['variant']}", group, r) for name, group in speeds(results).items() for r in group]
    labels = [label for label, _, _ in rows]
    figure = Figure(figsize=(10, 1 + 0.22 * len(rows)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    time.barh(labels, [ratio(group, r["variant"]) for _, group, r in rows], color=_COLOURS[3])
    time.axvline(1, color=_COLOURS[1])
    time.set(xlabel="time of a training step, x that without attention")
    memory.barh(labels, [r["peak_bytes"] / 1e6 for _, _, r in rows], color=_COLOURS[2])
    memory.set(xlabel="memory that it needs at most, MB")
    time.invert_yaxis()
    figure.suptitle(results["title"])
    return figure
