"""Trials: runs of training, each with a label, done side by side and each noted in a file of its own.

``<folder>/<label>-<seed>.json`` is a trial that is done. One that was cut off leaves its run in
``<folder>/<label>-<seed>`` and goes on from there, so that an experiment that is started again ends in the same files.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..models import Network
from ..train import run
from ..train.files import write
from ..train.images import ImageData
from ..train.settings import Settings
from . import correlation
from .curves import Curves, layers

#: What a trial may be asked beside its curves, of the trained network and the images.
MEASURES: dict[str, Callable[[Network, ImageData], Any]] = {"correlation": correlation.of_stages}


@dataclass(frozen=True)
class Trial:
    """One variant of an experiment, of one seed.

    Attributes:
        label: says which variant, by the columns of the experiment's table.
        settings: of the run.
        measure: a name out of ``MEASURES``, or None.
    """

    label: tuple[tuple[str, str], ...]
    settings: Settings
    measure: str | None = None

    @property
    def name(self) -> str:
        """For its files."""
        words = [value for _, value in self.label] + [str(self.settings.seed)]
        return "-".join(re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in words)


Record = dict[str, Any]

#: A process that is forked would inherit threads that are not there.
_SPAWN = multiprocessing.get_context("spawn")


def with_seeds(trials: Iterable[Trial], seeds: int) -> list[Trial]:
    """Each trial with each of ``seeds`` seeds."""
    return [replace(t, settings=replace(t.settings, seed=seed)) for t in trials for seed in range(seeds)]


def do(trial: Trial, folder: Path) -> Record:
    """The record of a trial: out of its file, or by doing it.

    A record has the label, the seed, the settings, the number of parameters, the names of the layers whose gradients
    were noted, the curves (see ``Curves``), ``best`` and ``last`` test accuracy, and whether the run diverged: a loss
    that was not finite, or in the last epoch a mean loss of a guess among all classes or more. Numbers that are not
    finite are None.

    Raises:
        run.RunError: what is there is of other settings.
    """
    path = folder / f"{trial.name}.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != json.loads(json.dumps(asdict(trial.settings))):
            raise run.RunError(f"{path}: done with other settings; name another folder")
        return record
    curves, place = Curves(), folder / trial.name
    result = run.train(trial.settings, place, resume=None, progress=False, callbacks=[curves])
    record = _record(trial, result.network, curves)
    if trial.measure is not None:
        _, data = run.build(trial.settings)
        record["measured"] = MEASURES[trial.measure](result.network, data)
    write(path, lambda file: file.write(f"{json.dumps(record)}\n".encode()))
    shutil.rmtree(place)
    return record


def _record(trial: Trial, network: Network, curves: Curves) -> Record:
    steps = len(curves.losses) // max(len(curves.accuracies), 1)
    end = sum(curves.losses[-steps:]) / steps
    classes = network.classifier.out_features
    return {
        "label": dict(trial.label),
        "seed": trial.settings.seed,
        "settings": asdict(trial.settings),
        "parameters": sum(p.numel() for p in network.parameters()),
        "layers": list(layers(network)),
        "losses": [_number(loss) for loss in curves.losses],
        "accuracies": [_number(accuracy) for accuracy in curves.accuracies],
        "gradient_norms": [[_number(norm) for norm in norms] for norms in curves.gradient_norms],
        "best": max(curves.accuracies),
        "last": curves.accuracies[-1],
        "diverged": not math.isfinite(end) or end >= math.log(classes),
    }


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def do_all(trials: Sequence[Trial], folder: Path, jobs: int, progress: bool = True) -> list[Record]:
    """The records of ``trials``, in their order; ``jobs`` at a time, each with one thread of the CPU.

    (With one thread each, the bits do not depend on how many there are at a time.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[int, Record] = {}
    bar = partial(tqdm, total=len(trials), disable=not progress, unit="run")
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [do(trial, folder) for trial in bar(trials)]
        finally:
            torch.set_num_threads(threads)
    with ProcessPoolExecutor(jobs, _SPAWN, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(do, trial, folder): number for number, trial in enumerate(trials)}
        try:
            for done in bar(as_completed(waiting)):
                records[waiting[done]] = done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [records[number] for number in range(len(trials))]


def usual_jobs() -> int:
    """As many trials at a time as there are cores, or one with a GPU."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
