"""What a run is, and the file in its folder that says so: run.json, with the settings and the launch it last had."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..models.parts import Attention
from .files import write
from .launch import Launch
from .recipes import Recipe, recipe_of

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Settings:
    """What a run is. None stands for what the network's recipe says.

    Attributes:
        network, attention, reduction, skip, norm, backend, fold_norm, shared, stages, carry_state, layers:
            see ``models.create``.
        channels_last: keep weights and maps with the channels innermost, which many convolutions are faster with.
        sync_norm: the batch norms see the batch of all processes (``nn.SyncBatchNorm``), not each its own.
        data, folder, size, augment, images: of the images, see ``images.load``.
        epochs, learning_rate, weight_decay: other than the recipe's.
        batch_size: other than the recipe's: images of one step of the optimiser, over all processes and all parts
            that they accumulate. The recipe's learning rate is for this many, whatever the launch.
        seed: of the weights, the order of the images and their random changes.
        precision: one of ``PRECISIONS``; the mixed ones are automatic mixed precision.
        checkpoint_every: steps of the optimiser between two checkpoints.

    Raises:
        ValueError: a setting is wrong; the message names it.
    """

    network: str = "resnet20"
    attention: Attention = "dia"
    reduction: int | None = None
    skip: bool = True
    norm: bool = True
    backend: str | None = None
    fold_norm: bool = True
    shared: bool | None = None
    stages: tuple[int, ...] | None = None
    carry_state: bool = True
    layers: int = 1
    channels_last: bool = False
    sync_norm: bool = False
    data: str = "digits"
    folder: str | None = None
    size: int = 224
    augment: bool = True
    images: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    seed: int = 0
    precision: str = "32-true"
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        try:
            recipe_of(self.network)
        except ValueError as error:
            raise ValueError(str(error).replace("name:", "network:")) from error
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("epochs", "batch_size", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    def recipe(self) -> Recipe:
        """The network's recipe with what these settings change."""
        recipe = recipe_of(self.network)
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


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in ``folder``."""
    return (folder / "run.json").exists()


def read_run(folder: Path) -> tuple[Settings, Launch]:
    """The settings of the run in ``folder``, and the launch it last had.

    Raises:
        RunError: there is none, or its file is damaged.
    """
    path = folder / "run.json"
    try:
        content = json.loads(path.read_text())
        settings = content["settings"]
        if settings.get("stages") is not None:
            settings["stages"] = tuple(settings["stages"])  # a list in JSON
        return Settings(**settings), Launch(**content["launch"])
    except FileNotFoundError as error:
        raise RunError(f"{folder}: no run to go on with (no run.json)") from error
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: damaged ({error})") from error


def write_run(folder: Path, settings: Settings, launch: Launch) -> None:
    """Writes run.json into ``folder``; makes the folder if it is not there."""
    text = json.dumps({"settings": asdict(settings), "launch": asdict(launch)}, indent=2)
    write(folder / "run.json", lambda file: file.write(f"{text}\n".encode()))
