"""``python -m dia_kernels train``: its options, and what it prints. Lightning is imported only to run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..attention import CELLS
from ..models import names
from .launch import RECOMPUTED, STRATEGIES, Launch, here, speaks
from .recipes import RECIPES

if TYPE_CHECKING:
    from .settings import Settings

MODULES = ("lightning", "numpy", "PIL", "sklearn", "tensorboard", "torchvision", "tqdm")

_LAUNCH = ("processes", "strategy", "accumulate", "workers", "recompute")
_NOT_SETTINGS = ("command", "run", "output", "resume", "begin_or_go_on", "download", "no_progress", *_LAUNCH)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options. One that is not given is not in the namespace, so that defaults have one place."""
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("--network", help=f"{', '.join(names())} or a relative of another size, as in resnet32 (default: resnet20)")
    add("--attention", choices=("none", "dia", *CELLS), help="default: dia")
    add("--reduction", type=int, help="r of the attention (default: 4 with DIA, 16 with SE)")
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("--shared", action="store_true", help="one attention unit a stage, whatever the attention")
    shared.add_argument("--per-block", dest="shared", action="store_false", help="one attention unit a block")
    add("--stages", type=int, nargs="+", help="stages that have attention, from 0 (default: all)")
    add("--no-state", dest="carry_state", action="store_false", help="begin each block of a stage without a state")
    add("--no-skip", dest="skip", action="store_false", help="leave out the shortcuts")
    add("--no-norm", dest="norm", action="store_false", help="leave out the batch norms")
    add("--layers", type=int, help="of the LSTM, stacked (default: 1)")
    add("--channels-last", action="store_true", help="weights and maps with the channels innermost: often faster")
    add("--sync-norm", action="store_true", help="batch norms over the batch of all processes, not each over its own")
    add(
        "--no-fold-norm",
        dest="fold_norm",
        action="store_false",
        help="call the batch norm before the attention by itself",
    )
    add("--backend", help="of the attention, out of those that `info` lists (default: the best one here)")
    add(
        "--data",
        choices=("digits", "fashion", "cifar10", "cifar100", "folder"),
        help="images to learn: scikit-learn's digits (default), or what --folder holds",
    )
    add("--folder", help="of the images: four IDX files, CIFAR's unpacked archive, or train/<class>/ and test/<class>/")
    add("--size", type=int, help="side to which the images of `--data folder` are cut (default: 224)")
    add("--no-augmentation", dest="augment", action="store_false", help="no random changes of the images")
    add("--images", type=int, help="learn only so many of the images, and test on half as many (default: all)")
    add("--download", action="store_true", default=False, help="fetch CIFAR into --folder if it is not there")
    add("--epochs", type=int, help="passes over the images (default: the recipe's, whose milestones scale along)")
    add("--batch-size", type=int, help="images a step, over all processes and parts (default: the recipe's)")
    add("--learning-rate", type=float, help="before its first drop (default: the recipe's)")
    add("--weight-decay", type=float, help="default: the recipe's")
    add("--seed", type=int, help="of weights, order and random changes (default: 0)")
    add("--precision", help="32-true (default), 64-true, bf16-mixed or 16-mixed")
    add("--processes", type=int, help="on this machine, a device each (default: 1; torchrun's, under it)")
    add(
        "--strategy",
        choices=STRATEGIES,
        help="ddp: each process has all weights (default); fsdp2: they are sharded over the processes",
    )
    add("--accumulate", type=int, help="parts in which a process takes its share of a step's images (default: 1)")
    add("--workers", type=int, help="processes that read images, for each of --processes (default: 0)")
    add(
        "--recompute",
        choices=(*RECOMPUTED, "none"),
        help="compute these again in the backward pass: less memory, the same bits",
    )
    add("--checkpoint-every", type=int, help="steps between two checkpoints (default: 100)")
    add("--no-progress", action="store_true", default=False, help="no progress bar")
    add(
        "--continue",
        dest="begin_or_go_on",
        action="store_true",
        default=False,
        help="begin, or go on if the folder holds this run: what torchrun must be given to restart it",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="folder of the run (default: runs/<network>-<attention>-<data>)")
    where.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder, exactly")
    parser.epilog = "Recipes of the papers: " + "; ".join(
        f"{name} {recipe.epochs} epochs, x{recipe.decay} at {', '.join(map(str, recipe.milestones))}, "
        f"weight decay {recipe.weight_decay}"
        for name, recipe in RECIPES.items()
    )


def main(arguments: argparse.Namespace) -> int:
    """Trains. Returns the exit status; what went wrong is said in one line on stderr."""
    from . import images, run

    try:
        settings, folder, launch, resume = _asked(arguments)
        result = run.train(
            settings, folder, launch, resume=resume, download=arguments.download, progress=not arguments.no_progress
        )
    except (ValueError, images.DataError, run.RunError) as error:
        # An image may be unreadable to one process alone; the rest is wrong for all of them.
        if speaks() or isinstance(error, images.DataError):
            print(f"train: {error}", file=sys.stderr)
        return 1
    if speaks():
        figures = "".join(f" {name} {value:.4f}" for name, value in result.metrics.items())
        print(f"{folder}: {result.steps} steps done.{figures}")
    return 0


def _asked(arguments: argparse.Namespace) -> tuple[Settings, Path, Launch, bool | None]:
    """What to train, where, how, and whether to resume (see ``run.train``)."""
    from .settings import RunError, Settings, read_run

    options = vars(arguments)
    given = {name: value for name, value in options.items() if name not in _NOT_SETTINGS}
    launch = {name: options[name] for name in _LAUNCH if name in options}
    if launch.get("recompute") == "none":
        launch["recompute"] = None
    if "stages" in given:
        given["stages"] = tuple(given["stages"])
    if given.get("attention") == "none":
        given["attention"] = None
    if "resume" in arguments:
        if given:
            raise RunError(f"with --resume the settings are the run's own; leave out {', '.join(given)}")
        settings, last = read_run(arguments.resume)
        return settings, arguments.resume, here(launch, last), True
    settings = Settings(**given)
    default = Path("runs") / f"{settings.network}-{settings.attention or 'plain'}-{settings.data}"
    resume = None if arguments.begin_or_go_on else False
    return settings, options.get("output", default), here(launch), resume
