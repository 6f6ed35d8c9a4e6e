"""Every experiment by name: what it claims to show, how it is done, and how its results look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .. import params
from ..train.settings import Settings
from . import pictures, speed, tables, variants
from .scales import Scale
from .trials import Trial, do_all, with_seeds

#: The depths of the ResNet that the papers show the flat cost of attention with (arXiv:1905.10671, section 4).
_DEPTHS = ("resnet83", "resnet164", "resnet245", "resnet407")


@dataclass(frozen=True)
class Work:
    """What an experiment gets.

    Attributes:
        scale: how large.
        common: of all its runs of training.
        folder: for its trials.
        jobs: trials at a time.
        progress: show a progress bar.
    """

    scale: Scale
    common: Settings
    folder: Path
    jobs: int
    progress: bool


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        title: of its table and picture.
        do: its records.
        table, draw: of its results.
    """

    title: str
    do: Callable[[Work], list[dict[str, Any]]]
    table: Callable[[tables.Results], str] = tables.of_trials
    draw: Callable[[tables.Results], Figure] = pictures.of_trials


def _training(trials: Callable[[Scale, Settings], list[Trial]]) -> Callable[[Work], list[dict[str, Any]]]:
    def do(work: Work) -> list[dict[str, Any]]:
        seeded = with_seeds(trials(work.scale, work.common), work.scale.seeds)
        return do_all(seeded, work.folder, work.jobs, work.progress)

    return do


def _parameters(work: Work) -> list[dict[str, Any]]:
    names = dict.fromkeys((*params.PUBLISHED, *_DEPTHS))
    rows = []
    for row in params.count_all(names=names):
        published = params.PUBLISHED.get(row.name, params.Published(None, None))
        counted = {"network" if name == "name" else name: value for name, value in asdict(row).items()}
        rows.append({**counted, "published_plain": published.plain, "published_dia": published.dia})
    return rows


def _speed(work: Work) -> list[dict[str, Any]]:
    return [record for network in work.scale.networks for record in speed.measure(network, work.scale)]


EXPERIMENTS: dict[str, Experiment] = {
    "params": Experiment("Parameters", _parameters, tables.of_parameters, pictures.of_parameters),
    "accuracy": Experiment("Accuracy: plain, SE, shared SE, DIA", _training(variants.accuracy)),
    "any-attention": Experiment("Any attention, in each block and shared", _training(variants.any_attention)),
    "ablation": Experiment("One thing changed at a time", _training(variants.ablation)),
    "no-skip": Experiment("Without shortcuts", _training(variants.no_skip), draw=pictures.of_depths),
    "no-norm": Experiment("Without batch norms", _training(variants.no_norm), draw=pictures.of_depths),
    "no-augmentation": Experiment(
        "Without augmentation", _training(variants.no_augmentation), draw=pictures.of_depths
    ),
    "correlation": Experiment(
        "How alike the scales of a stage's blocks are",
        _training(variants.correlation), tables.of_correlations, pictures.of_correlations,
    ),
    "speed": Experiment("Time and memory of a training step", _speed, tables.of_speed, pictures.of_speed),
}  # fmt: skip
