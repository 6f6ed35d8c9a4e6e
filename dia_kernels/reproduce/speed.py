"""What a training step of each variant of a network takes: its time, and the memory that it needs."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from .. import models
from .scales import Scale

#: Arguments of the network behind each variant, and whether it is compiled.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "plain, compiled": ({}, True),
    "SE": ({"attention": "se"}, False),
    "DIA, eager": ({"attention": "dia", "backend": "reference", "fold_norm": False}, False),
    "DIA, compiled": ({"attention": "dia", "backend": "reference", "fold_norm": False}, True),
    "DIA, ours": ({"attention": "dia"}, False),
    "DIA, ours, compiled": ({"attention": "dia"}, True),
}
_WARM_UP = 2


def measure(name: str, scale: Scale) -> list[dict[str, Any]]:
    """Of each variant of network ``name``: seconds of every round, in which all take turns, and ``peak_bytes``.

    On a GPU if there is one. The peak is what a step adds to the memory that is in use before it, at most.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.compiler.reset()  # of the one forward that all networks have, only so many forms are compiled
    steps = {}
    for variant, (options, compiled) in VARIANTS.items():
        torch.manual_seed(0)
        network: nn.Module = models.create(name, 10, **options).to(device)
        if compiled:
            network.compile()
        steps[variant] = _step(
            network, torch.randn(scale.timed_batch, 3, scale.timed_side, scale.timed_side, device=device)
        )
    seconds = _in_turns(steps, scale.timed_rounds)
    return [
        {"network": name, "variant": v, "seconds": seconds[v], "peak_bytes": _peak_bytes(steps[v])} for v in VARIANTS
    ]


def _step(network: nn.Module, images: Tensor) -> Callable[[], None]:
    labels = torch.arange(len(images), device=images.device) % 10
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def _in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    for step in steps.values():
        for _ in range(_WARM_UP):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = _now()
            step()
            seconds[name].append(float(f"{_now() - start:.4g}"))
    return seconds


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes(step: Callable[[], None]) -> int:
    """Bytes that a step allocates beyond what is there before it, at the moment when that is most."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes of each profile, and of absent GPUs
    gc.collect()  # what is freed meanwhile would count too
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def ratio(rows: list[dict[str, Any]], variant: str) -> float:
    """Median time of a variant over that of the plain network, of ratios within a round."""
    seconds = {row["variant"]: row["seconds"] for row in rows}
    return statistics.median(a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True))
