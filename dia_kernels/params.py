"""``python -m dia_kernels params``: parameters of every network, counted, beside the published figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from . import models

NUM_CLASSES = 100


@dataclass(frozen=True)
class Published:
    """What others report of a network on CIFAR-100; None where they do not.

    Attributes:
        plain, dia: parameters without attention and with DIA at r = 4, by the authors' code.
        accuracy: top-1 per cent without attention, with SE, with DIA.
        source: of the accuracies.
    """

    plain: int | None
    dia: int | None
    accuracy: tuple[float | None, float | None, float | None] = (None, None, None)
    source: str = ""


_AUTHORS = "DIANet README, mean of 5"
_PYTORCHCV = "pytorchcv README"

PUBLISHED = {
    "resnet20": Published(None, None, (70.36, 71.46, 72.29), _PYTORCHCV),
    "resnet56": Published(None, None),
    "resnet110": Published(None, None, (77.20, 79.14, 77.89), _PYTORCHCV),
    "resnet164": Published(1_727_284, 1_946_132, (73.43, None, 76.67), _AUTHORS),
    "preresnet164": Published(1_726_388, 1_961_364, (76.53, None, 78.20), _AUTHORS),
    "wrn52_4": Published(12_072_500, 12_298_516, (79.75, None, 80.99), _AUTHORS),
    "resnext101_8x32": Published(32_138_244, 33_006_020, (81.18, None, 82.46), _AUTHORS),
}


def count(model: nn.Module) -> int:
    """Parameters of ``model``, a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Row:
    """Counted parameters of one network: without attention, with SE, with DIA."""

    name: str
    plain: int
    se: int
    dia: int

    @property
    def agrees(self) -> bool:
        """Whether the counts are those of the authors' code, as far as there are any."""
        published = PUBLISHED[self.name]
        return published.plain in (None, self.plain) and published.dia in (None, self.dia)


def count_all(num_classes: int = NUM_CLASSES, names: Iterable[str] | None = None) -> list[Row]:
    """A row for each of ``names``, or of ``models.names()``; no weights are drawn."""
    rows = []
    with torch.device("meta"):
        for name in models.names() if names is None else names:
            plain, se, dia = (count(models.create(name, num_classes, attention=a)) for a in (None, "se", "dia"))
            rows.append(Row(name, plain, se, dia))
    return rows


def as_text(rows: list[Row]) -> str:
    """The table, with what it leaves to say below it."""
    lines: list[tuple[str, ...]] = [
        (
            *("network", "plain", "SE, r=16", "DIA, r=4", "DIA adds", "authors' plain", "authors' DIA"),
            *("top-1 plain / SE / DIA", "source"),
        )
    ]
    for row in rows:
        published = PUBLISHED[row.name]
        accuracy = " / ".join("-" if value is None else f"{value:.2f}" for value in published.accuracy)
        lines.append(
            (
                row.name,
                *(f"{value:,}" for value in (row.plain, row.se, row.dia)),
                f"{100 * (row.dia / row.plain - 1):.1f} %",
                *("-" if value is None else f"{value:,}" for value in (published.plain, published.dia)),
                accuracy if published.source else "-",
                published.source or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["<", *">>>>>>>", "<"]
    text = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True)).rstrip()
        for line in lines
    ]
    different = [row.name for row in rows if not row.agrees]
    verdict = f"DIFFERENT from the authors' count: {', '.join(different)}." if different else "All counts agree."
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", f"CIFAR-100, {NUM_CLASSES} classes. {verdict}"])
