"""The command line: ``python -m dia_kernels info | params | train | reproduce | demo``.

Each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .reproduce import command as reproducing
from .train import command as training
from .train.launch import leave

_PICTURE_FORMATS = (".png", ".pdf", ".svg")
#: By task of the demo.
_DEMO_PICTURES = {
    "classify": Path("demo.png"),
    "detect": Path("demo-detect.png"),
    "segment3d": Path("demo-segment3d.png"),
}


def _epochs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text!r}")
    return int(text)


def _picture(text: str) -> Path:
    """Path of a picture. Checked before the demo begins, which writes it at its end."""
    path = Path(text)
    if path.suffix not in _PICTURE_FORMATS:
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(_PICTURE_FORMATS)}, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dia_kernels", description="Dense-and-Implicit Attention, fused.")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="say which backends are here, why others are not, and the versions")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument(
        "--plan", nargs="+", type=int, metavar="SIZE", help="print the GPU plan for a map N C H W (or N C L, N C D H W)"
    )
    info.add_argument("--device", default="h100", help="with --plan: the GPU (default: h100)")
    info.add_argument("--dtype", default="bfloat16", help="with --plan: of the map (default: bfloat16)")
    info.add_argument("--reduction", type=int, default=4, help="with --plan: r of the attention (default: 4)")
    info.add_argument("--channels-last", action="store_true", help="with --plan: the map is channels_last")
    info.set_defaults(run=_info)

    params = commands.add_parser("params", help="count the parameters of every network, beside the published figures")
    params.set_defaults(run=_params)

    train = commands.add_parser("train", help="train a network on images, by its paper's recipe")
    training.add_arguments(train)
    train.set_defaults(run=_train)

    reproduce = commands.add_parser(
        "reproduce", help="do the papers' experiments, at the size of this machine or in full"
    )
    reproducing.add_arguments(reproduce)
    reproduce.set_defaults(run=_reproduce)

    demo = commands.add_parser("demo", help="train a small network in minutes: digits, a detector or a 3-D segmenter")
    demo.add_argument(
        "--task",
        choices=tuple(_DEMO_PICTURES),
        default="classify",
        help="read handwritten digits and time attention (classify), find made shapes in images (detect) or made "
        "blobs in volumes (segment3d); default: classify",
    )
    demo.add_argument("--epochs", type=_epochs, help="passes over the training images (default: the task's, quick: 1)")
    demo.add_argument("--seed", type=int, default=0, help="of weights, shuffling and made scenes (default: 0)")
    demo.add_argument(
        "--picture",
        type=_picture,
        help=f"written there (default: {', '.join(map(str, _DEMO_PICTURES.values()))}, by task)",
    )
    demo.add_argument("--quick", action="store_true", help="few images and steps; what is learned is not judged")
    demo.set_defaults(run=_demo)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    if arguments.plan is not None:
        return _plan(arguments)
    from . import info

    print((info.as_json if arguments.json else info.as_text)(info.gather()))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from . import plan

    options = {"dtype": arguments.dtype, "reduction": arguments.reduction, "channels_last": arguments.channels_last}
    plans = {}
    try:
        for what, norm in (("step", "none"), ("tail", "batch")):
            for direction in ("forward", "backward"):
                plans[f"{what} {direction}"] = plan.plan(
                    arguments.plan, arguments.device, norm=norm, backward=direction == "backward", **options
                )
    except (ValueError, RuntimeError) as error:
        sys.exit(f"info: {error}")
    if arguments.json:
        print(json.dumps({name: vars(p) for name, p in plans.items()}, indent=2))
    else:
        print("\n".join(plan.as_text(name, p) for name, p in plans.items()))
    return 0


def _params(arguments: argparse.Namespace) -> int:
    from . import params

    rows = params.count_all()
    print(params.as_text(rows))
    return 0 if all(row.agrees for row in rows) else 1


@contextlib.contextmanager
def _extra(command: str, modules: Sequence[str], extra: str | None = None) -> Iterator[None]:
    """Ends the process with one line where a module of the package's ``extra`` (default: ``command``) is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in modules:
            raise
        sys.exit(f'{command}: needs {missing}, which is not here: pip install "dia_kernels[{extra or command}]"')


def _train(arguments: argparse.Namespace) -> int:
    with _extra("train", training.MODULES):
        return training.main(arguments)


def _reproduce(arguments: argparse.Namespace) -> int:
    with _extra("reproduce", (*training.MODULES, "matplotlib"), "demo"):
        return reproducing.main(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    picture = _DEMO_PICTURES[arguments.task] if arguments.picture is None else arguments.picture
    if arguments.task != "classify":
        return _demo_task(arguments, picture)
    with _extra("demo", (*training.MODULES, "matplotlib")):
        from . import demo
    settings = demo.QUICK if arguments.quick else demo.FULL
    return demo.run(settings, picture, seed=arguments.seed, epochs=arguments.epochs)


def _demo_task(arguments: argparse.Namespace, picture: Path) -> int:
    with _extra("demo", ("matplotlib",)):
        from .tasks import detect, segment3d
    task = detect if arguments.task == "detect" else segment3d
    settings = task.QUICK if arguments.quick else task.FULL
    if arguments.epochs is not None:
        settings = dataclasses.replace(settings, epochs=arguments.epochs)
    with _extra("demo", ("monai", "torchvision"), "networks"):
        return task.run(settings, picture, seed=arguments.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that ``arguments`` (by default those of the process) name; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    leave(main())
