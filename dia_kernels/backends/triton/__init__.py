"""The Triton backend: the portable GPU path, which needs no compiler at install.

``kernels.py`` holds the kernels, ``operators.py`` what launches them, ``plan.py`` their tiles. Triton is imported when
the first of them runs, not before.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

#: The operators that Triton's kernels implement; of the others (a SyncBatchNorm's parts) the reference stands in.
NAMES = ("step", "step_", "step_backward", "tail", "tail_join", "tail_backward", "pool", "rescale", "rescale_backward")

#: Whether Triton is installed.
INSTALLED = importlib.util.find_spec("triton") is not None


def missing() -> str | None:
    """None if the backend can run here, else the sentence that says why it cannot."""
    if not INSTALLED:
        return "Triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


def _run(name: str, *args: Any) -> Any:
    """The operator, on the device of its tensors: Triton launches on the current one."""
    kernel = importlib.import_module(".operators", __name__).KERNELS[name]
    with torch.cuda.device_of(next(a for a in args if isinstance(a, torch.Tensor))):
        return kernel(*args)


KERNELS: dict[str, Callable[..., Any]] = {name: partial(_run, name) for name in NAMES}
