"""Writes the plans of the GPU step for the usual shapes: layout, passes, and the model's times.

    python bench/plans.py --device h100 --dtype bfloat16

Nothing is run: the plans come from ``csrc/core/gpu_plan.h``. Writes ``results/plans-<device>.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import report

from dia_kernels.plan import ELEMENT_BYTES, Plan, gpus, plan

#: N, C, H, W and r.
SHAPES = (
    (256, 256, 56, 56, 4),
    (256, 512, 28, 28, 4),
    (256, 1024, 14, 14, 4),
    (256, 1024, 14, 14, 20),
    (256, 2048, 7, 7, 4),
    (256, 2048, 7, 7, 20),
    (32, 256, 56, 56, 4),
    (32, 2048, 7, 7, 4),
    (128, 64, 32, 32, 4),
    (128, 128, 16, 16, 4),
    (128, 256, 8, 8, 4),
)


def layout(p: Plan) -> str:
    """How the map is swept, and who makes the cell."""
    return f"clusters of {p.together}" if p.cell == "clusters" else f"sweeps of {p.chunk}, {p.cell}"


def row(shape: Sequence[int], device: str, dtype: str, channels_last: bool, norm: str) -> list[str]:
    *size, r = shape
    cells = [f"{size[0]}x{size[1]}x{size[2]}², r = {r}"]
    for backward in (False, True):
        p = plan(size, device, dtype=dtype, reduction=r, channels_last=channels_last, backward=backward, norm=norm)
        times = f"{p.seconds * 1e6:.0f} / {p.ideal_seconds * 1e6:.0f}"
        cells += [layout(p), str(p.launches), f"{p.passes:g}", times]
    return cells


def markdown(device: str, dtype: str) -> str:
    parts = [
        f"# Plans of the GPU step: {device}, {dtype}",
        "With shortcut and ReLU; forward where no gradient is recorded, backward from the ReLU's mask where there is "
        "one. Sweeps over so many samples, and what makes the cell, or clusters of so many samples; launches; passes "
        "over the map (the least are 3 forward, and backward 4 1/16 from a mask, 5 from y); microseconds by the plan's "
        "model / of the least passes. Measured on an H100: gpu-h100.md.",
    ]
    columns = ["N x C x HW", *["forward", "launches", "passes", "us", "backward", "launches", "passes", "us"]]
    for what, norm in (("The step", "none"), ("The tail, with its batch norm", "batch")):
        for name, last in (("contiguous", False), ("channels_last", True)):
            rows = [row(shape, device, dtype, last, norm) for shape in SHAPES]
            parts += [f"## {what}, {name}", report.table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plans of the GPU step.")
    parser.add_argument("--device", default="h100", choices=gpus())
    parser.add_argument("--dtype", default="bfloat16", choices=list(ELEMENT_BYTES))
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    text = markdown(options.device, options.dtype)
    (options.output / f"plans-{options.device}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
