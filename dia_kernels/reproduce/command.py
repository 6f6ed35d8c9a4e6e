"""``python -m dia_kernels reproduce``: its options, and the three files that an experiment leaves."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scales import Scale
    from .tables import Results

#: In the order in which ``all`` does them.
NAMES = (
    "params", "accuracy", "any-attention", "ablation", "no-skip", "no-norm", "no-augmentation", "correlation", "speed",
)  # fmt: skip
SCALES = ("tiny", "small", "full")

#: Of the pictures: a page is wide enough for them, and a repository is large enough.
_DOTS_PER_INCH = 90


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("name", choices=(*NAMES, "all"), help="of the experiment")
    parser.add_argument(
        "--scale", choices=SCALES, default="tiny", help="tiny: minutes on two cores (default); full: the papers'"
    )
    parser.add_argument(
        "--data", choices=("digits", "fashion", "cifar10", "cifar100"), help="images (default: the scale's)"
    )
    parser.add_argument("--folder", type=Path, help="of the images, see `train`")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR into --folder first, if it is not there")
    parser.add_argument(
        "--out", type=Path, default=Path("reproduced"), help="folder of the results (default: reproduced)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a core, or one with a GPU)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def main(arguments: argparse.Namespace) -> int:
    """Does one experiment, or all. Returns the exit status; what went wrong is said in one line on stderr."""
    from ..train.images import DataError, load
    from ..train.settings import RunError
    from .scales import SCALES as scales

    names = NAMES if arguments.name == "all" else (arguments.name,)
    scale = scales[arguments.scale]
    if arguments.data is not None:
        scale = replace(scale, also=None)
    try:
        if arguments.jobs is not None and arguments.jobs < 1:
            raise ValueError(f"jobs: expected at least 1, got {arguments.jobs}")
        if arguments.download:
            load(arguments.data or scale.data, arguments.folder, download=True)
        for number, name in enumerate(names, start=1):
            print(f"[{number}/{len(names)}] ", end="")
            _do(name, scale, arguments)
    except (ValueError, DataError, RunError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    return 0


def _do(name: str, scale: Scale, arguments: argparse.Namespace) -> None:
    """Leaves ``<name>-<scale>.json``, ``.md`` and ``.png``; while it runs, a folder of that name holds its trials."""
    from ..train.files import write
    from ..train.settings import RunError
    from .experiments import EXPERIMENTS

    experiment, out = EXPERIMENTS[name], arguments.out
    stem = f"{name}-{scale.name}"
    place, file = out / stem, out / f"{stem}.json"
    if (place.exists() or file.exists()) and not arguments.resume:
        raise RunError(f"{out}: holds {stem} already; resume it, or name another folder")
    print(f"{experiment.title} ({stem})", flush=True)
    if file.exists():
        results = _read(file, _command(name, arguments))
    else:
        results = _results(name, scale, place, arguments)
        write(file, lambda f: f.write(f"{json.dumps(results)}\n".encode()))
    table = experiment.table(results)
    text = f"# {experiment.title}\n\n`{results['command']}`\n\n{table}"
    write(out / f"{stem}.md", lambda f: f.write(text.encode()))
    experiment.draw(results).savefig(out / f"{stem}.png", dpi=_DOTS_PER_INCH)
    print(table, flush=True)


def _read(file: Path, command: str) -> Results:
    """The results in ``file``, once it is sure that they are those of ``command``."""
    from ..train.settings import RunError

    try:
        results = json.loads(file.read_text())
        found = results["command"]
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{file}: damaged ({error})") from error
    if found != command:
        raise RunError(f"{file}: made by `{found}`; name another folder")
    return results


def _results(name: str, scale: Scale, place: Path, arguments: argparse.Namespace) -> Results:
    import torch

    from .. import info
    from . import variants
    from .experiments import EXPERIMENTS, Work
    from .trials import usual_jobs

    jobs = usual_jobs() if arguments.jobs is None else arguments.jobs
    common = variants.base(scale, arguments.data, arguments.folder)
    return {
        "experiment": name,
        "title": EXPERIMENTS[name].title,
        "scale": scale.name,
        "data": common.data,
        "command": _command(name, arguments),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else info.processor_model(),
        "versions": info.versions(),
        "records": EXPERIMENTS[name].do(Work(scale, common, place, jobs, not arguments.no_progress)),
    }


def _command(name: str, arguments: argparse.Namespace) -> str:
    """What does experiment ``name`` again."""
    options = {"scale": arguments.scale, "data": arguments.data, "folder": arguments.folder}
    given = [word for option, value in options.items() if value is not None for word in (f"--{option}", str(value))]
    return shlex.join(["python", "-m", "dia_kernels", "reproduce", name, *given])
