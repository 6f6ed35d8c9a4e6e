"""How times are taken here: all implementations in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator

import torch

Call = Callable[[], object]
Samples = dict[str, list[float]]
Clock = Callable[[Call, int], float]

#: One sample is as many calls as take about this long, so that reading the clock costs nothing.
SAMPLE_SECONDS = 2e-3
WARMUP_ROUNDS = 2
#: More than the second-level cache of any GPU holds.
L2_FILLER_BYTES = 512 << 20
#: A GPU is kept busy for so many of its cycles, one to two milliseconds, while a call is put on its queue.
HEAD_START_CYCLES = 3_000_000
MIN_ROUNDS, MAX_ROUNDS = 9, 101


def seconds_a_call(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def synchronised_seconds_a_call(call: Call, repeats: int) -> float:
    """The seconds of calls one after another until the device has done them: the host's, where it is the slower."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def device_seconds_a_call(call: Call, repeats: int) -> float:
    """The device's seconds, by events around each call, with a second-level cache that other data has filled.

    The host has a head start, so that the device waits for no launch.
    """
    filler = torch.empty(L2_FILLER_BYTES, dtype=torch.uint8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        torch.cuda._sleep(HEAD_START_CYCLES)
        filler.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in pairs) / repeats / 1e3


def clock_of(device: str) -> Clock:
    return seconds_a_call if device == "cpu" else device_seconds_a_call


def interleaved(
    calls: dict[str, Call],
    budget: float,
    least: int = MIN_ROUNDS,
    clock: Clock = seconds_a_call,
    sample_seconds: float = SAMPLE_SECONDS,
) -> Samples:
    """Seconds a call, sampled in rounds that visit every implementation once.

    What disturbs the machine for a while disturbs all implementations of a round alike, so ratios
    within a round hold. Each round begins with another implementation, so that none always runs after
    the same neighbour. ``budget`` is the time to spend, in seconds, within
    ``least`` and ``MAX_ROUNDS`` rounds. ``clock(call, repeats)`` tells the seconds of a call; a sample is
    as many calls as take ``sample_seconds``.
    """
    for call in calls.values():
        call()
    repeats = {name: max(1, math.ceil(sample_seconds / clock(call, 1))) for name, call in calls.items()}
    names = list(calls)

    def one_round(first: int) -> dict[str, float]:
        order = names[first:] + names[:first]
        return {name: clock(calls[name], repeats[name]) for name in order}

    start = time.perf_counter()
    for _ in range(WARMUP_ROUNDS):
        one_round(0)
    round_seconds = (time.perf_counter() - start) / WARMUP_ROUNDS
    rounds = min(max(int(budget / round_seconds), least), MAX_ROUNDS)
    sampled = [one_round(k % len(names)) for k in range(rounds)]
    return {name: [sample[name] for sample in sampled] for name in names}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection while a clock runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rounded(samples: Samples) -> Samples:
    """Four digits are more than a clock on a shared machine can promise."""
    return {name: [float(f"{second:.4g}") for second in seconds] for name, seconds in samples.items()}
