"""One training run in a folder: settings, checkpoints, logs; stopped at any moment, it goes on to the same bits.

run.json                  the settings, written when the run begins
checkpoints/last.ckpt     everything that the run needs to go on
checkpoints/best.ckpt     the weights of the best test accuracy so far
logs/version_<k>/         metrics.csv and TensorBoard events, a folder each time the run is started
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader

from .. import models
from ..models.parts import Attention
from . import images
from .classifier import Classifier
from .loader import Order, ResumableLoader
from .recipes import RECIPES, Recipe

# Steps between two lines of the logs.
_LOG_EVERY = 10

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Settings:
    """What a run is. None stands for what the network's recipe says.

    Attributes:
        network: one of ``models.names()``.
        attention, reduction, skip, norm, backend, fold_norm: of the network, see ``models.create``.
        data, folder, size: of the images, see ``images.load``.
        epochs, batch_size, learning_rate, weight_decay: other than the recipe's.
        seed: of the weights, the order of the images and their random changes.
        precision: one of ``PRECISIONS``; the mixed ones are automatic mixed precision.
        processes: on this machine, each with one device.
        workers: processes that read images, for each of ``processes``.
        checkpoint_every: steps between two checkpoints.
    """

    network: str = "resnet20"
    attention: Attention = "dia"
    reduction: int | None = None
    skip: bool = True
    norm: bool = True
    backend: str | None = None
    fold_norm: bool = True
    data: str = "digits"
    folder: str | None = None
    size: int = 224
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    seed: int = 0
    precision: str = "32-true"
    processes: int = 1
    workers: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if self.network not in RECIPES:
            raise ValueError(f"network: expected one of {', '.join(RECIPES)}, got {self.network!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("epochs", "batch_size", "processes", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.workers < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")

    def recipe(self) -> Recipe:
        """The network's recipe with what these settings change."""
        recipe = RECIPES[self.network]
        if self.epochs is not None:
            recipe = recipe.stretched(self.epochs)
        changed = {
            name: value
            for name in ("batch_size", "learning_rate", "weight_decay")
            if (value := getattr(self, name)) is not None
        }
        return replace(recipe, **changed)


class RunError(RuntimeError):
    """A folder that cannot be used as asked. The message says why."""


class SettingsFile(Callback):
    """Writes run.json once all processes are there: each has by then seen that the folder was free."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder

    def on_fit_start(self, trainer, pl_module) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")


class RandomState(Callback):
    """Keeps the generators of dropout in the checkpoint. All processes draw alike, so one state serves them."""

    def __init__(self) -> None:
        self.loaded: dict | None = None

    def state_dict(self) -> dict:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.loaded = state_dict

    def on_train_start(self, trainer, pl_module) -> None:
        if self.loaded is not None:
            torch.set_rng_state(self.loaded["cpu"])
            if len(self.loaded["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self.loaded["cuda"])
            self.loaded = None


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Attributes:
        network: trained, on the CPU.
        steps: done in all.
        metrics: the last ``loss``, ``test_loss`` and ``test_accuracy``; empty if the run had ended before.
    """

    network: models.Network
    steps: int
    metrics: dict[str, float]


def read_settings(folder: Path) -> Settings:
    """The settings of the run in ``folder``.

    Raises:
        RunError: there is none, or its file is damaged.
    """
    path = folder / "run.json"
    try:
        return Settings(**json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise RunError(f"{folder}: no run to go on with (no run.json)") from error
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error})") from error


def build(settings: Settings, *, download: bool = False) -> tuple[Classifier, images.ImageData]:
    """The network with fresh weights, and its images."""
    folder = None if settings.folder is None else Path(settings.folder)
    data = images.load(settings.data, folder, size=settings.size, seed=settings.seed, download=download)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(settings.seed)
        network = models.create(
            settings.network,
            data.num_classes,
            attention=settings.attention,
            reduction=settings.reduction,
            skip=settings.skip,
            norm=settings.norm,
            in_channels=data.in_channels,
            backend=settings.backend,
            fold_norm=settings.fold_norm,
        )
    return Classifier(network, settings.recipe()), data


def loaders(settings: Settings, data: images.ImageData, rank: int = 0) -> tuple[ResumableLoader, DataLoader]:
    """Batches to learn from, this process's share of each, and batches to test on."""
    batch_size = settings.recipe().batch_size
    order = Order(len(data.train), batch_size, settings.seed, rank, settings.processes)
    test = DataLoader(data.test, batch_size, num_workers=settings.workers, generator=torch.Generator())
    return ResumableLoader(data.train, order, settings.workers), test


def train(
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    download: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Trains in ``folder`` until the recipe's last epoch.

    Args:
        settings: of the run; with ``resume`` they must be those of the run in ``folder``.
        folder: of the run; made if it is not there.
        resume: go on from the last checkpoint in ``folder``.
        download: fetch CIFAR if it is not there.
        progress: show a progress bar.
        callbacks: more of Lightning's.

    Raises:
        ValueError: a setting is wrong; the message names it.
        RunError: ``folder`` holds another run, or none to resume.
        images.DataError: images are missing or damaged.
    """
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if resume:
        if read_settings(folder) != settings:
            raise RunError(f"{folder}: the run there has other settings")
    elif (folder / "run.json").exists():
        raise RunError(f"{folder}: holds a run already; resume it, or name another folder")
    classifier, data = build(settings, download=download)
    with _quiet():
        trainer = _trainer(settings, folder, progress, callbacks)
    learn, test = loaders(settings, data, trainer.global_rank)
    # Weights and order are drawn from generators of their own; this one serves dropout.
    torch.manual_seed(settings.seed)
    with _quiet():
        # The checkpoint holds the generators' states, which are more than weights.
        start = checkpoint if resume and checkpoint.exists() else None
        trainer.fit(classifier, learn, test, ckpt_path=start, weights_only=False)
    trainer.save_checkpoint(checkpoint, weights_only=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Result(classifier.network.cpu(), trainer.global_step, metrics)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its hints: which devices there are, what else one could install."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*exists and is not empty.*")
        try:
            yield
        finally:
            logger.setLevel(level)


def _trainer(settings: Settings, folder: Path, progress: bool, more: Sequence[Callback]) -> lightning.Trainer:
    csv = CSVLogger(str(folder), name="logs", flush_logs_every_n_steps=_LOG_EVERY)
    logs: list[Logger] = [csv, TensorBoardLogger(str(folder), name="logs", version=csv.version)]
    checkpoints = folder / "checkpoints"
    callbacks: list[Callback] = [
        SettingsFile(settings, folder),
        RandomState(),
        ModelCheckpoint(checkpoints, every_n_train_steps=settings.checkpoint_every, save_top_k=0, save_last=True),
        ModelCheckpoint(
            checkpoints, "best", monitor="test_accuracy", mode="max", save_weights_only=True,
            enable_version_counter=False,
        ),
    ]  # fmt: skip
    callbacks += more
    if progress:
        callbacks.append(TQDMProgressBar())
    return lightning.Trainer(
        accelerator="auto",
        devices=settings.processes,
        strategy="auto" if settings.processes == 1 else "ddp",
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=settings.recipe().epochs,
        logger=logs,
        callbacks=callbacks,
        log_every_n_steps=_LOG_EVERY,
        num_sanity_val_steps=0,
        enable_progress_bar=progress,
        enable_model_summary=False,
        # The order of the images is ours, and so is each process's share.
        use_distributed_sampler=False,
        deterministic="warn",
        benchmark=False,
    )
