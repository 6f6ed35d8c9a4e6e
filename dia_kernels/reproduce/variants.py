"""The experiments that train: which variants each has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..train.images import installed
from ..train.settings import Settings
from .scales import Scale
from .trials import Trial

#: Settings behind the names of the attention in the tables.
_PLAIN: dict[str, Any] = {"attention": None}
_SE: dict[str, Any] = {"attention": "se", "shared": False}
_SHARED_SE: dict[str, Any] = {"attention": "se", "shared": True}
_DIA: dict[str, Any] = {"attention": "dia"}

_CELLS = ("se", "eca", "cbam", "srm", "dsu", "lstm")


def base(scale: Scale, data: str | None, folder: Path | None) -> Settings:
    """What all runs of an experiment have in common."""
    return Settings(
        data=data or scale.data,
        folder=None if folder is None else str(folder),
        images=scale.images,
        epochs=scale.epochs,
        batch_size=scale.batch_size,
        channels_last=scale.channels_last,
    )


def _trial(common: Settings, label: dict[str, str], measure: str | None = None, **settings: Any) -> Trial:
    return Trial(tuple(label.items()), replace(common, **settings), measure)


def accuracy(scale: Scale, common: Settings) -> list[Trial]:
    """Each network plain, with SE, with SE shared by a stage, with DIA; one of them on the scale's other images too."""
    kinds = {"plain": _PLAIN, "SE": _SE, "shared SE": _SHARED_SE, "DIA-LSTM": _DIA}
    where = [(common.data, network) for network in scale.networks]
    if scale.also is not None and installed(scale.also):
        where.append((scale.also, scale.network))
    return [
        _trial(
            common, {"images": data, "network": network, "attention": kind}, network=network, data=data, **settings
        )
        for data, network in where
        for kind, settings in kinds.items()
    ]  # fmt: skip


def any_attention(scale: Scale, common: Settings) -> list[Trial]:
    """Each cell alone in every block, and shared by the blocks of a stage."""
    trials = [_trial(common, {"attention": "none", "where": "-"}, network=scale.network, **_PLAIN)]
    for cell in _CELLS:
        for where, shared in (("each block", False), ("shared", True)):
            label = {"attention": cell.upper(), "where": where}
            trials.append(_trial(common, label, network=scale.network, attention=cell, shared=shared))
    return trials


def ablation(scale: Scale, common: Settings) -> list[Trial]:
    """DIA-LSTM, and one thing at a time that is different."""
    changes: dict[tuple[str, str], dict] = {("-", "r = 4, one layer, all stages, sigmoid, state"): {}}
    changes |= {("reduction", f"r = {r}"): {"reduction": r} for r in (1, 2, 8, 16)}
    changes |= {("layers", str(n)): {"layers": n} for n in (2, 3)}
    changes |= {
        ("stages", " and ".join(str(s + 1) for s in stages)): {"stages": stages}
        for stages in ((0,), (1,), (2,), (0, 1), (1, 2))
    }
    changes |= {
        ("output", "tanh"): {"attention": "lstm_tanh"},
        ("state", "not carried"): {"carry_state": False},
        ("state", "none shared: an LSTM each block"): {"shared": False},
    }
    return [
        _trial(common, {"changed": what, "to": to}, network=scale.network, **{**_DIA, **settings})
        for (what, to), settings in changes.items()
    ]


def _at_growing_depth(scale: Scale, common: Settings, **settings: Any) -> list[Trial]:
    kinds = {"plain": _PLAIN, "SE": _SE, "DIA-LSTM": _DIA}
    return [
        _trial(common, {"network": network, "attention": kind}, network=network, **attention, **settings)
        for network in scale.depths
        for kind, attention in kinds.items()
    ]


def no_skip(scale: Scale, common: Settings) -> list[Trial]:
    """Networks of growing depth without shortcuts."""
    return _at_growing_depth(scale, common, skip=False)


def no_norm(scale: Scale, common: Settings) -> list[Trial]:
    """Networks of growing depth without batch norms."""
    return _at_growing_depth(scale, common, norm=False)


def no_augmentation(scale: Scale, common: Settings) -> list[Trial]:
    """Networks of growing depth on images that are not changed at random."""
    return _at_growing_depth(scale, common, augment=False)


def correlation(scale: Scale, common: Settings) -> list[Trial]:
    """How alike the scales of a stage's blocks are, with an LSTM or SE in each block and shared."""
    return [
        _trial(
            common, {"attention": cell.upper(), "where": where}, "correlation",
            network=scale.depths[-1], attention=cell, shared=shared,
        )
        for cell in ("lstm", "se")
        for where, shared in (("each block", False), ("shared", True))
    ]  # fmt: skip
