"""From the results of an experiment to a Markdown table: means over the seeds and their spread, no lone best run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .speed import ratio

Record = dict[str, Any]
Results = dict[str, Any]


def by_label(records: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """The records of each variant, in the order of the variants."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record["label"].values()), []).append(record)
    return groups


def mean_and_spread(values: Sequence[float]) -> str:
    """Per cent: the mean, and half of what lies between the least and the most."""
    half = (max(values) - min(values)) / 2
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """A table whose first ``words`` columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)) + "\n"


def of_trials(results: Results) -> str:
    """Accuracy of each variant in the last epoch and in its best, parameters, and runs that diverged."""
    records = results["records"]
    columns = list(records[0]["label"])
    head = [*columns, "parameters", "last epoch, %", "best epoch, %", "diverged"]
    rows = []
    for label, group in by_label(records).items():
        best, last = ([record[which] for record in group] for which in ("best", "last"))
        lost = sum(record["diverged"] for record in group)
        figures = [
            f"{group[0]['parameters']:,}",
            mean_and_spread(last),
            mean_and_spread(best),
            f"{lost} of {len(group)}",
        ]
        rows.append([*label, *figures])
    return markdown(head, rows, len(columns))


def of_correlations(results: Results) -> str:
    """The table of the trials, and the mean correlation of neighbouring blocks in each stage."""
    head = [*results["records"][0]["label"], *(f"stage {k + 1}" for k in range(3))]
    rows = []
    for label, group in by_label(results["records"]).items():
        stages = zip(*(neighbours(record) for record in group), strict=True)
        rows.append([*label, *(f"{statistics.mean(s):.2f} ± {(max(s) - min(s)) / 2:.2f}" for s in stages)])
    table = markdown(head, rows, len(head) - 3)
    return f"{of_trials(results)}\nCorrelation of the scales of neighbouring blocks:\n\n{table}"


def neighbours(record: Record) -> list[float]:
    """Of each stage, the mean correlation of a block's scale with the next block's."""
    means = []
    for matrix in record["measured"]:
        pairs = [matrix[k][k + 1] for k in range(len(matrix) - 1)]
        means.append(statistics.mean(pairs) if pairs else float("nan"))
    return means


def of_parameters(results: Results) -> str:
    """Counted parameters; those that the authors' code has, where there are any, are the same."""
    head = ["network", "plain", "SE, r = 16", "DIA, r = 4", "DIA adds", "authors' plain", "authors' DIA"]
    rows = []
    for r in results["records"]:
        published = ["-" if r[name] is None else f"{r[name]:,}" for name in ("published_plain", "published_dia")]
        counted = [f"{r[name]:,}" for name in ("plain", "se", "dia")]
        rows.append([r["network"], *counted, f"{100 * (r['dia'] / r['plain'] - 1):.1f} %", *published])
    return markdown(head, rows, 1)


def of_speed(results: Results) -> str:
    """Median time of a step, as a multiple of the plain network's too, and the memory that it needs at most."""
    head = ["network", "", "ms a step", "x plain", "MB at most"]
    rows = []
    for name, group in speeds(results).items():
        for r in group:
            times = [f"{1e3 * statistics.median(r['seconds']):.1f}", f"{ratio(group, r['variant']):.2f}"]
            rows.append([name, r["variant"], *times, f"{r['peak_bytes'] / 1e6:.1f}"])
    return markdown(head, rows, 2)


def speeds(results: Results) -> dict[str, list[Record]]:
    """The records of each network."""
    groups: dict[str, list[Record]] = {}
    for record in results["records"]:
        groups.setdefault(record["network"], []).append(record)
    return groups
