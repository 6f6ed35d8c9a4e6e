"""Launches the operators' Triton kernels at many sizes on a GPU that is not there, and prints what would be compiled.

Triton's own launcher decides what is a new kernel, and its own autotuner what is to be timed; only the compiler, the
driver and the clock are stand-ins. As JSON: for each series of shapes how many kernels its first shape compiled, and
how many all of them; with the argument ``timed`` how many launches one shape had timed.

A process of its own: Triton decides at import whether it interprets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from dia_kernels import SharedAttention, backends
from dia_kernels.backends.triton import operators

#: Series of maps: shapes that differ in samples and positions.
SERIES = {
    "large, in fours": [(n, 64, side, side) for side in (36, 40, 56, 60) for n in (1, 2, 3, 17)],
    "odd": [(n, 25, side, side) for side in (101, 103, 107) for n in (1, 2, 3)],
    "a program a sample": [(n, 64, side, side) for side in (12, 16) for n in (1, 2, 3, 17)],
    "a program an odd sample": [(n, 25, side, side) for side in (23, 25, 27, 31) for n in (1, 2, 3, 17)],
}


class StandInDriver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return time


class Kernel:
    """What a compiled kernel is to its launcher."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


compiled: list[tuple[str, str]] = []
timed: list[float] = []


def time(call: Callable[[], Any], quantiles: Any) -> list[float]:
    call()
    timed.append(1.0 + len(timed))
    return [timed[-1]] * len(quantiles)


def compile_(self: JITFunction, key: str, signature: Any, device: int, *_: Any) -> Kernel:
    compiled.append((self.__name__, key))
    kernel = self.device_caches[device][0][key] = Kernel()
    return kernel


def train(shape: tuple[int, ...], channels_last: bool) -> None:
    """Every kernel of a step and of a tail."""
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    x, s = (torch.empty(shape).contiguous(memory_format=format_).requires_grad_() for _ in range(2))
    attention = SharedAttention(shape[1], 4, backend="counted")
    for norm in (None, nn.BatchNorm2d(shape[1])):
        y, state = attention(x, shortcut=s, activation="relu", norm=norm)
        y, _ = attention(y, state, shortcut=y, activation="relu", norm=norm)
        y.sum().backward()


def main() -> None:
    driver.set_active(StandInDriver())
    JITFunction._do_compile = compile_
    backends.add("counted", "cpu", operators.KERNELS, float64=False)
    if sys.argv[1:] == ["timed"]:
        train((2, 64, 36, 36), True)
        print(json.dumps({"timed": len(timed)}))
        return
    found = {}
    for name, shapes in SERIES.items():
        for channels_last in (False, True):
            before = len(compiled)
            train(shapes[0], channels_last)
            first = len(compiled)
            for shape in shapes:
                train(shape, channels_last)
            found[f"{name}, channels_last={channels_last}"] = (first - before, [k for k, _ in compiled[first:]])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
