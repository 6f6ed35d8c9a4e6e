"""Every experiment by name: what it claims to show, how it is done, and how its results look."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from ..train import run
from ..train.files import write
from ..train.settings import Settings
from . import parameters, pictures, speed, tables, variants
from .scales import Scale
from .trials import Trial, do_all, with_seeds


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
        run.build(work.common)  # images that are missing are said before anything is left
        seeded = with_seeds(trials(work.scale, work.common), work.scale.seeds)
        return do_all(seeded, work.folder, work.jobs, work.progress)

    return do


def _speed(work: Work) -> list[dict[str, Any]]:
    networks = tqdm(work.scale.networks, disable=not work.progress, unit="network")
    return [record for network in networks for record in _once(work.folder / f"{network}.json", network, work.scale)]


def _once(file: Path, network: str, scale: Scale) -> list[dict[str, Any]]:
    """What ``speed.measure`` says; ``file`` keeps it for an experiment that is cut off and resumed."""
    if file.exists():
        return json.loads(file.read_text())
    measured = speed.measure(network, scale)
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, lambda f: f.write(f"{json.dumps(measured)}\n".encode()))
    return measured


EXPERIMENTS: dict[str, Experiment] = {
    "params": Experiment("Parameters", lambda work: parameters.records(), tables.of_parameters, pictures.of_parameters),
    "accuracy": Experiment("Accuracy: plain, SE, shared SE, DIA", _training(variants.accuracy)),
    "any-attention": Experiment("Any attention, in each block and shared", _training(variants.any_attention)),
    "ablation": Experiment("One thing changed at a time", _training(variants.ablation)),
    "no-skip": Experiment("Without shortcuts", _training(variants.no_skip), tables.of_depths, pictures.of_depths),
    "no-norm": Experiment("Without batch norms", _training(variants.no_norm), tables.of_depths, pictures.of_depths),
    "no-augmentation": Experiment(
        "Without augmentation", _training(variants.no_augmentation), tables.of_depths, pictures.of_depths
    ),
    "correlation": Experiment(
        "How alike the scales of a stage's blocks are",
        _training(variants.correlation), tables.of_correlations, pictures.of_correlations,
    ),
    "speed": Experiment("Time and memory of a training step", _speed, tables.of_speed, pictures.of_speed),
}  # fmt: skip
