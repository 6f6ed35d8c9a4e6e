"""How large an experiment is: for minutes and for hours on two cores, and the papers' own size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
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


_TINY = Scale(
    name="tiny",
    data="digits",
    also="fashion",
    images=1000,
    seeds=3,
    epochs=10,
    batch_size=32,
    channels_last=True,
    networks=("resnet20bn", "preresnet20", "wrn16_1", "resnext20_2x8"),
    network="resnet14",
    depths=("resnet14", "resnet20", "resnet26"),
    timed_batch=16,
    timed_side=16,
    timed_rounds=9,
)
_SMALL = Scale(
    name="small",
    data="fashion",
    also=None,
    images=5000,
    seeds=3,
    epochs=15,
    batch_size=32,
    channels_last=True,
    networks=("resnet29bn", "preresnet29", "wrn22_2", "resnext20_2x8"),
    network="resnet20",
    depths=("resnet20", "resnet32", "resnet44"),
    timed_batch=64,
    timed_side=32,
    timed_rounds=15,
)
_FULL = Scale(
    name="full",
    data="cifar100",
    also=None,
    images=None,
    seeds=5,
    epochs=None,
    batch_size=None,
    channels_last=False,
    networks=("resnet164", "preresnet164", "wrn52_4", "resnext101_8x32"),
    network="resnet164",
    depths=("resnet83", "resnet164", "resnet245"),
    timed_batch=128,
    timed_side=32,
    timed_rounds=25,
)

SCALES = {scale.name: scale for scale in (_TINY, _SMALL, _FULL)}
