"""The plans of the GPU step: how it is laid out for a problem on a GPU, and what that should take.

``python -m dia_kernels info --plan N C H W`` prints them. They are made by ``csrc/core/gpu_plan.h``, a pure function of
the problem and of a GPU's limits, so no GPU is needed; times are those of its model.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import operators

#: Bytes of an element, by the names that the command line knows.
ELEMENT_BYTES = {"float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2}


#: What may lie before the step: nothing, a norm of given statistics, or one of the batch's own.
NORMS = ("none", "given", "batch")

#: Which layouts a plan may have: what the operators take, or one kind for comparison (GpuLayouts in the C++ source).
LAYOUTS = ("any", "sweeps", "products", "clusters")


@dataclass(frozen=True)
class Plan:
    """A plan of one direction of the step.

    Sweeps over the map, ``chunk`` samples at a time, and the cell between them.

    ``cell`` is what makes the cell: kernels of ``tiles``, ``products``, a BLAS, or ``clusters`` of blocks, which take
    ``together`` samples each and make the first sweep too, unless a batch's statistics come between, and forward the
    second. ``passes`` over the map move
    ``bytes``; ``ideal_seconds`` is the time of those passes that nobody can avoid.
    """

    cell: str
    chunk: int
    together: int
    launches: int
    passes: float
    bytes: float
    seconds: float
    ideal_seconds: float


def _library() -> ctypes.CDLL:
    if operators.library_error is not None:
        raise RuntimeError(f"plan: {operators.library_error}")
    library = ctypes.CDLL(str(operators.LIBRARY_PATH))
    for function in (library.dia_kernels_gpus, library.dia_kernels_plan):
        function.restype = ctypes.c_char_p
    library.dia_kernels_plan.argtypes = [ctypes.c_char_p, *[ctypes.c_int64] * 4, *[ctypes.c_int] * 9]
    return library


def gpus() -> list[str]:
    """Names of the GPUs that plans are known for, one of each architecture.

    Raises:
        RuntimeError: the native library is not there.
    """
    return _library().dia_kernels_gpus().decode().split("\n")


def plan(
    shape: Sequence[int],
    device: str = "h100",
    *,
    dtype: str = "bfloat16",
    reduction: int = 4,
    channels_last: bool = False,
    combined: bool = True,
    backward: bool = False,
    tf32: bool = False,
    norm: str = "none",
    layouts: str = "any",
) -> Plan:
    """The plan for a map (N, C, \\*spatial).

    Args:
        shape: of the map, dense and aligned to sixteen bytes.
        device: a name out of ``gpus()``.
        dtype: of the map, a key of ``ELEMENT_BYTES``.
        reduction: r; the bottleneck has C // r values.
        channels_last: whether the channels lie innermost; else the map is contiguous.
        combined: whether shortcut and activation are part of the step.
        backward: of the gradient; else of the forward pass.
        tf32: whether products may be in tf32, as ``torch.backends.cuda.matmul.allow_tf32`` says.
        norm: what lies before the step, out of ``NORMS``.
        layouts: those to choose from, out of ``LAYOUTS``: what operators take, or one kind alone.

    Raises:
        ValueError: an argument is wrong; the message names it.
        RuntimeError: the native library is not there.
    """
    if len(shape) < 3 or any(size < 0 for size in shape):
        raise ValueError(f"shape: expected (N, C, *spatial) of sizes not below 0, got {tuple(shape)}")
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype: expected one of {', '.join(ELEMENT_BYTES)}, got {dtype!r}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if layouts not in LAYOUTS:
        raise ValueError(f"layouts: expected one of {', '.join(LAYOUTS)}, got {layouts!r}")
    samples, channels, *spatial = shape
    if not 1 <= reduction <= channels:
        raise ValueError(f"reduction: expected 1 to {channels}, the channels, got {reduction}")
    size, positions = ELEMENT_BYTES[dtype], math.prod(spatial)
    pack = 16 // size
    aligned = channels % pack == 0 if channels_last else channels * positions % pack == 0
    # Of the result of a ReLU a gradient reads the mask, where there is one (masks.py).
    masked = combined and backward and size == 2 and aligned and (channels_last or positions % pack == 0)
    numbers = (samples, channels, positions, channels // reduction)
    text = _library().dia_kernels_plan(
        device.encode(),
        *numbers,
        size,
        channels_last,
        aligned,
        combined,
        masked,
        backward,
        tf32,
        NORMS.index(norm),
        LAYOUTS.index(layouts),
    )
    if text is None:
        raise ValueError(f"device: expected one of {', '.join(gpus())}, got {device!r}")
    return Plan(**json.loads(text))


def as_text(name: str, p: Plan) -> str:
    """A plan for a reader."""
    if p.cell == "clusters":
        how = f"clusters of blocks, {p.together} samples each"
    else:
        cell = {"tiles": "kernels of tiles", "products": "a BLAS"}[p.cell]
        how = f"sweeps, {p.chunk} samples at a time; the cell between them: {cell}"
    launches = "1 launch" if p.launches == 1 else f"{p.launches} launches"
    return (
        f"{name}\n    {how}\n"
        f"    {launches}, {p.passes:g} passes, {p.bytes / 1e6:.1f} MB; modelled {p.seconds * 1e6:.0f} us, "
        f"of which {p.ideal_seconds * 1e6:.0f} us are the least bytes"
    )
