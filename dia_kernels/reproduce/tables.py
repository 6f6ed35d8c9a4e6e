"""From the results of an experiment to a Markdown table: means over the seeds and their spread, no lone best run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
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
    return _of_trials(results, {})


def of_depths(results: Results) -> str:
    """The table of the trials, and how unevenly the gradients are spread over the layers."""
    return _of_trials(results, {"gradients, most / least": unevenness})


def unevenness(group: Sequence[Record]) -> str:
    """The largest norm of a layer's gradient over the smallest: the geometric mean over the epochs and runs.

    Epochs with a norm that is 0 or not finite are left out.
    """
    finite = [norms for record in group for norms in record["gradient_norms"] if all(norms)]
    if not finite:
        return "-"
    return f"{math.exp(statistics.mean(math.log(max(norms) / min(norms)) for norms in finite)):.1f}"


def _of_trials(results: Results, more: dict[str, Callable[[Sequence[Record]], str]]) -> str:
    """With columns of ``more``, which say something of the records of a variant."""
    records = results["records"]
    columns = list(records[0]["label"])
    head = [*columns, "parameters", "last epoch, %", "best epoch, %", "diverged", *more]
    rows = []
    for label, group in by_label(records).items():
        best, last = ([record[which] for record in group] for which in ("best", "last"))
        lost = sum(record["diverged"] for record in group)
        figures = [
            f"{group[0]['parameters']:,}",
            mean_and_spread(last),
            mean_and_spread(best),
            f"{lost} of {len(group)}",
            *(say(group) for say in more.values()),
        ]
        rows.append([*label, *figures])
    return markdown(head, rows, len(columns))


def of_correlations(results: Results) -> str:
    """The table of the trials, and in each stage the mean correlation of neighbouring blocks, and that of all pairs."""
    columns = list(results["records"][0]["label"])
    head = [*columns, *(f"stage {k + 1}, {which}" for which in ("neighbours", "all pairs") for k in range(3))]
    rows = []
    for label, group in by_label(results["records"]).items():
        stages = zip(*(neighbours(record) + all_pairs(record) for record in group), strict=True)
        rows.append([*label, *(f"{statistics.mean(s):.2f} ± {(max(s) - min(s)) / 2:.2f}" for s in stages)])
    table = markdown(head, rows, len(columns))
    return f"{of_trials(results)}\nCorrelation of the scales of two blocks of a stage, mean of the pairs:\n\n{table}"


def neighbours(record: Record) -> list[float]:
    """Of each stage, the mean correlation of a block's scale with the next block's."""
    return [_mean_of_pairs(matrix, lambda a, b: b == a + 1) for matrix in record["measured"]]


def all_pairs(record: Record) -> list[float]:
    """Of each stage, the mean correlation of the scales of two blocks."""
    return [_mean_of_pairs(matrix, lambda a, b: b > a) for matrix in record["measured"]]


def _mean_of_pairs(matrix: list[list[float]], counts: Callable[[int, int], bool]) -> float:
    pairs = [value for a, row in enumerate(matrix) for b, value in enumerate(row) if counts(a, b)]
    return statistics.mean(pairs) if pairs else math.nan


def of_parameters(results: Results) -> str:
    """Of one unit, of networks for CIFAR-100, of networks for ImageNet; beside them what the authors' code has."""
    tables = {name: [r for r in results["records"] if r["table"] == name] for name in ("unit", "networks", "imagenet")}
    units = markdown(
        ["channels", "one DIA unit, r = 4", "each further layer"],
        [[f"{value:,}" for value in (r["channels"], r["parameters"], r["another_layer"])] for r in tables["unit"]],
        0,
    )
    imagenet = markdown(
        ["network", "r", "plain", "DIA", "DIA adds"],
        [
            [r["network"], str(r["reduction"]), f"{r['plain']:,}", f"{r['dia']:,}", _added(r)]
            for r in tables["imagenet"]
        ],
        1,
    )
    return f"{units}\nCIFAR-100:\n\n{_of_networks(tables['networks'])}\nImageNet, 1000 classes:\n\n{imagenet}"


def _added(record: Record) -> str:
    added = record["dia"] - record["plain"]
    return f"{added:,} ({100 * added / record['plain']:.1f} %)"


def _of_networks(records: list[Record]) -> str:
    head = ["network", "plain", "SE, r = 16", "DIA, r = 4", "DIA adds", "authors' plain", "authors' DIA"]
    rows = []
    for r in records:
        published = ["-" if r[name] is None else f"{r[name]:,}" for name in ("published_plain", "published_dia")]
        counted = [f"{r[name]:,}" for name in ("plain", "se", "dia")]
        rows.append([r["network"], *counted, _added(r), *published])
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
