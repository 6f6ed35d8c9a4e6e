"""Tiles of the sweeps by measurement, on request: ``DIA_KERNELS_AUTOTUNE=1``.

Triton's own autotuner times the candidates at the first launch of a kernel for some channels, positions, layout and
dtypes, and keeps what it found on disk, in Triton's cache. Without the request nothing is timed: the plan chooses.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
from triton.runtime import driver

from .plan import candidates_of


def requested() -> bool:
    return os.environ.get("DIA_KERNELS_AUTOTUNE") == "1"


@cache
def tuned(kernel: Any) -> Any:
    """A sweep that chooses CHANNELS, POSITIONS and its warps itself. Its launches must bear repetition."""
    tune = triton.autotune(
        configs=[triton.Config({"CHANNELS": 0, "POSITIONS": 0}), triton.Config({"CHANNELS": 1, "POSITIONS": 1})],
        key=["count", "length", "sc"],
        prune_configs_by={"early_config_prune": _candidates},
        do_bench=_time,
        cache_results=True,
    )
    return tune(kernel)


def _candidates(_: Any, named: dict[str, Any], **__: Any) -> list[triton.Config]:
    """Of one launch: what is listed above only makes Triton ask."""
    return [
        triton.Config({"CHANNELS": tile.channels, "POSITIONS": tile.positions}, num_warps=tile.warps)
        for tile in candidates_of(named["count"], named["length"], named["sc"] == 1)
    ]


def _time(call: Any, quantiles: Any) -> Any:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "DIA_KERNELS_AUTOTUNE: a CUDA graph is being captured, and kernels for these sizes are not timed yet; "
            "run the same call once before the capture"
        )
    return driver.active.get_benchmarker()(call, quantiles=quantiles)
