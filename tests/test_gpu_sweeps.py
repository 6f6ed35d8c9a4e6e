"""The sweeps of the split step and of the folded batch norm, on the simulated GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import simulated
import torch
from simulated import DTYPES, array, placed
from torch import Tensor

from dia_kernels import masks

SHAPES = [(3, 12, 49), (2, 25, 9), (1, 3, 300), (2, 1, 1), (2, 70, 6)]
LAYOUTS = [False, True]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How the maps of a problem lie, and the tiles that a launch takes."""

    samples: int
    channels: int
    positions: int
    dtype: torch.dtype = torch.float32
    interleaved: bool = False
    tile: tuple[int, int, int] = (8, 10**6, 4)
    phase: int = 0
    gap: int = 0
    blocks: int = 3
    threads: int = 64

    @property
    def neighbours(self) -> int:
        """Bytes of a planar map that its rows' ends may be read with: of the rows beside them, in the same packs."""
        pack = 16 // torch.empty(0, dtype=self.dtype).element_size()
        apart = self.phase % pack or self.gap % pack or self.positions % pack
        return 0 if self.interleaved or not apart else 2 * 16 * self.samples * self.channels

    def draw(self, generator: torch.Generator) -> Tensor:
        """A map (N, C, positions) whose values the dtype holds."""
        t = torch.randn(self.samples, self.channels, self.positions, generator=generator)
        return t.to(self.dtype).double()

    def rows(self, values: Tensor, number: int) -> Tensor:
        """The map as the kernels see it, each one at another phase, or its samples another distance apart."""
        values = values.movedim(1, 2) if self.interleaved else values
        return placed(values.to(self.dtype).contiguous(), (self.phase * number) % 16, self.gap * (1 + number % 2))

    def back(self, rows: Tensor) -> Tensor:
        shape = (self.samples, self.channels, self.positions)
        if self.interleaved:
            return rows.reshape(self.samples, self.positions, self.channels).movedim(2, 1).double()
        return rows.reshape(shape).double()

    def launch(
        self,
        kernel: str,
        maps: Tensors,
        tables: Tensors,
        results: Tensors,
        relu: bool = False,
        without=None,
        given: Tensors | None = None,
    ):
        """Launches a kernel; ``given``: what it takes as it is."""
        channels, positions, lanes = self.tile
        numbers = {
            "samples": self.samples, "channels": self.channels, "positions": self.positions, "relu": relu,
            "interleaved": self.interleaved, "blocks": self.blocks, "threads": self.threads, "seed": 1,
            "tile_channels": min(channels, self.channels), "tile_positions": min(positions, self.positions),
            "tile_lanes": lanes,
            "shared_bytes": simulated.SHARED_BYTES,
        }  # fmt: skip
        given = (given or {}) | {name: self.rows(t, k) for k, (name, t) in enumerate(maps.items())}
        given |= {name: t.float() for name, t in tables.items()}
        arrays = {name: array(t, name in given) for name, t in (given | results).items()}
        return simulated.machine().launch(kernel, DTYPES[self.dtype], arrays, numbers, without)

    def tables_kernel(self, kernel: str, given: Tensors, results: Tensors, **numbers: float) -> dict:
        """A kernel of tables alone."""
        sizes = {"samples": self.samples, "channels": self.channels, "positions": self.positions, "interleaved": 0}
        grid = {"blocks": self.blocks, "threads": self.threads, "seed": 1, "shared_bytes": 1 << 16}
        arrays = {name: array(t, name in given) for name, t in (given | results).items()}
        return simulated.machine().launch(kernel, "float32", arrays, sizes | grid | numbers)


def layouts(shape) -> list[Layout]:
    found = []
    for dtype in DTYPES:
        for interleaved in LAYOUTS:
            found.append(Layout(*shape, dtype, interleaved))
            found.append(Layout(*shape, dtype, interleaved, tile=(5, 7, 64), phase=3, gap=5))
            found.append(Layout(*shape, dtype, interleaved, tile=(64, 3, 1), gap=8))
            found.append(Layout(*shape, dtype, interleaved, tile=(8, 10**6, 2), gap=3))
    return found


def assert_near(found: Tensor, true: Tensor, dtype: torch.dtype, terms: int) -> None:
    scale = max(true.abs().max().item(), 1e-3)
    bound = 8 * terms**0.5 * torch.finfo(torch.float32).eps + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert (found.double() - true).abs().max().item() <= bound * scale


def about(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What moments of maps (N, C, positions) are taken about: the median of three values, or of 16 bits the first."""
    if dtype != torch.float32:
        return x[:, :, :1]
    return x[:, :, [x.shape[2] * k // 128 for k in (27, 66, 107)]].median(2, keepdim=True).values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["pool", "pool about a shift", "moments", "gradient", "masked gradient with g", "g alone"]
)
def test_reduce(shape, kind):
    for layout in layouts(shape):
        g = torch.Generator().manual_seed(0)
        x, dy, y = (layout.draw(g) for _ in range(3))
        shift = torch.randn(layout.channels, generator=g).double()
        maps, tables = {"x": x}, {}
        found = {name: torch.zeros(layout.samples, layout.channels) for name in ("sum", "product")}
        d, masked = x, dy
        if kind in ("pool about a shift", "masked gradient with g"):
            tables["shift"] = shift.float().double()
            d = x - tables["shift"][:, None]
        if kind == "moments":
            d = x - about(x, layout.dtype)
        if "gradient" in kind or "alone" in kind:
            maps["dy"] = dy
        if "masked" in kind or "alone" in kind:
            maps["y"] = y
            masked = dy * (y > 0)
        if kind.startswith("pool"):
            del found["product"]
        if kind == "gradient":
            del found["sum"]
        if kind == "g alone":
            found, maps = {}, {"dy": dy, "y": y}
        results = dict(found)
        if kind in ("masked gradient with g", "g alone"):
            results["g"] = placed(torch.zeros_like(layout.rows(x, 0)), 0, layout.gap)
        if kind == "moments":
            results |= {name: torch.zeros_like(found["sum"]) for name in ("first", "rest")}
        report = layout.launch("reduce", maps, tables, results)
        with_g = "dy" in maps
        first = masked if with_g else d
        second = d * masked if with_g else (d - d.mean(2, keepdim=True)).square()
        true = {"sum": first.sum(2), "product": second.sum(2)}
        # The mean that squares are about is itself rounded, by a share of |d|.
        scales = {"sum": first.abs().sum(2), "product": second.abs().sum(2) + (0 if with_g else 1e-6 * d.abs().sum(2))}
        if "first" in results:
            assert torch.equal(results["first"].double(), about(x, layout.dtype)[..., 0].expand_as(results["first"]))
        for name, value in found.items():
            error = (value.double() - true[name]).abs()
            bound = 4 * layout.positions**0.5 * torch.finfo(torch.float32).eps * scales[name]
            assert bool((error <= bound + 1e-30).all()), (name, layout)
        if "g" in results:
            assert torch.equal(layout.back(results["g"]), masked)
        bytes_of_map = x.numel() * torch.empty(0, dtype=layout.dtype).element_size()
        # Of moments a row's threads each look at what they are about, too.
        looks = 6 * layout.threads * layout.samples * layout.channels
        threads = looks * torch.empty(0, dtype=layout.dtype).element_size()
        for name in maps:
            more = report["tensors"][name][0] - bytes_of_map
            assert 0 <= more <= threads * ("first" in results) + layout.neighbours, name
        if "g" in results:
            assert report["tensors"]["g"][:2] == (0, bytes_of_map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_task_of_more_channels_than_threads(dtype):
    """In packs a thread has several."""
    pack = 16 // torch.empty(0, dtype=dtype).element_size()
    layout = Layout(2, 64 * pack + 8, 5, dtype, True, tile=(64 * pack, 10**6, 1))
    g = torch.Generator().manual_seed(0)
    x, dy = (layout.draw(g) for _ in range(2))
    tables = lambda *names: {name: torch.zeros(2, layout.channels) for name in names}  # noqa: E731
    found = tables("sum", "product")
    layout.launch("reduce", {"x": x, "dy": dy}, {}, found)
    moments = tables("first", "rest")
    moments |= {"sum": found["sum"].clone(), "product": found["product"].clone()}
    layout.launch("reduce", {"x": x}, {}, moments)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found["sum"].double(), dy.sum(2), **close)
    torch.testing.assert_close(found["product"].double(), (dy * x).sum(2), **close)
    assert torch.equal(moments["first"].double(), about(x, dtype)[..., 0])
    torch.testing.assert_close(moments["sum"].double(), (x - about(x, dtype)).sum(2), **close)
    torch.testing.assert_close(moments["product"].double(), (x - x.mean(2, keepdim=True)).square().sum(2), **close)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_statistics_of_a_batch_keep_their_digits(mean, interleaved):
    """A channel of deviation 1e-2 at a mean of 1e4, of which a float holds a tenth of the deviation."""
    layout = Layout(5, 40, 100, interleaved=interleaved, tile=(40, 10**6, 8))
    g = torch.Generator().manual_seed(0)
    x = (mean + 0.01 * torch.randn(5, 40, 100, generator=g)).float().double()
    table, vector = (lambda: torch.zeros(5, 40)), (lambda: torch.zeros(40))
    moments = {"sum": table(), "product": table(), "first": table(), "rest": table()}
    layout.launch("reduce", {"x": x}, {}, moments)
    gamma, beta = torch.randn(2, 40, generator=g)
    given = {"first": moments["first"], "rest": moments["rest"], "squares": moments["product"], "sum": moments["sum"]}
    found = {name: vector() for name in ("shift", "d", "scale", "bias", "rstd", "mean", "var")}
    found |= {"off": table(), "p": table()}
    layout.tables_kernel("batch_statistics", given | {"gamma": gamma, "beta": beta}, found, eps=1e-6)
    true_mean, true_var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
    close = {"rtol": 1e-4, "atol": 0.0}
    torch.testing.assert_close(found["var"].double(), true_var, **close)
    torch.testing.assert_close(found["rstd"].double(), (true_var + 1e-6).rsqrt(), **close)
    torch.testing.assert_close(found["scale"].double(), gamma.double() * (true_var + 1e-6).rsqrt(), **close)
    assert torch.equal(found["bias"], beta)
    torch.testing.assert_close(found["shift"].double(), true_mean, rtol=2**-23, atol=1e-8)
    assert torch.equal(found["mean"], found["shift"])
    assert (found["shift"].double() + found["d"].double() - true_mean).abs().max() < 1e-9 + 1e-13 * mean
    # About the mean itself these means are small, and yet have their digits; and so have those behind the norm.
    about_mean = (x - x.mean((0, 2), keepdim=True)).mean(2)
    torch.testing.assert_close(found["off"].double(), about_mean, rtol=1e-4, atol=1e-8)
    p = about_mean * found["scale"].double() + found["bias"].double()
    torch.testing.assert_close(found["p"].double(), p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["rescale", "normalise", "spread", "spread through the norm", "offset alone"])
def test_spread(shape, kind):
    for layout in layouts(shape):
        g = torch.Generator().manual_seed(0)
        x, dy, y, s = (layout.draw(g) for _ in range(4))
        n, c = layout.samples, layout.channels
        scale, offset = (torch.randn(n, c, generator=g).double() for _ in range(2))
        shift, slope = (torch.randn(c, generator=g).double() for _ in range(2))
        relu = kind in ("rescale", "normalise")
        if kind == "rescale":
            maps, tables = {"x": x, "shortcut": s}, {"scale": scale}
            true = (x * scale[..., None] + s).relu()
        elif kind == "normalise":
            maps, tables = {"x": x, "shortcut": s}, {"scale": scale, "offset": offset, "shift": shift}
            true = ((x - shift[:, None]) * scale[..., None] + offset[..., None] + s).relu()
        elif kind == "spread":
            maps, tables = {"dy": dy, "y": y}, {"scale": scale, "offset": offset}
            true = dy * (y > 0) * scale[..., None] + offset[..., None]
        elif kind == "offset alone":
            maps, tables = {}, {"offset": offset}
            true = offset[..., None].expand_as(x)
        else:
            maps, tables = {"dy": dy, "x": x}, {"scale": scale, "offset": offset, "shift": shift, "slope": slope}
            true = dy * scale[..., None] + (x - shift[:, None]) * slope[:, None] + offset[..., None]
        out = placed(torch.zeros_like(layout.rows(x, 0)), 7 * (layout.phase > 0), layout.gap)
        report = layout.launch("spread", maps, tables, {"out": out}, relu)
        assert_near(layout.back(out), true, layout.dtype, 4)
        bytes_of_map = x.numel() * torch.empty(0, dtype=layout.dtype).element_size()
        for name in maps:
            read, written, *_ = report["tensors"][name]
            assert 0 <= read - bytes_of_map <= layout.neighbours, name
            assert written == 0, name
        assert report["tensors"]["out"][:2] == (0, bytes_of_map)


def mask_of(layout: Layout, y: Tensor) -> Tensor:
    """The mask of a map (N, C, positions) as the kernels take it, a row of bytes for each sample."""
    rows = (y.movedim(1, 2) if layout.interleaved else y).contiguous()
    return masks.make(rows, -1 if layout.interleaved else 1).view(layout.samples, -1)


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "tile"), [((3, 8, 24), (8, 10**6, 2)), ((2, 72, 40), (64, 10**6, 4))], ids=str)
def test_a_mask_of_bits_serves_as_y(shape, tile, dtype, interleaved):
    """The same bits of all results, an eighth of a byte a value; element by element where packs cannot be had."""
    for phase, gap in ((0, 0), (0, 8), (3, 5)):
        layout = Layout(*shape, dtype, interleaved, tile=tile, phase=phase, gap=gap)
        g = torch.Generator().manual_seed(0)
        x, dy, y = (layout.draw(g) for _ in range(3))
        y[0, 0, :2] = torch.tensor([0.0, float("nan")])
        scale = torch.randn(layout.samples, layout.channels, generator=g).double()
        found = {}
        for name, maps in (("y", {"x": x, "dy": dy, "y": y}), ("mask", {"x": x, "dy": dy})):
            bits = {"mask": mask_of(layout, y)} if name == "mask" else {}
            results = {key: torch.zeros(layout.samples, layout.channels) for key in ("sum", "product")}
            results["g"] = placed(torch.zeros_like(layout.rows(x, 0)), 0, layout.gap)
            report = layout.launch("reduce", maps, {}, results, given=bits)
            del maps["x"]
            out = placed(torch.zeros_like(layout.rows(x, 0)), 0, layout.gap)
            spread = layout.launch("spread", maps, {"scale": scale}, {"out": out}, given=bits)
            found[name] = results | {"out": out}
            for tensors in (report["tensors"], spread["tensors"]):
                if bits:
                    assert tensors["mask"][:2] == (x.numel() if phase else x.numel() // 8, 0)
        for key, of_y in found["y"].items():
            assert torch.equal(found["mask"][key], of_y), (key, layout)


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [0, 8])
def test_a_mask_is_written_with_its_result(dtype, interleaved, gap):
    for shape, tile in (((3, 8, 24), (8, 7, 2)), ((2, 72, 40), (64, 10**6, 4)), ((2, 264, 8), (128, 3, 1))):
        layout = Layout(*shape, dtype, interleaved, tile=tile, gap=gap)
        g = torch.Generator().manual_seed(0)
        x, s = (layout.draw(g) for _ in range(2))
        x[0, 0, :4] = torch.tensor([0.0, -0.0, float("nan"), 1e-7])  # times the scale float16 makes a zero of the last
        s[0, 0, :4] = 0
        scale = torch.full((layout.samples, layout.channels), 0.1).double()
        out = placed(torch.zeros_like(layout.rows(x, 0)), 0, layout.gap)
        passed = torch.full((layout.samples, layout.channels * layout.positions // 8), 255, dtype=torch.uint8)
        results = {"out": out, "passed": passed}
        report = layout.launch("spread", {"x": x, "shortcut": s}, {"scale": scale}, results, relu=True)
        assert torch.equal(passed, mask_of(layout, layout.back(out)))
        assert report["tensors"]["passed"][:2] == (0, passed.numel())


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sectors(dtype, interleaved):
    """Where rows begin at packs no sector is asked for twice."""
    for positions in (64, 49) if interleaved else (64,):
        layout = Layout(2, 64, positions, dtype, interleaved, tile=(32, 10**6, 8))
        x = layout.draw(torch.Generator().manual_seed(0))
        bytes_of_map = x.numel() * torch.empty(0, dtype=dtype).element_size()
        tables = {name: torch.zeros(2, 64) for name in ("sum", "product")}
        read = layout.launch("reduce", {"x": x}, {}, tables)["tensors"]["x"]
        out = layout.rows(x * 0, 0)
        written = layout.launch("spread", {"x": x}, {"scale": torch.ones(2, 64)}, {"out": out})["tensors"]
        for sectors in (read[2], written["x"][2], written["out"][3]):
            assert 32 * sectors <= bytes_of_map + 31, (positions, 32 * sectors / bytes_of_map)


def test_each_barrier_is_needed():
    layout = Layout(2, 70, 40, interleaved=True, tile=(64, 10**6, 64), blocks=1)
    x = layout.draw(torch.Generator().manual_seed(0))

    def run(without=None):
        found = {name: torch.zeros(2, 70) for name in ("sum", "product")}
        return layout.launch("reduce", {"x": x}, {}, found, without=without)

    places = [
        place
        for place in run()["barriers"]
        if "sync" in (simulated.ROOT / place[0]).read_text().splitlines()[place[1] - 1]
    ]
    assert places
    for place in places:
        with pytest.raises(simulated.machine().LaunchError):
            run(place)
