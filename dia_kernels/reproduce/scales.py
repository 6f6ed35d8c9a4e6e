"""How large an experiment is: for minutes and for hours on two cores, and the papers' own size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """The size of every experiment.

    Attributes:
        name: on the command line.
        data: images where none are named, see ``train.images.load``.
        also: images that the comparison of networks then takes too, if they are installed; None for no others.
        images: at most so many are learnt; None for all.
        seeds: runs of each variant.
        epochs, batch_size: of each run; None for the recipe's.
        channels_last: see ``train.settings.Settings``.
        networks: relatives of the papers' four, for the comparison of networks.
        network: on which attention is varied.
        depths: networks of growing depth, for the runs without shortcuts, norms or augmentation.
        timed_batch, timed_side: images of a timed step, and their sides.
        timed_rounds: in which every variant takes its turn.
    """

    name: str
    data: str
    also: str | None
    images: int | None
    seeds: int
    epochs: int | None
    batch_size: int | None
    channels_last: bool
    networks: tuple[str, ...]
    network: str
    depths: tuple[str, ...]
    timed_batch: int
    timed_side: int
    timed_rounds: int


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "tiny", "digits", "fashion", 1000, 3, 10, 32, True,
            ("resnet20bn", "preresnet20", "wrn16_1", "resnext20_2x8"), "resnet14",
            ("resnet14", "resnet20", "resnet26"), 16, 16, 9,
        ),
        Scale(
            "small", "fashion", None, 5_000, 3, 15, 32, True,
            ("resnet29bn", "preresnet29", "wrn22_2", "resnext20_2x8"), "resnet20",
            ("resnet20", "resnet32", "resnet44"), 64, 32, 15,
        ),
        Scale(
            "full", "cifar100", None, None, 5, None, None, False,
            ("resnet164", "preresnet164", "wrn52_4", "resnext101_8x32"), "resnet164",
            ("resnet83", "resnet164", "resnet245"), 128, 32, 25,
        ),
    )
}  # fmt: skip
