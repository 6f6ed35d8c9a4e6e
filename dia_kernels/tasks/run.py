"""What the tasks share: attention for a network of another library, its training, and the verdict."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import sharing

Model = TypeVar("Model", bound=nn.Module)

REDUCTION = 4
#: The norm of the gradient is cut to this: one scene that goes wrong early does not undo the steps before.
_GRADIENT_NORM = 5.0


@dataclass(frozen=True)
class Settings:
    """How much a task does.

    Attributes:
        train: scenes made for training.
        test: scenes made to measure with.
        epochs: passes over the scenes for training.
        batch: scenes a step.
        rate: highest learning rate of the run.
        judged: whether a metric that is too low is an error.
    """

    train: int
    test: int
    epochs: int
    batch: int
    rate: float
    judged: bool = True


@dataclass(frozen=True)
class Trained:
    """The mean loss of each epoch, and the median seconds of a step."""

    losses: list[float]
    seconds: float


def converted(model: Model) -> Model:
    """Gives the residual blocks of ``model`` shared attention, in place, prints the report and returns the model."""
    sharing.share_attention(model, cell="lstm", reduction=REDUCTION)
    print(sharing.report(model))
    return model


def fit(model: nn.Module, loss: Callable[[list[int]], Tensor], settings: Settings, seed: int) -> Trained:
    """Trains ``model`` with AdamW, its learning rate up and down in one cycle; prints one line an epoch.

    Args:
        model: in any mode; is in training mode afterwards.
        loss: the loss, a scalar, of the scenes with these numbers (0 to ``settings.train`` - 1).
        settings: their number, the batch, the epochs and the learning rate.
        seed: of the order of the scenes.
    """
    steps = settings.train // settings.batch
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.epochs * steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(seed)
    means, seconds = [], []
    model.train()
    for epoch in range(settings.epochs):
        order = torch.randperm(settings.train, generator=generator).tolist()
        total = 0.0
        for k in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad()
            value = loss(order[k * settings.batch : (k + 1) * settings.batch])
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            total += value.item()
            seconds.append(time.perf_counter() - start)
        means.append(total / steps)
        print(f"epoch {epoch + 1} of {settings.epochs}: loss {means[-1]:.3f}", flush=True)
    return Trained(means, statistics.median(seconds))


def verdict(name: str, value: float, required: float, settings: Settings) -> int:
    """The exit status: 1 if the metric ``name`` is judged and below what is required, and says so."""
    if settings.judged and value < required:
        print(f"FAILED: {name} {value:.3f} is below {required}", file=sys.stderr)
        return 1
    return 0
