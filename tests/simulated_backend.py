"""``backend="simulated"``: the operators by the GPU kernels on the simulated GPU, for tensors of the CPU.

What csrc/ops does for a real GPU is done here in Python: allocate, launch, hand tables on. Where there is nothing to
launch (no elements) or no kernel (float64), the reference stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Literal

import torch
from simulated import DTYPES, SHARED_BYTES, WEIGHT_THREADS, Tensors, array, machine
from torch import Tensor

from dia_kernels import LSTMParameters, backends, operators
from dia_kernels.layout import output_format

PARAMETERS = LSTMParameters._fields
WEIGHTS = [name for name in PARAMETERS if name.endswith("weight")]


@dataclass
class Settings:
    """How the operators launch their kernels.

    ``mode``: the whole step as one kernel that keeps the map on chip; or sweeps over the map, with the cell between
    them by teams of blocks, or by torch's products.
    """

    mode: Literal["on chip", "sweeps", "products"] = "on chip"
    ranks: int = 2
    teams: int = 1
    group: int = 2
    threads: int = 64
    tile: tuple[int, int] = (4, 10**6)


settings = Settings()


@cache
def add() -> None:
    """Makes ``"simulated"`` a backend of this process."""
    names = ("step", "step_backward", "tail", "tail_backward", "pool", "rescale", "rescale_backward")
    backends.add("simulated", "cpu", {name: _or_reference(name, globals()[name]) for name in names})


def _or_reference(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def call(*args):
        maps = [t for t in args if isinstance(t, Tensor) and t.dim() > 2]
        if maps[0].numel() == 0 or maps[0].dtype not in DTYPES:
            return operators._KERNELS[name][0](*args)
        return kernel(*args)

    return call


# --- launching -------------------------------------------------------------------------------------


class Problem:
    """The sizes of a call and the layout of its maps."""

    def __init__(self, x: Tensor, bottleneck: int, channel_dim: int, relu: bool, tanh: bool = False) -> None:
        self.like, self.channel_dim, self.dtype = x, channel_dim, x.dtype
        self.interleaved = channel_dim == -1 or output_format(x, channel_dim) != torch.contiguous_format
        self.n, self.c = len(x), x.shape[channel_dim]
        self.m, self.positions = bottleneck, x[0].numel() // self.c
        self.relu, self.tanh = relu, tanh

    def flat(self, x: Tensor) -> Tensor:
        """A map as (N, C, positions) or (N, positions, C), dense."""
        if not self.interleaved:
            return x.contiguous().flatten(2)
        return (x if self.channel_dim == -1 else x.movedim(1, -1)).contiguous().flatten(1, -2)

    def empty_map(self) -> Tensor:
        return torch.zeros_like(self.flat(self.like))

    def unflat(self, flat: Tensor) -> Tensor:
        """A result as a map like the first, in its output format."""
        shape = self.like.shape
        if self.channel_dim == 1 and self.interleaved:
            return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return flat.view(shape)

    def table(self, width: int | None = None) -> Tensor:
        return torch.zeros(self.n, self.c if width is None else width)

    def launch(
        self,
        kernel: str,
        given: dict[str, Tensor | None],
        results: Tensors,
        *,
        shrink=None,
        without=None,
        **numbers: float,
    ) -> dict[str, Any]:
        """Runs a kernel; what is None is not handed over, and what only ``results`` holds is undefined before.

        ``shrink`` lies about the extent of tensors, ``without`` leaves a barrier out. Returns the machine's report.
        """
        present, shrink = {name: t for name, t in given.items() if t is not None}, shrink or {}
        arrays = {name: array(t, name in present, shrink.get(name, (0, 0))) for name, t in (results | present).items()}
        all_numbers = {
            "samples": self.n, "channels": self.c, "positions": self.positions, "bottleneck": self.m,
            "interleaved": self.interleaved, "relu": self.relu, "tanh_output": self.tanh, "affine": 0, "batch": 0,
            "ranks": settings.ranks, "teams": settings.teams, "group": settings.group, "threads": settings.threads,
            "quantum": 1, "seed": 0, "shared_bytes": SHARED_BYTES,
            "tile_channels": min(settings.tile[0], self.c), "tile_positions": min(settings.tile[1], self.positions),
        }  # fmt: skip
        # Only a planar map's single channel may be cut into positions.
        if not self.interleaved and all_numbers["tile_positions"] < self.positions:
            all_numbers["tile_channels"] = 1
        return machine().launch(kernel, DTYPES[self.dtype], arrays, all_numbers | numbers, without)

    def partial(self) -> Tensors:
        return {"partial": torch.zeros(settings.teams * settings.ranks * settings.group * 2 * self.m)}

    def sweep(self, kernel: str, given: dict[str, Tensor | None], results: Tensors, **numbers: float) -> None:
        """``launch`` by blocks that have nothing to do with each other."""
        self.launch(kernel, given, results, ranks=1, teams=settings.teams * settings.ranks, **numbers)


def _cell_tables(problem: Problem) -> Tensors:
    widths = {"p": problem.c, "zx": problem.m, "zh": problem.m, "gates": 4 * problem.c}
    return {name: problem.table(width) for name, width in widths.items()}


def _dense(names, tensors) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.contiguous() for name, t in zip(names, tensors, strict=True)}


# --- the cell between two sweeps ----------------------------------------------------------------------


def _cell_forward(problem: Problem, sums: Tensor, cell: dict, affine: dict) -> tuple[Tensors, Tensor, Tensor | None]:
    """Tables and state from the sums of a map; and what its channels are multiplied by and what is added then."""
    results = _cell_tables(problem) | {"new_h": problem.table(), "new_c": problem.table()}
    more = {name: problem.table() for name in ("off", "factor", "added")} if affine else {}
    if settings.mode != "products":
        problem.launch(
            "cell_forward", {"sum": sums} | cell | affine, results | more | problem.partial(), affine=bool(affine)
        )
    else:
        means = {"p": results["p"]} | ({"off": more["off"]} if affine else {})
        problem.sweep("split_means", {"sum": sums} | affine, means, affine=bool(affine))
        for path, value in (("input", results["p"]), ("hidden", cell["h"])):
            z = results[f"z{'x' if path == 'input' else 'h'}"]
            if value is not None:
                z += value @ cell[f"{path}_reduce_weight"].T
            bias = cell[f"{path}_reduce_bias"]
            problem.sweep("rectify", {"values": z, "row": bias}, {}, count=z.numel(), width=problem.m)
        products = results["zx"] @ cell["input_expand_weight"].T + results["zh"] @ cell["hidden_expand_weight"].T
        given = {k: v for k, v in cell.items() if k != "h"} | {"products": products} | affine
        finished = {k: results[k] for k in ("gates", "new_h", "new_c")} | {k: more[k] for k in more if k != "off"}
        problem.sweep("split_gates", given, finished, affine=bool(affine))
    if affine:
        return results | {"off": more["off"]}, more["factor"], more["added"]
    return results, results["new_h"], None


def _cell_backward(
    problem: Problem, sums: Tensors, given: dict, affine: dict, need_state: bool, need_map: bool
) -> Tensors:
    """What the cell's gradient leaves, from the sums of the map's.

    du, dzx, dzh; as asked old_dh, old_dc, factor; and dp behind a norm, else offset.
    """
    widths = {"du": 4 * problem.c, "dzx": problem.m, "dzh": problem.m}
    results = {name: problem.table(width) for name, width in widths.items()}
    if need_state:
        results |= {"old_dh": problem.table(), "old_dc": problem.table()}
    if need_map:
        results["factor"] = problem.table()
    if affine or need_map:
        results["dp" if affine else "offset"] = problem.table()
    given = given | sums | {k: v for k, v in affine.items() if k != "shift"}
    if settings.mode != "products":
        problem.launch("cell_backward", given, results | problem.partial(), affine=bool(affine))
        return results
    elementwise = {k: v for k, v in results.items() if k in ("du", "old_dc", "factor")}
    problem.sweep("split_gate_gradients", given, elementwise, affine=bool(affine))
    for path, z in (("input", "zx"), ("hidden", "zh")):
        values = results[f"d{z}"].copy_(results["du"] @ given[f"{path}_expand_weight"])
        problem.sweep("rectify", {"values": values, "z": given[z]}, {}, count=values.numel(), width=problem.m)
    if need_state:
        results["old_dh"].copy_(results["dzh"] @ given["hidden_reduce_weight"])
    if affine or need_map:
        dp = results["dzx"] @ given["input_reduce_weight"]
        results["dp" if affine else "offset"].copy_(dp if affine else dp / problem.positions)
    return results


def _weight_gradients(problem: Problem, left: Tensors, tables: Tensors, h: Tensor | None, need: bool) -> list[Tensor]:
    shapes = ((problem.m, problem.c), (problem.m,), (4 * problem.c, problem.m), (4 * problem.c,)) * 2
    if not need:
        return [torch.empty(0) for _ in shapes]
    gradients = {f"d_{name}": torch.zeros(shape) for name, shape in zip(PARAMETERS, shapes, strict=True)}
    given = {k: left[k] for k in ("du", "dzx", "dzh")} | {k: tables[k] for k in ("p", "zx", "zh")}
    state = problem.table() if h is None else h.contiguous()
    problem.launch("weight_gradients", given | {"h": state}, gradients, threads=WEIGHT_THREADS)
    return list(gradients.values())


# --- the operators ---------------------------------------------------------------------------------------


def step(x, shortcut, h, c, *rest):
    *parameters, channel_dim, relu, tanh, keep_tables = rest
    problem = Problem(x, len(parameters[0]), channel_dim, relu, tanh)
    cell = _dense(("h", "c", *PARAMETERS), (h, c, *parameters))
    maps = {"x": problem.flat(x), "shortcut": None if shortcut is None else problem.flat(shortcut)}
    y = problem.empty_map()
    if settings.mode == "on chip":
        results = _cell_tables(problem) | {"new_h": problem.table(), "new_c": problem.table()}
        problem.launch("step_forward", maps | cell, results | {"y": y} | problem.partial())
    else:
        sums = problem.table()
        problem.sweep("reduce", {"x": maps["x"]}, {"sum": sums})
        results, factor, _ = _cell_forward(problem, sums, cell, {})
        problem.sweep("spread", maps | {"scale": factor}, {"out": y})
    tables = [results[name].reshape(-1) for name in ("p", "zx", "zh", "gates")]
    kept = torch.cat(tables) if keep_tables else torch.empty(0)
    return problem.unflat(y), results["new_h"], results["new_c"], kept


def _unpacked(problem: Problem, tables: Tensor) -> Tensors:
    widths = {"p": problem.c, "zx": problem.m, "zh": problem.m, "gates": 4 * problem.c}
    parts = tables.split([problem.n * width for width in widths.values()])
    return {name: part.view(problem.n, -1) for name, part in zip(widths, parts, strict=True)}


def step_backward(dy, dh, dc, x, y, h, c, new_c, tables, *rest):
    *weights, channel_dim, relu, tanh, need_x, need_shortcut, need_state, need_parameters = rest
    problem = Problem(x, len(weights[0]), channel_dim, relu and dy is not None, tanh)
    cell_tables = _unpacked(problem, tables)
    given = cell_tables | _dense(("new_c", "dh", "dc", "c", *WEIGHTS), (new_c, dh, dc, c, *weights))
    maps = {
        "x": problem.flat(x),
        "dy": None if dy is None else problem.flat(dy),
        "y": problem.flat(y) if problem.relu else None,
    }
    dx = problem.empty_map() if need_x else None
    dshortcut = problem.empty_map() if need_shortcut else None
    if settings.mode == "on chip":
        widths = {"du": 4 * problem.c, "dzx": problem.m, "dzh": problem.m}
        left = {name: problem.table(width) for name, width in widths.items()}
        if need_state:
            left |= {"old_dh": problem.table(), "old_dc": problem.table()}
        results = problem.partial() | {k: v for k, v in (("dx", dx), ("dshortcut", dshortcut)) if v is not None}
        problem.launch("step_backward", maps | given, left | results)
    else:
        sums = {}
        if dy is not None:
            sums = {"product": problem.table()}
            problem.sweep("reduce", maps, sums | ({} if dshortcut is None else {"g": dshortcut}))
        left = _cell_backward(problem, sums, given, {}, need_state, need_x)
        if dx is not None:
            masked = {"dy": maps["dy"], "y": maps["y"]} if dshortcut is None else {"dy": dshortcut}
            scale = left["factor"] if dy is not None else None
            problem.sweep("spread", masked | {"scale": scale, "offset": left["offset"]}, {"out": dx}, relu=False)
    return (
        problem.unflat(dx) if dx is not None else x.new_empty(0),
        problem.unflat(dshortcut) if dshortcut is not None else x.new_empty(0),
        *(left.get(name, torch.empty(0)) for name in ("old_dh", "old_dc")),
        *_weight_gradients(problem, left, cell_tables, h, need_parameters),
    )


def tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest):
    *parameters, channel_dim, relu, tanh = rest
    problem = Problem(z, len(parameters[0]), channel_dim, relu, tanh)
    cell = _dense(("h", "c", *PARAMETERS), (h, c, *parameters))
    maps = {"x": problem.flat(z), "shortcut": None if shortcut is None else problem.flat(shortcut)}
    y, batch, sums = problem.empty_map(), mean is None, problem.table()
    if batch:
        moments = {"first": problem.table(), "product": problem.table()}
        problem.sweep("reduce", {"x": maps["x"]}, {"sum": sums} | moments)
        names = ("shift", "d", "scale", "bias", "rstd", "mean", "var")
        norm = {name: torch.zeros(problem.c) for name in names}
        given = {"first": moments["first"], "squares": moments["product"], "sum": sums, "gamma": gamma, "beta": beta}
        problem.sweep("batch_statistics", given, norm, eps=eps)
    else:
        shift, rstd = mean.float(), (var.double() + eps).rsqrt().float()
        norm = {"shift": shift, "d": (mean - shift.to(mean.dtype)).float(), "rstd": rstd}
        norm["scale"] = rstd if gamma is None else gamma * rstd
        norm["bias"] = torch.zeros(problem.c) if beta is None else beta
    affine = {name: norm[name].contiguous() for name in ("shift", "d", "scale", "bias")}
    if batch or settings.mode != "on chip":
        if not batch:
            problem.sweep("reduce", {"x": maps["x"], "shift": affine["shift"]}, {"sum": sums})
        results, factor, added = _cell_forward(problem, sums, cell, {k: v for k, v in affine.items() if k != "shift"})
        tables = {"scale": factor, "offset": added, "shift": affine["shift"]}
        problem.sweep("spread", maps | tables, {"out": y})
    else:
        results = _cell_tables(problem) | {name: problem.table() for name in ("new_h", "new_c", "off")}
        problem.launch("step_forward", maps | cell | affine, results | {"y": y} | problem.partial(), affine=True)
    kept = [results[name].reshape(-1) for name in ("p", "zx", "zh", "gates", "off")]
    kept += [norm[name] for name in ("shift", "d", "rstd")]
    statistics = (norm["mean"], norm["var"]) if batch else (torch.empty(0), torch.empty(0))
    return problem.unflat(y), results["new_h"], results["new_c"], torch.cat(kept), *statistics


def tail_backward(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *weights, channel_dim, relu, tanh, batch, need_z, need_shortcut, need_state, need_parameters, need_affine = rest
    problem = Problem(z, len(weights[0]), channel_dim, relu and dy is not None, tanh)
    cell_size = sum(operators.table_sizes(problem.n, problem.c, problem.m))
    cell, off, shift, d, rstd = tables.split([cell_size, problem.n * problem.c, problem.c, problem.c, problem.c])
    cell_tables = _unpacked(problem, cell)
    given = cell_tables | _dense(("new_c", "dh", "dc", "c", *WEIGHTS), (new_c, dh, dc, c, *weights))
    affine = {"shift": shift, "d": d, "scale": rstd if gamma is None else gamma * rstd}
    affine["bias"] = torch.zeros(problem.c) if beta is None else beta
    maps = {
        "x": problem.flat(z),
        "dy": None if dy is None else problem.flat(dy),
        "y": problem.flat(y) if problem.relu else None,
    }
    dz = problem.empty_map() if need_z else None
    dshortcut = problem.empty_map() if need_shortcut else None
    sums = {"sum": problem.table(), "product": problem.table()}
    new_h = operators._unpack(cell, problem.n, problem.c, problem.m, new_c, tanh)[1].h
    of_norm = {"off": off.view(problem.n, -1), "new_h": new_h, "rstd": rstd}
    if batch or settings.mode != "on chip":
        if dy is not None:
            problem.sweep("reduce", maps | {"shift": shift}, sums | ({} if dshortcut is None else {"g": dshortcut}))
        left = _cell_backward(problem, sums, given, affine, need_state, need_z)
        by_norm = {name: torch.zeros(problem.c) for name in ("d_scale", "d_bias")}
        spread: Tensors = {"offset": problem.table()} if need_z else {}
        if need_z and batch:
            spread["slope"] = torch.zeros(problem.c)
        taken = sums | of_norm | {"dp": left["dp"], "d": d, "scale": affine["scale"]}
        problem.sweep("norm_gradients", taken, by_norm | spread, batch=batch)
        if dz is not None:
            masked = {"dy": maps["dy"], "y": maps["y"]} if dshortcut is None else {"dy": dshortcut}
            through = {"x": maps["x"], "shift": shift} if batch else {}
            scale = left["factor"] if dy is not None else None
            problem.sweep("spread", masked | through | spread | {"scale": scale}, {"out": dz}, relu=False)
    else:
        widths = {"du": 4 * problem.c, "dzx": problem.m, "dzh": problem.m, "dp": problem.c}
        left = {name: problem.table(width) for name, width in widths.items()}
        if need_state:
            left |= {"old_dh": problem.table(), "old_dc": problem.table()}
        results = problem.partial() | {k: v for k, v in (("dx", dz), ("dshortcut", dshortcut)) if v is not None}
        problem.launch("step_backward", maps | given | affine, left | sums | results, affine=True)
        by_norm = {name: torch.zeros(problem.c) for name in ("d_scale", "d_bias")}
        problem.sweep("norm_gradients", sums | of_norm | {"dp": left["dp"]}, by_norm)
    nothing = torch.empty(0)
    return (
        problem.unflat(dz) if dz is not None else z.new_empty(0),
        problem.unflat(dshortcut) if dshortcut is not None else z.new_empty(0),
        *(left.get(name, nothing) for name in ("old_dh", "old_dc")),
        *(by_norm.values() if need_affine else (nothing, nothing)),
        *_weight_gradients(problem, left, cell_tables, h, need_parameters),
    )


def pool(x, channel_dim):
    problem = Problem(x, 1, channel_dim, False)
    sums = problem.table()
    problem.sweep("reduce", {"x": problem.flat(x)}, {"sum": sums})
    return sums / problem.positions


def rescale(x, scale, shortcut, channel_dim, relu):
    problem = Problem(x, 1, channel_dim, relu)
    maps = {"x": problem.flat(x), "shortcut": None if shortcut is None else problem.flat(shortcut)}
    y = problem.empty_map()
    problem.sweep("spread", maps | {"scale": scale.contiguous()}, {"out": y})
    return problem.unflat(y)


def rescale_backward(dy, x, scale, y, channel_dim, need_x, need_scale, need_shortcut):
    problem = Problem(x, 1, channel_dim, y is not None)
    maps = {"dy": problem.flat(dy), "y": None if y is None else problem.flat(y)}
    results = ({"product": problem.table()} if need_scale else {}) | (
        {"g": problem.empty_map()} if need_shortcut else {}
    )
    if results:
        problem.sweep("reduce", maps | {"x": problem.flat(x)}, results)
    dx = problem.empty_map()
    if need_x:
        problem.sweep("spread", maps | {"scale": scale.contiguous()}, {"out": dx}, relu=False)
    return (
        problem.unflat(dx) if need_x else x.new_empty(0),
        results["product"] if need_scale else scale.new_empty(0),
        problem.unflat(results["g"]) if need_shortcut else x.new_empty(0),
    )
