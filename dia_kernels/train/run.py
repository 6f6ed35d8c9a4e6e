"""One training run in a folder: stopped at any moment, it goes on to the same bits.

run.json                  the settings, written when the run begins, and the launch it last had
checkpoints/last.ckpt     everything that the run needs to go on
checkpoints/best.ckpt     the weights of the best test accuracy so far
logs/version_<k>/         metrics.csv and TensorBoard events, a folder each time the run is started
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from .. import memory, models
from . import images
from .callbacks import LastCheckpoint, RandomState, RunFile
from .classifier import Classifier
from .files import Files, Sharded, whole_state_dict
from .launch import Launch, here
from .loader import Order, ResumableLoader
from .rendezvous import join
from .settings import RunError, Settings, holds_run, read_run
from .sync_norm import sync_norms

# Steps between two lines of the logs.
_LOG_EVERY = 10

# Of Settings, what is the network's own.
_OF_THE_NETWORK = tuple(field.name for field in fields(models.Options) if field.name != "in_channels")

# Of Settings.precision, what Lightning's FSDP2 takes.
_SHARDED_PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Attributes:
        network: trained, on the CPU, with whole weights.
        steps: of the optimiser, done in all.
        metrics: the last ``loss``, ``test_loss`` and ``test_accuracy``; empty if the run had ended before.
    """

    network: models.Network
    steps: int
    metrics: dict[str, float]


def build(settings: Settings, *, download: bool = False) -> tuple[Classifier, images.ImageData]:
    """The network with fresh weights, and its images."""
    folder = None if settings.folder is None else Path(settings.folder)
    data = images.load(
        settings.data, folder, size=settings.size, seed=settings.seed, augment=settings.augment,
        images=settings.images, download=download,
    )  # fmt: skip
    return Classifier(_network(settings, data), settings.recipe()), data


def _network(settings: Settings, data: images.ImageData) -> models.Network:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(settings.seed)
        network = models.create(
            settings.network,
            data.num_classes,
            in_channels=data.in_channels,
            **{name: getattr(settings, name) for name in _OF_THE_NETWORK},
        )
    if settings.precision == "64-true":
        network.double()  # Lightning does so after it has loaded a checkpoint: through float32
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)
    if settings.sync_norm:
        sync_norms(network)
    return network


def loaders(
    settings: Settings, data: images.ImageData, launch: Launch | None = None, rank: int = 0
) -> tuple[ResumableLoader, DataLoader]:
    """Batches to learn from, this process's share of each, and batches to test on."""
    launch = launch or Launch()
    batch_size = settings.recipe().batch_size
    order = Order(len(data.train), batch_size, settings.seed, rank, launch.world_size, launch.accumulate)
    # As large as those to learn from: what fits there fits here.
    test_size = batch_size // order.shares
    test = DataLoader(data.test, test_size, num_workers=launch.workers, generator=torch.Generator())
    return ResumableLoader(data.train, order, launch.workers), test


def train(
    settings: Settings,
    folder: Path,
    launch: Launch | None = None,
    *,
    resume: bool | None = False,
    download: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Trains in ``folder`` until the recipe's last epoch.

    Args:
        settings: of the run; one to go on with must have the same.
        folder: of the run; made if it is not there. All processes must see the same.
        launch: how to execute it; None for one process, or what torchrun says.
        resume: True goes on from the last checkpoint in ``folder``, False begins, None goes on if a run is there and
            begins if not.
        download: fetch CIFAR if it is not there.
        progress: show a progress bar.
        callbacks: more of Lightning's.

    Raises:
        ValueError: a setting is wrong, or the launch; the message names it.
        RunError: ``folder`` holds another run, or none to resume.
        images.DataError: images are missing or damaged.
    """
    launch = here(None if launch is None else asdict(launch))
    if launch.strategy == "fsdp2" and settings.precision not in _SHARDED_PRECISIONS:
        raise ValueError(
            f"precision: expected one of {', '.join(_SHARDED_PRECISIONS)} with fsdp2, got {settings.precision!r}"
        )
    if launch.strategy == "fsdp2" and settings.channels_last:
        raise ValueError("channels_last: expected False with fsdp2, which takes contiguous weights only, got True")
    goes_on = _goes_on(settings, folder, resume)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    classifier, data = build(settings, download=download)
    _recompute(classifier.network, launch, "nothing")
    if launch.world_size > 1:
        join()
    with _quiet():
        trainer = _trainer(settings, launch, folder, checkpoint, progress, callbacks)
    learn, test = loaders(settings, data, launch, trainer.global_rank)
    # Weights and order are drawn from generators of their own; this one serves dropout.
    torch.manual_seed(settings.seed)
    with _quiet():
        # The checkpoint holds the generators' states, which are more than weights.
        start = checkpoint if goes_on and checkpoint.exists() else None
        trainer.fit(classifier, learn, test, ckpt_path=start, weights_only=False)
        trainer.save_checkpoint(checkpoint, weights_only=False)
    network = classifier.network
    _recompute(network, launch, "everything")
    if launch.strategy == "fsdp2":
        network = _network(settings, data)
        network.load_state_dict(whole_state_dict(classifier.network))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Result(network.cpu(), trainer.global_step, metrics)


def _recompute(network: models.Network, launch: Launch, save: memory.Save) -> None:
    if launch.recompute is not None:
        memory.checkpoint(network, launch.recompute, save=save)  # type: ignore[arg-type]


def _goes_on(settings: Settings, folder: Path, resume: bool | None) -> bool:
    """Whether to go on with the run in ``folder``, once that is sure to be as asked."""
    if resume is False and holds_run(folder):
        raise RunError(f"{folder}: holds a run already; resume it, or name another folder")
    if not resume and not holds_run(folder):
        return False
    there, _ = read_run(folder)
    if there != settings:
        other = [name for name, value in asdict(there).items() if value != getattr(settings, name)]
        raise RunError(f"{folder}: the run there has other settings ({', '.join(other)})")
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its hints: which devices there are, what else one could install."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*exists and is not empty.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _strategy(launch: Launch) -> dict[str, Any]:
    """Lightning's strategy, and what writes its checkpoints."""
    if launch.strategy == "fsdp2":
        return {"strategy": Sharded(launch.world_size)}
    if launch.world_size == 1:
        return {"strategy": "auto", "plugins": [Files()]}
    # No parameter is unused. But only so DDP keeps its buckets: else it arranges them anew after the first step of
    # every start, and the order of a sum over more than two processes depends on its place in a bucket.
    return {"strategy": DDPStrategy(find_unused_parameters=launch.world_size > 2), "plugins": [Files()]}


def _trainer(
    settings: Settings,
    launch: Launch,
    folder: Path,
    checkpoint: Path,
    progress: bool,
    more: Sequence[Callback],
) -> lightning.Trainer:
    csv = CSVLogger(str(folder), name="logs", flush_logs_every_n_steps=_LOG_EVERY)
    logs: list[Logger] = [csv, TensorBoardLogger(str(folder), name="logs", version=csv.version)]
    callbacks: list[Callback] = [
        RunFile(folder, settings, launch),
        RandomState(),
        *more,
        LastCheckpoint(checkpoint, settings.checkpoint_every, launch.accumulate),
        ModelCheckpoint(
            checkpoint.parent, "best", monitor="test_accuracy", mode="max", save_weights_only=True,
            enable_version_counter=False,
        ),
    ]  # fmt: skip
    if progress:
        callbacks.append(TQDMProgressBar())
    return lightning.Trainer(
        accelerator="auto",
        devices=launch.processes,
        num_nodes=launch.nodes,
        **_strategy(launch),
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=settings.recipe().epochs,
        accumulate_grad_batches=launch.accumulate,
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
