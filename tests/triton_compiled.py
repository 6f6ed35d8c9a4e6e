"""Compiles every Triton kernel ahead of time for a GPU that is not here, and prints what came out, as JSON.

    python tests/triton_compiled.py cuda 90        or: hip gfx942

A process of its own: Triton decides at import whether it interprets.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dia_kernels.backends.triton import kernels
from dia_kernels.backends.triton.plan import CHANNEL_BLOCK, ELEMENT_BLOCK, SAMPLE_BLOCK, sample_tile_of, tile_of

#: Of a map, by its layout: channels, positions.
SIZES = {"contiguous": (256, 784), "channels_last": (256, 784), "odd": (25, 49), "one position": (256, 1)}
ELEMENTS = ("fp32", "bf16", "fp16")
#: Which arguments are there: the kinds of launches that the operators make.
REDUCE = {
    "pool": {"x", "total"},
    "gradient": {"x", "dy", "product"},
    "masked gradient": {"x", "dy", "y", "g", "product"},
    "through a norm": {"x", "dy", "y", "g", "shift", "total", "product"},
}
SPREAD = {
    "rescale": {"x", "shortcut", "scale"},
    "normalise": {"x", "shortcut", "scale", "offset", "shift"},
    "gradient": {"dy", "scale", "offset"},
    "masked gradient": {"dy", "y", "scale", "offset"},
    "through a norm": {"dy", "x", "scale", "offset", "shift", "slope"},
}
MAPS = {"x", "dy", "y", "g", "shortcut", "out", "dx"}
#: Of the steps with a program a sample, by its layout: channels, positions, width of the bottlenecks.
SAMPLES = {
    "contiguous": [(64, 1024, 16), (128, 256, 32), (256, 64, 12)],
    "channels_last": [(64, 1024, 16), (128, 256, 32), (256, 64, 12)],
    "odd": [(25, 49, 3)],
}


def compiled(
    target: GPUTarget, kernel, there: set[str] | None, element: str, constants: dict, layout: str, warps: int = 4
) -> dict:
    """One kernel with the arguments that are ``there`` (None: all), every number and pointer a multiple of sixteen."""
    signature, values, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        elif name in ("sc", "sl") and (name == "sc") == (layout == "channels_last"):
            signature[name], values[(place,)] = "constexpr", 1  # as Triton takes every number that is one
        elif layout == "one position" and name in ("length", "sc"):
            signature[name], values[(place,)] = "constexpr", 1
        elif name in ("count", "width", "length", "rows", "samples", "sc", "sl") or name.endswith("_stride"):
            signature[name] = "i32"
            if layout != "odd":
                aligned[(place,)] = [["tt.divisibility", 16]]
        elif name == "eps":
            signature[name] = "fp32"
        elif there is not None and name not in there and name != "out":
            signature[name], values[(place,)] = "constexpr", None
        else:
            signature[name] = f"*{element if name in MAPS else 'fp32'}"
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    result = triton.compile(source, target=target, options={"num_warps": warps})
    found = {"shared": result.metadata.shared}
    if "cubin" in result.asm:
        found |= resources(result.asm["cubin"])
        found["wide"] = len(re.findall(r"ld\.global\S*\.v4\.b32", result.asm["ptx"]))
    else:
        text = result.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        found["spilled"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        found["wide"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    return found


def resources(cubin: bytes) -> dict:
    """Registers and bytes of the stack, by cuobjdump: beside nvcc or in Triton's wheel."""
    tool = shutil.which("cuobjdump") or str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local}


def main(backend: str, architecture: str) -> None:
    target = GPUTarget(
        backend, int(architecture) if backend == "cuda" else architecture, 32 if backend == "cuda" else 64
    )
    found = {}
    for layout, (channels, positions) in SIZES.items():
        tile = tile_of(channels, positions, layout == "channels_last")
        of_tile = {"CHANNELS": tile.channels, "POSITIONS": tile.positions}
        sweeps = [(f"reduce: {name}", kernels.reduce, there, of_tile) for name, there in REDUCE.items()]
        for name, there in SPREAD.items():
            sweeps.append((f"spread: {name}", kernels.spread, there, {"RELU": "shortcut" in there, **of_tile}))
        sweeps.append(("moments", kernels.moments, None, of_tile))
        for element in ELEMENTS:
            for name, kernel, there, constants in sweeps:
                found[f"{name}, {layout}, {element}"] = compiled(target, kernel, there, element, constants, layout)
    for layout, sizes in SAMPLES.items():
        for channels, positions, width in sizes:
            for element in ELEMENTS:
                tile = sample_tile_of(channels, positions, width, 4 if element == "fp32" else 2)
                of_tile = {"CHANNELS": tile.channels, "WIDTH": tile.width, "POSITIONS": tile.positions}
                of_tile |= {"MORE": positions > tile.positions, "TANH": False}
                name = f"{channels} x {positions}, {layout}, {element}"
                found[f"sample: {name}"] = compiled(
                    target, kernels.step_of_sample, None, element, {"RELU": True, **of_tile}, layout, tile.warps
                )
                found[f"gradient of a sample: {name}"] = compiled(
                    target, kernels.step_of_sample_backward, None, element, of_tile, layout, tile.warps
                )
    tables = {"CHANNELS": CHANNEL_BLOCK, "SAMPLES": SAMPLE_BLOCK}
    for name, kernel, constants in (
        ("gates", kernels.gates, {"TANH": True, "BLOCK": ELEMENT_BLOCK}),
        ("gate_gradients", kernels.gate_gradients, {"TANH": False, "BLOCK": ELEMENT_BLOCK}),
        ("batch_statistics", kernels.batch_statistics, tables),
        ("norm_gradients", kernels.norm_gradients, {"BATCH": True, **tables}),
    ):
        found[name] = compiled(target, kernel, None, "fp32", constants, "contiguous")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
