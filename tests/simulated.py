"""The GPU kernels on the simulated machine: builds them, and launches them on torch's CPU tensors."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from builds import ROOT, sole_use
from torch import Tensor

from dia_kernels import LSTMParameters, reference

BUILD = ROOT / "build" / "simulated"
TORCH = Path(torch.__file__).parent
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SHARED_BYTES = 64 << 10
#: Of a block of kernels that make tables, which are compiled for so many.
TABLE_THREADS = 256
#: Blocks of a cluster, and threads of each, of which a card's have 512.
CLUSTER_BLOCKS, CLUSTER_THREADS = 8, 64

Tensors = dict[str, Tensor]


@cache
def build() -> str:
    """Builds the module, once; the second time of all is incremental. Returns what went wrong, or nothing."""
    with sole_use(BUILD):
        return _build()


def _build() -> str:
    import pybind11

    environment = os.environ | {"PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))}
    configure = [
        *("cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD, "-DDIA_KERNELS_SIMULATED=ON"),
        *(f"-DTORCH_INCLUDE_DIR={TORCH / 'include'}", f"-DTORCH_LIBRARY_DIR={TORCH / 'lib'}"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"),
    ]
    for command in (configure, ["cmake", "--build", BUILD]):
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode != 0:
            return result.stdout + result.stderr
    return ""


@cache
def load() -> ModuleType:
    (path,) = BUILD.glob("dia_simulated*.so")
    spec = importlib.util.spec_from_file_location("dia_simulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine() -> ModuleType:
    """The simulated GPU with its kernels."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the simulated GPU cannot be built")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no Python.h (Debian: python3-dev): the simulated GPU cannot be bound")
    error = build()
    assert not error, error
    return load()


@dataclass(frozen=True)
class Case:
    """A problem for the step's kernels, and how they are launched on it.

    Each kernel has ``blocks``. A sweep's task has ``rows`` channels, and in the second one of an interleaved map
    ``piece`` positions; in a planar one ``lanes`` threads share a row. The bottlenecks' sums come in ``parts``.
    With ``together`` clusters take so many samples each through the step and its gradient, instead of ``blocks``.
    ``phase`` is how many elements past a 32-byte boundary each map begins, in the order of the maps of a direction;
    ``gap`` how many elements lie between its samples.
    """

    samples: int = 3
    channels: int = 12
    positions: int = 49
    bottleneck: int = 3
    dtype: torch.dtype = torch.float32
    interleaved: bool = False
    relu: bool = True
    tanh: bool = False
    state: bool = True
    shortcut: bool = True
    dstate: bool = True
    need_x: bool = True
    need_state: bool = True
    affine: bool = False
    blocks: int = 2
    rows: int = 8
    piece: int = 20
    lanes: int = 4
    parts: int = 2
    together: int = 0
    phase: tuple[int, ...] = (0,)
    gap: int = 0
    seed: int = 0

    def numbers(self, kernel: str) -> dict[str, int]:
        names = ("samples", "channels", "positions", "bottleneck", "interleaved", "relu", "parts", "seed")
        together = self.together if kernel.startswith("step") else 0
        return {name: int(getattr(self, name)) for name in names} | {
            "tile_channels": self.rows,
            "tile_positions": self.piece,
            "tile_lanes": self.lanes,
            "together": together,
            "blocks": -(-self.samples // together) * CLUSTER_BLOCKS if together else self.blocks,
            "threads": CLUSTER_THREADS if together else TABLE_THREADS,
            "tanh_output": int(self.tanh),
            "affine": int(self.affine),
            "shared_bytes": SHARED_BYTES * (2 if together else 1),
        }

    @property
    def map_bytes(self) -> int:
        return self.samples * self.channels * self.positions * torch.empty(0, dtype=self.dtype).element_size()


@dataclass
class Result:
    """What a kernel found, what is true, and what the machine counted."""

    found: Tensors
    truth: Tensors
    scales: dict[str, float]
    report: dict[str, Any]


def array(t: Tensor, defined: bool = True, shrink: tuple[int, int] = (0, 0)) -> Any:
    """A tensor as the machine takes it; ``shrink`` hides some elements at its begin and its end."""
    rows, length = (1, t.numel()) if t.dim() == 1 else (len(t), t.shape[1:].numel())
    stride = t.stride(0) if rows > 1 else length
    return machine().Array(t.data_ptr(), rows, length, stride, defined, *shrink)


def placed(t: Tensor, phase: int, gap: int) -> Tensor:
    """The map as rows of samples, its values ``phase`` elements past a sector's begin, ``gap`` elements between."""
    rows, length, size = len(t), t.shape[1:].numel(), t.element_size()
    memory = torch.zeros(rows * (length + gap) + phase + 32, dtype=t.dtype)
    first = -(memory.data_ptr() // size) % (32 // size) + phase
    view = memory[first : first + rows * (length + gap)].view(rows, length + gap)[:, :length]
    return view.copy_(t.reshape(rows, length))


class Problem:
    """The tensors of a case, and the float64 truth of everything that its kernels make."""

    def __init__(self, case: Case) -> None:
        self.case = case
        n, c, m = case.samples, case.channels, case.bottleneck
        g = torch.Generator().manual_seed(7)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=g)

        shape = (n, case.positions, c) if case.interleaved else (n, c, case.positions)
        self.maps = {name: draw(*shape).to(case.dtype) for name in ("x", "shortcut", "dy")}
        sizes = ((m, c), (m,), (4 * c, m), (4 * c,)) * 2
        self.parameters = LSTMParameters(*(draw(*size) / size[-1] ** 0.5 for size in sizes))
        self.state = {"h": draw(n, c).sigmoid(), "c": draw(n, c)} if case.state else {}
        self.dstate = {"dh": draw(n, c), "dc": draw(n, c)} if case.dstate else {}
        wide = {k: v.double() for k, v in (self.maps | self.state | self.dstate).items()}
        parameters = LSTMParameters(*(p.double() for p in self.parameters))
        self.affine = {name: draw(c) for name in ("shift", "d", "scale", "bias")} if case.affine else {}
        normed = self._normed(wide["x"])
        dim, output = -1 if case.interleaved else 1, "tanh" if case.tanh else "sigmoid"
        y, p, trace = reference.traced_step(
            normed, wide["shortcut"] if case.shortcut else None, wide.get("h"), wide.get("c"), parameters, dim,
            case.relu, output,
        )  # fmt: skip
        self.maps["y"] = y.to(case.dtype)
        gates = torch.cat((trace.i, trace.f, trace.g, trace.o), 1)
        self.tables = {"p": p, "zx": trace.zx, "zh": trace.zh, "gates": gates, "new_h": trace.h, "new_c": trace.c}
        dx, dshortcut, _, dh, dc, factors = reference.step_backward(
            wide["dy"], wide.get("dh"), wide.get("dc"), normed,
            self.maps["y"].double() if case.relu else None, wide.get("h"), wide.get("c"), trace.c, p, trace, parameters,
            dim, output,
        )  # fmt: skip
        dparameters = reference.parameter_gradients(factors, p, trace.zx, trace.zh, wide.get("h"))
        self.truth = self.tables | {"y": y, "dx": dx, "dshortcut": dshortcut, "old_dh": dh, "old_dc": dc}
        self.truth |= {f"d_{name}": value for name, value in dparameters._asdict().items()}
        if case.affine:
            dims = (0, 1) if case.interleaved else (0, 2)
            plain = (normed - self._channels("bias")) / self._channels("scale")
            self.truth |= {"d_scale": (dx * plain).sum(dims), "d_bias": dx.sum(dims)}
            self.truth["dx"] = dx * self._channels("scale")
        self.scales = {name: value.abs().max().item() for name, value in self.truth.items()}
        self._add_scales_of_what_cancels(parameters, wide.get("h"))

    def _add_scales_of_what_cancels(self, parameters: LSTMParameters, h: Tensor | None) -> None:
        """The gradients behind W2: sums of many terms of both signs, whose rounding is relative to the terms."""
        du = self.truth["d_input_expand_bias"].abs().max() / max(self.case.samples, 1) ** 0.5
        for path, first in (("input", self.tables["p"]), ("hidden", h)):
            rows = getattr(parameters, f"{path}_expand_weight").abs().sum(0).max() * du
            reduce = getattr(parameters, f"{path}_reduce_weight").abs().sum(0).max()
            others = {f"d_{path}_reduce_bias": rows, ("dx" if path == "input" else "old_dh"): rows * reduce}
            if first is not None:
                others[f"d_{path}_reduce_weight"] = rows * first.abs().max()
            for name, scale in others.items():
                factor = max(self.case.positions, 1) if name == "dx" else 1
                self.scales[name] = max(self.scales[name], scale.item() / factor)

    def _channels(self, name: str) -> Tensor:
        """A value of each channel, to be applied to a map."""
        value = self.affine[name].double()
        return value if self.case.interleaved else value[:, None]

    def _normed(self, x: Tensor) -> Tensor:
        """The map behind the norm, if there is one."""
        if not self.case.affine:
            return x
        x = x - self._channels("shift") - self._channels("d")
        return x * self._channels("scale") + self._channels("bias")

    def map(self, name: str, number: int) -> Tensor:
        """A map as the kernels see it: that of the problem, or an empty one for a result."""
        values = self.maps.get(name, torch.zeros_like(self.maps["x"]))
        phase = self.case.phase[number % len(self.case.phase)]
        return placed(values if name in self.maps else values.fill_(0), phase, self.case.gap)

    def launch(self, kernel: str, given: Tensors, results: Tensors, shrink=None, without=None, **numbers) -> Result:
        """Runs ``kernel``; ``shrink`` lies about the extent of tensors, ``without`` leaves a barrier out."""
        shrink = shrink or {}
        arrays = {name: array(t, name in given, shrink.get(name, (0, 0))) for name, t in (given | results).items()}
        report = machine().launch(kernel, DTYPES[self.case.dtype], arrays, self.case.numbers(kernel) | numbers, without)
        return Result({k: v for k, v in results.items() if k in self.truth}, self.truth, self.scales, report)

    def weights(self) -> Tensors:
        return dict(self.parameters._asdict())

    def parts(self) -> Tensor:
        parts = CLUSTER_BLOCKS if self.case.together else self.case.parts
        return torch.zeros(parts, self.case.samples, 2 * self.case.bottleneck)

    def forward(self, **options) -> Result:
        case = self.case
        n, c, m = case.samples, case.channels, case.bottleneck
        given = {"x": self.map("x", 0)} | self.state | self.weights() | self.affine
        if case.shortcut:
            given["shortcut"] = self.map("shortcut", 1)
        sizes = {"p": c, "zx": m, "zh": m, "gates": 4 * c, "new_h": c, "new_c": c}
        results = {name: torch.zeros(n, size) for name, size in sizes.items()}
        if not case.together:
            results["parts"] = self.parts()
        results["y"] = placed(torch.zeros_like(self.maps["x"]), case.phase[2 % len(case.phase)], case.gap)
        if case.affine:
            results |= {name: torch.zeros(n, c) for name in ("off", "factor", "added")}
            self.off = results["off"]
        return self.launch("step_forward", given, results, **options)

    def backward(self, **options) -> Result:
        case = self.case
        n, c, m = case.samples, case.channels, case.bottleneck
        given = {k: self.tables[k].float() for k in ("p", "zx", "zh", "gates", "new_c")} | self.dstate
        given |= {k: v for k, v in self.weights().items() if k.endswith("weight")} | self.affine
        given["x"] = self.map("x", 0)
        if case.state:
            given["c"] = self.state["c"]
        given["dy"] = self.map("dy", 1)
        if case.relu:
            given["y"] = self.map("y", 2)
        sizes = {"product": c, "du": 4 * c, "dzx": m, "dzh": m}
        if case.affine:
            sizes |= {"sum": c, "dp": c, "h again": c}
        if case.need_state:
            sizes |= {"old_dh": c, "old_dc": c}
        if case.need_x:
            sizes |= {"factor": c, "offset": c}
        results = {name: torch.zeros(n, size) for name, size in sizes.items()} | {"parts": self.parts()}
        if case.affine:
            results["scale again"] = torch.zeros(c)
        blank = torch.zeros_like(self.maps["x"])
        if case.need_x:
            results["dx"] = placed(blank, case.phase[3 % len(case.phase)], case.gap)
        if case.shortcut and case.relu:
            results["dshortcut"] = placed(blank, case.phase[4 % len(case.phase)], case.gap)
        result = self.launch("step_backward", given, results, **options)
        names = ("du", "dzx", "dzh", *(("sum", "product", "dp") if case.affine else ()))
        self.workspace = {k: results[k] for k in names}
        return result

    def weight_gradients(self, tile: int = 32, steps: int = 1, **options) -> Result:
        """After ``backward``, from what it left; as if the samples were those of so many steps."""
        n = self.case.samples // steps
        h = self.state.get("h", torch.zeros(self.case.samples, self.case.channels))
        left = {k: self.workspace[k] for k in ("du", "dzx", "dzh")}
        right = {k: self.tables[k].float() for k in ("p", "zx", "zh")}
        given = {}
        for step in range(steps):
            rows = slice(step * n, (step + 1) * n)
            for of in (left, right, {"h": h}):
                own = [t[rows].flatten() for t in of.values()]
                parts = torch.cat(own).split([len(t) for t in own])
                given |= {f"{name}{step}": part for name, part in zip(of, parts, strict=True)}
        results = {f"d_{k}": torch.zeros_like(v) for k, v in self.weights().items()}
        return self.launch(f"weight_gradients {tile}", given, results, samples=n, steps=steps, **options)

    def norm_gradients(self, **options) -> Result:
        """After ``forward`` and ``backward``, from what they left."""
        given = {k: self.workspace[k] for k in ("sum", "product", "dp")}
        given |= {"off": self.off, "new_h": self.tables["new_h"].float(), "d": self.affine["d"]}
        given["rstd"] = torch.ones(self.case.channels)  # the scale itself is the parameter
        results = {name: torch.zeros(self.case.channels) for name in ("d_scale", "d_bias")}
        return self.launch("norm_gradients", given, results, **options)


def assert_right(case: Case, result: Result) -> None:
    """Results within what float32 sums of so many terms, and one rounding to the map's type, may err."""
    terms = max(case.positions, case.channels * 4, case.samples)
    for name, value in result.found.items():
        true = result.truth[name].reshape(value.shape)
        bound = 4 * terms**0.5 * torch.finfo(torch.float32).eps
        if value.dtype != torch.float32:
            bound += torch.finfo(value.dtype).eps
        error = (value.double() - true).abs().max().item() if value.numel() else 0.0
        assert error <= bound * result.scales[name], (name, error, bound * result.scales[name])
