"""``backend="simulated"``: csrc/ops for a GPU on the simulated one, for tensors of the CPU.

Checks, plans, workspaces and launches are those of a card; the kernels run on the simulated machine, which sees every
access.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import simulated
import torch

from dia_kernels import backends, operators, plan

LIBRARY = simulated.BUILD / "libdia_simulated_operators.so"


def library() -> ctypes.CDLL:
    """Makes ``"simulated"`` a backend of this process, and returns the library behind it."""
    simulated.machine()  # builds both, or skips
    return load()


@cache
def load() -> ctypes.CDLL:
    """``library``, which another process has built."""
    backends.add("simulated", "cpu", {}, float64=False, masked=operators.GPU_MASKED_DTYPES, folds=True)
    torch.ops.load_library(LIBRARY)
    loaded = ctypes.CDLL(str(LIBRARY))
    for function in (loaded.dia_simulated_launches, loaded.dia_simulated_seen):
        function.restype = ctypes.c_char_p
    int64, text = ctypes.c_int64, ctypes.c_char_p
    loaded.dia_simulated_limits.argtypes = [ctypes.c_int, int64, ctypes.c_double, ctypes.c_int]
    loaded.dia_simulated_lie.argtypes = [text, text, int64, int64, text, ctypes.c_uint32, ctypes.c_uint32]
    return loaded


@contextmanager
def device(
    layouts: str = "any",
    multiprocessors: int = 4,
    l2: int = 64 << 10,
    flops: float = 2e12,
    threads: int = 64,
) -> Iterator[None]:
    """A simulated GPU with these limits, which takes these plans and runs at most ``threads`` of a block."""
    library().dia_simulated_limits(multiprocessors, l2, flops, threads)
    library().dia_kernels_gpu_layouts(plan.LAYOUTS.index(layouts))
    launches()
    try:
        yield
    finally:
        library().dia_simulated_limits(4, 64 << 10, 2e12, 64)
        library().dia_kernels_gpu_layouts(0)


def launches() -> list[str]:
    """What was launched since the last call, by kernel: ``clear`` and ``product`` too."""
    return [line.split(" ")[0].split("<")[0] for line in library().dia_simulated_launches().decode().splitlines()]


@contextmanager
def lie(kernel: str, table: str = "", before: int = 0, after: int = 0, barrier: tuple[str, int, int] | None = None):
    """The machine is told that a kernel's table is shorter, or leaves a barrier out."""
    file, line, column = barrier or (None, 0, 0)
    library().dia_simulated_lie(
        kernel.encode(), table.encode(), before, after, None if file is None else file.encode(), line, column
    )
    try:
        yield
    finally:
        library().dia_simulated_lie(b"", b"", 0, 0, None, 0, 0)


def seen() -> tuple[set[tuple[str, str]], set[tuple[str, tuple[str, int, int]]]]:
    """(kernel, table) and (kernel, barrier) of all launches since the last call."""
    tables, barriers = set(), set()
    for text in library().dia_simulated_seen().decode().splitlines():
        kernel, _, what = text.partition("|")
        kind, _, name = what.partition(" ")
        if kind == "table":
            tables.add((kernel, name))
        else:
            file, line, column = name.rsplit(" ", 2)
            barriers.add((kernel, (file, int(line), int(column))))
    return tables, barriers
