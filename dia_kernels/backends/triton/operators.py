"""The operators by Triton's kernels: what ``backends.add`` takes, see ``SCHEMAS`` in ``dia_kernels/operators.py``.

    step      reduce: sums of x | means, cell | spread: y = act(x h' + shortcut)
              or, of small samples and weights: step_of_sample
    gradient  reduce: g, sums of g x | gates, cell | spread: dx = g h' + dp / HW | the weights' gradients
              or: step_of_sample_backward | the weights' gradients
    tail      moments | the batch's statistics | cell | spread: y = act((z - shift) factor + added + shortcut)
    gradient  reduce: g, sums of g and g (z - shift) | gates, cell | the norm's gradients |
              spread: dz = g factor + (z - shift) slope + offset | the weights' gradients

The cell's products are PyTorch's, in float32, as ``torch.backends.cuda.matmul`` says; its elementwise parts are
kernels. Nothing waits for the device, and all memory is PyTorch's, so that a call can be captured into a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cells import parameter_count, split_parameters
from ...layout import channels, empty_map, output_format, spatial_size
from ...tables import table_sizes
from . import kernels, tuning
from .plan import CHANNEL_BLOCK, ELEMENT_BLOCK, SAMPLE_BLOCK, SampleTile, sample_tile_of, tile_of


@dataclass(frozen=True)
class Maps:
    """How the maps of a call lie: N samples of C channels at L positions, in the output format of ``x``."""

    samples: int
    channels: int
    positions: int
    channel_dim: int
    format: torch.memory_format
    between_channels: int
    between_positions: int

    @classmethod
    def of(cls, x: Tensor, channel_dim: int) -> Maps:
        format_, width, length = output_format(x, channel_dim), channels(x, channel_dim), spatial_size(x, channel_dim)
        interleaved = channel_dim != 1 or format_ != torch.contiguous_format
        apart = (1, max(width, 1)) if interleaved else (max(length, 1), 1)
        return cls(x.shape[0], width, length, channel_dim, format_, *apart)

    def dense(self, t: Tensor) -> Tensor:
        """``t`` with every sample dense in the format, whatever lies between samples; a copy if need be."""
        expected = torch.empty(t.shape, device="meta", memory_format=self.format).stride()
        same = all(s == e for s, e, size in zip(t.stride()[1:], expected[1:], t.shape[1:], strict=True) if size > 1)
        return t if same else t.contiguous(memory_format=self.format)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.channels, self.positions, self.between_channels, self.between_positions

    def sweep(self, kernel: Any, pieces: bool, *args: Any, in_place: bool = False, **options: Any) -> None:
        """Launches a sweep; with ``pieces`` a program has one tile of positions, else all of them."""
        if self.samples == 0 or self.channels == 0 or (pieces and self.positions == 0):
            return

        def grid(tile: dict[str, int]) -> tuple[int, int]:
            along = -(-self.positions // tile["POSITIONS"]) if pieces else 1
            return self.samples * along, -(-self.channels // tile["CHANNELS"])

        if tuning.requested() and not in_place:
            tuning.tuned(kernel)[grid](*args, **options)
        else:
            tile = tile_of(self.channels, self.positions, self.between_channels == 1)
            sizes = {"CHANNELS": tile.channels, "POSITIONS": tile.positions}
            kernel[grid(sizes)](*args, **options, **sizes, num_warps=tile.warps)

    def samplewise(self, kernel: Any, tile: SampleTile, *args: Any, **options: Any) -> None:
        """Launches a kernel whose programs have a sample each."""
        if self.samples > 0:
            sizes = {"CHANNELS": tile.channels, "WIDTH": tile.width, "POSITIONS": tile.positions}
            more = self.positions > tile.positions
            kernel[(self.samples,)](*args, **options, **sizes, MORE=more, num_warps=tile.warps)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _reduce(maps: Maps, x, dy, y, g, total, product, shift=None) -> None:
    strides = (_stride(t) for t in (x, dy, y, g))
    maps.sweep(kernels.reduce, False, x, dy, y, g, shift, total, product, *maps.sizes, *strides)


def _spread(maps: Maps, x, dy, y, shortcut, out, scale, offset, relu: bool = False, shift=None, slope=None) -> None:
    strides = (_stride(t) for t in (x, dy, y, shortcut, out))
    maps.sweep(
        kernels.spread, True, x, dy, y, shortcut, out, scale, offset, shift, slope, *maps.sizes, *strides,
        RELU=relu, in_place=x is out,
    )  # fmt: skip


def _channels(kernel: Any, maps: Maps, *args: Any, **options: Any) -> None:
    """Launches a kernel whose programs have some channels each, and all samples."""
    if maps.channels > 0:
        grid = (-(-maps.channels // CHANNEL_BLOCK),)
        kernel[grid](*args, **options, CHANNELS=CHANNEL_BLOCK, SAMPLES=SAMPLE_BLOCK)


def _elements(kernel: Any, count: int, *args: Any, **options: Any) -> None:
    if count > 0:
        kernel[(-(-count // ELEMENT_BLOCK),)](*args, **options, BLOCK=ELEMENT_BLOCK)


def _views(tables: Tensor, n: int, c: int, m: int) -> tuple[Tensor, ...]:
    """p, zx, zh and the gates, out of the tables of ``step``."""
    parts = tables.split(table_sizes(n, c, m))
    return tuple(part.view(n, width) for part, width in zip(parts, (c, m, m, 4 * c), strict=True))


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@dataclass(frozen=True)
class Norm:
    """A norm before the step, x = ((z - shift) - d) scale + bias, a value of each channel; rstd is in the scale."""

    shift: Tensor
    d: Tensor
    rstd: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(cls, shift: Tensor, d: Tensor, rstd: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Norm:
        scale = rstd if gamma is None else gamma * rstd
        return cls(shift, d, rstd, scale, torch.zeros_like(rstd) if beta is None else beta.contiguous())


def _cell(p, zx, zh, of_gates, h, c, parameters, tanh_output: bool, norm: Norm | None = None) -> Any:
    """The new h and c from the means, and behind a norm what y takes of z; fills zx, zh and perhaps the gates."""
    w1, b1, w2, b2, v1, a1, v2, a2 = parameters
    torch.addmm(b1, p, w1.t(), out=zx).relu_()
    if h is None:
        zh.copy_(a1.relu())
    else:
        torch.addmm(a1, h, v1.t(), out=zh).relu_()
    u = torch.mm(zx, w2.t()).addmm_(zh, v2.t())
    new_h, new_c = torch.empty_like(p), torch.empty_like(p)
    factor, added = (None, None) if norm is None else (torch.empty_like(p), torch.empty_like(p))
    affine = (None, None, None) if norm is None else (norm.d, norm.scale, norm.bias)
    _elements(
        kernels.gates, p.numel(), u, b2 + a2, _float(c), of_gates, new_c, new_h, *affine, factor, added, *p.shape,
        TANH=tanh_output,
    )  # fmt: skip
    return new_h, new_c, factor, added


def _forward(x, shortcut, h, c, parameters, channel_dim, relu, tanh_output, keep_tables, out):
    maps = Maps.of(x, channel_dim)
    x_map, s_map = maps.dense(x), None if shortcut is None else maps.dense(shortcut)
    n, width, m = maps.samples, maps.channels, parameters[0].shape[0]
    y = x_map if out else empty_map(x, channel_dim)
    tile = sample_tile_of(width, maps.positions, m, x.element_size())
    tables = x.new_empty(sum(table_sizes(n, width, m)) if keep_tables or tile is None else 0, dtype=torch.float32)
    if tile is not None:
        new_h, new_c = (x.new_empty((n, width), dtype=torch.float32) for _ in range(2))
        parts = _views(tables, n, width, m) if keep_tables else (None,) * 4
        maps.samplewise(
            kernels.step_of_sample, tile, x_map, s_map, _float(h), _float(c), *map(_float, parameters), y, new_h, new_c,
            *parts, width, m, *maps.sizes[1:], *map(_stride, (x_map, s_map, y)), RELU=relu, TANH=tanh_output,
        )  # fmt: skip
    else:
        p, zx, zh, of_gates = _views(tables, n, width, m)
        _reduce(maps, x_map, None, None, None, p, None)
        p.div_(maps.positions)
        new_h, new_c, *_ = _cell(p, zx, zh, of_gates if keep_tables else None, h, c, parameters, tanh_output)
        _spread(maps, x_map, None, None, s_map, y, new_h, None, relu)
    return y, new_h, new_c, tables if keep_tables else tables.new_empty(0)


def _no_mask(x: Tensor, keep_mask: bool) -> Tensor:
    if keep_mask:
        raise ValueError("keep_mask: expected False, Triton's kernels leave y to the gradient")
    return x.new_empty(0, dtype=torch.uint8)


def step(x, shortcut, h, c, *rest):
    *parameters, channel_dim, relu, tanh_output, keep_tables, keep_mask = rest
    mask = _no_mask(x, keep_mask)
    with torch.autocast(x.device.type, enabled=False):
        return *_forward(x, shortcut, h, c, parameters, channel_dim, relu, tanh_output, keep_tables, False), mask


def step_(x, shortcut, h, c, *rest):
    *parameters, channel_dim, relu, tanh_output = rest
    with torch.autocast(x.device.type, enabled=False):
        # Whoever writes an element of y has read that of x. Of a shortcut in the same memory that is not so.
        if shortcut is not None and shortcut.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            shortcut = shortcut.clone()
        y, new_h, new_c, _ = _forward(x, shortcut, h, c, parameters, channel_dim, relu, tanh_output, False, True)
        if y is not x:
            x.copy_(y)
    return new_h, new_c


@dataclass(frozen=True)
class Incoming:
    """What a gradient begins with: the gradients of the results, the maps, and what the forward pass left."""

    maps: Maps
    x: Tensor
    dy: Tensor | None
    y: Tensor | None
    dh: Tensor | None
    dc: Tensor | None
    h: Tensor | None
    c: Tensor | None
    new_c: Tensor
    tables: tuple[Tensor, ...]

    @classmethod
    def of(cls, dy, dh, dc, x, y, h, c, new_c, tables, m: int, channel_dim: int) -> Incoming:
        if y is not None and y.dtype != x.dtype:
            raise ValueError(f"y: expected the result of the step, in {x.dtype}, got {y.dtype}")
        maps = Maps.of(x, channel_dim)
        sizes = maps.samples, maps.channels, m
        return cls(
            maps=maps,
            x=maps.dense(x),
            dy=None if dy is None else maps.dense(dy),
            y=None if y is None else maps.dense(y),
            dh=_float(dh),
            dc=_float(dc),
            h=_float(h),
            c=_float(c),
            new_c=new_c.contiguous(),
            tables=_views(tables[: sum(table_sizes(*sizes))], *sizes),
        )


@dataclass(frozen=True)
class CellGradients:
    """Of the pre-activations, bottlenecks and old state."""

    du: Tensor
    dzx: Tensor
    dzh: Tensor
    dh: Tensor | None
    dc: Tensor | None


@dataclass(frozen=True)
class ForMap:
    """What the map's gradient takes of the cell: that of the means, h' again, the factor of g."""

    dp: Tensor | None
    new_h: Tensor
    factor: Tensor


def _cell_gradients(given: Incoming, total, product, weights, tanh_output, need_p, need_state, norm=None):
    p, zx, zh, of_gates = given.tables
    w1, w2, v1, v2 = weights
    du = p.new_empty(p.shape[0], 4 * p.shape[1])
    new_h, old_dc = torch.empty_like(p), torch.empty_like(p) if need_state else None
    factor = None if norm is None else torch.empty_like(p)
    affine = (None, None, None) if norm is None else (norm.d, norm.scale, norm.bias)
    _elements(
        kernels.gate_gradients, p.numel(), total if norm is not None else None, product, given.dh, given.dc, given.c,
        given.new_c, of_gates, du, old_dc, new_h, *affine, factor, *p.shape, TANH=tanh_output,
    )  # fmt: skip
    dzx, dzh = (_through_relu(du @ w, z) for w, z in ((w2, zx), (v2, zh)))
    dp, dh = dzx @ w1 if need_p else None, dzh @ v1 if need_state else None
    return CellGradients(du, dzx, dzh, dh, old_dc), ForMap(dp, new_h, new_h if factor is None else factor)


def _spread_gradient(given: Incoming, g: Tensor | None, dx: Tensor, factor, offset, shift=None, slope=None) -> None:
    """dx from the masked gradient ``g`` that the first sweep wrote, or from dy and y again."""
    dy, mask = (g, None) if g is not None else (given.dy, given.y)
    x = given.x if slope is not None else None
    _spread(given.maps, x, dy, mask, None, dx, factor if dy is not None else None, offset, False, shift, slope)


def _map_results(given: Incoming, channel_dim: int, need_x: bool, need_shortcut: bool) -> tuple[Tensor, Tensor]:
    dx, dshortcut = (
        empty_map(given.x, channel_dim) if need else given.x.new_empty(0) for need in (need_x, need_shortcut)
    )
    if need_shortcut and given.dy is None:
        dshortcut.zero_()
    return dx, dshortcut


def step_backward(dy, dh, dc, x, y, h, c, new_c, tables, *rest):
    *weights, channel_dim, _relu, tanh_output, need_x, need_shortcut, need_state, need_parameters, as_factors = rest
    with torch.autocast(x.device.type, enabled=False):
        given = Incoming.of(dy, dh, dc, x, y, h, c, new_c, tables, weights[0].shape[0], channel_dim)
        dx, dshortcut = _map_results(given, channel_dim, need_x, need_shortcut)
        g = dshortcut if need_shortcut and dy is not None else None
        tile = sample_tile_of(given.maps.channels, given.maps.positions, weights[0].shape[0], x.element_size())
        if tile is not None and dy is not None:
            of = _samplewise_gradients(given, tile, dx if need_x else None, g, weights, tanh_output, need_state)
        else:
            product = None
            if dy is not None:
                product = torch.empty_like(given.new_c)
                _reduce(given.maps, given.x, given.dy, given.y, g, None, product)
            of, for_map = _cell_gradients(given, None, product, weights, tanh_output, need_x, need_state)
            if need_x:
                _spread_gradient(given, g, dx, for_map.factor, for_map.dp.div_(given.maps.positions))
        return dx, dshortcut, *_state_and_parameters(given, of, need_parameters, as_factors)


def _samplewise_gradients(given: Incoming, tile: SampleTile, dx, g, weights, tanh_output, need_state) -> CellGradients:
    """Those of the cell; and of the maps, into ``dx`` and ``g``."""
    maps, (p, zx, zh, of_gates) = given.maps, given.tables
    du, dzx, dzh = torch.empty_like(of_gates), torch.empty_like(zx), torch.empty_like(zh)
    old_dh, old_dc = (torch.empty_like(p) if need_state else None for _ in range(2))
    maps.samplewise(
        kernels.step_of_sample_backward, tile, given.x, given.dy, given.y, given.dh, given.dc, given.c, given.new_c,
        zx, zh, of_gates, *map(_float, weights), dx, g, du, dzx, dzh, old_dh, old_dc, maps.channels, zx.shape[1],
        *maps.sizes[1:], *map(_stride, (given.x, given.dy, given.y, dx, g)), TANH=tanh_output,
    )  # fmt: skip
    return CellGradients(du, dzx, dzh, old_dh, old_dc)


def _state_and_parameters(given: Incoming, of: CellGradients, need_parameters: bool, as_factors: bool) -> list[Tensor]:
    nothing = given.new_c.new_empty
    flat = nothing(0)
    if need_parameters and as_factors:
        flat = torch.cat([t.view(-1) for t in (of.du, of.dzx, of.dzh)])
    elif need_parameters:
        p, zx, zh, _ = given.tables
        flat = _parameter_gradients(of.du, of.dzx, of.dzh, p, zx, zh, given.h)
    return [nothing(0) if of.dh is None else of.dh, nothing(0) if of.dc is None else of.dc, flat]


def _through_relu(gradient: Tensor, z: Tensor) -> Tensor:
    """The gradient where the ReLU that made z let something through; NaN passes."""
    return torch.ops.aten.threshold_backward(gradient, z, 0)


def _parameter_gradients(du, dzx, dzh, p, zx, zh, h) -> Tensor:
    """Of the eight parameters, in one flat tensor."""
    m, c = zx.shape[1], p.shape[1]
    flat = p.new_empty(parameter_count(m, c))
    of = split_parameters(flat, m, c)
    for left, right, weight in (
        (dzx, p, of.input_reduce_weight),
        (du, zx, of.input_expand_weight),
        (dzh, h, of.hidden_reduce_weight),
        (du, zh, of.hidden_expand_weight),
    ):
        if right is None:
            weight.zero_()
        else:
            torch.mm(left.t(), right, out=weight)
    torch.sum(dzx, 0, out=of.input_reduce_bias)
    torch.sum(dzh, 0, out=of.hidden_reduce_bias)
    torch.sum(du, 0, out=of.input_expand_bias)
    of.hidden_expand_bias.copy_(of.input_expand_bias)
    return flat


# --- the tail ----------------------------------------------------------------------------------------------


def _norm_views(tables: Tensor, cell: int, n: int, c: int) -> tuple[Tensor, ...]:
    """off (N, C), shift, d and rstd (C), out of the tables of ``tail``."""
    off, *others = tables[cell:].split([n * c, c, c, c])
    return off.view(n, c), *others


def tail(z, shortcut, h, c, gamma, beta, mean, var, eps, *rest):
    return _tail(z, shortcut, h, c, gamma, beta, mean, var, None, eps, *rest)


def tail_join(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest):
    y, h, c, tables, _, _, mask = _tail(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest)
    return y, h, c, tables, mask


def _tail(z, shortcut, h, c, gamma, beta, mean, var, means, eps, *rest):
    *parameters, channel_dim, relu, tanh_output, keep_mask = rest
    mask = _no_mask(z, keep_mask)
    with torch.autocast(z.device.type, enabled=False):
        maps = Maps.of(z, channel_dim)
        n, width, length, m = maps.samples, maps.channels, maps.positions, parameters[0].shape[0]
        of_cell = sum(table_sizes(n, width, m))
        tables = z.new_empty(of_cell + n * width + 3 * width, dtype=torch.float32)
        p, zx, zh, of_gates = _views(tables[:of_cell], n, width, m)
        off, shift, d, rstd = _norm_views(tables, of_cell, n, width)
        z_map = maps.dense(z)
        if mean is None:
            first, total, squares = (
                torch.empty_like(p, dtype=t) for t in (torch.float32, torch.float64, torch.float64)
            )
            maps.sweep(kernels.moments, False, z_map, first, total, squares, *maps.sizes, z_map.stride(0))
            statistics = (torch.empty_like(shift), torch.empty_like(shift))
            _channels(
                kernels.batch_statistics, maps, first, total, squares, shift, d, rstd, *statistics, off, n, width,
                length, eps,
            )  # fmt: skip
        else:
            statistics = (p.new_empty(0), p.new_empty(0))
            shift.copy_(mean)
            d.copy_(mean.double() - shift.double())
            rstd.copy_((var.double() + eps).float().rsqrt())
            if means is None:
                _reduce(maps, z_map, None, None, None, off, None, shift)
                off.div_(length).sub_(d)
            else:
                off.copy_(means - mean.double())
        norm = Norm.of(shift, d, rstd, gamma, beta)
        torch.addcmul(norm.bias, off, norm.scale, out=p)
        new_h, new_c, factor, added = _cell(p, zx, zh, of_gates, h, c, parameters, tanh_output, norm)
        y = empty_map(z, channel_dim)
        s_map = None if shortcut is None else maps.dense(shortcut)
        _spread(maps, z_map, None, None, s_map, y, factor, added, relu, norm.shift)
        return y, new_h, new_c, tables, *statistics, mask


def tail_backward(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, *rest):
    *weights, channel_dim, relu, tanh_output = rest[:-7]
    batch, need_z, need_shortcut, need_state, need_parameters, need_affine, as_factors = rest[-7:]
    with torch.autocast(z.device.type, enabled=False):
        given = Incoming.of(
            dy, dh, dc, z, y if relu else None, h, c, new_c, tables, weights[0].shape[0], channel_dim
        )  # fmt: skip
        maps = given.maps
        cell = sum(t.numel() for t in given.tables)
        off, shift, d, rstd = _norm_views(tables, cell, maps.samples, maps.channels)
        norm = Norm.of(shift, d, rstd, gamma, beta)
        dz, dshortcut = _map_results(given, channel_dim, need_z, need_shortcut)
        g = dshortcut if need_shortcut and dy is not None else None
        total, product = torch.empty_like(off), torch.empty_like(off)
        if dy is not None:
            _reduce(maps, given.x, given.dy, given.y, g, total, product, norm.shift)
        else:
            total.zero_(), product.zero_()
        of, for_map = _cell_gradients(given, total, product, weights, tanh_output, True, need_state, norm)
        dgamma, dbeta, slope = (torch.empty_like(norm.scale) for _ in range(3))
        offset = torch.empty_like(off) if need_z else None
        _channels(
            kernels.norm_gradients, maps, total, product, for_map.dp, off, for_map.new_h, norm.d, norm.scale, norm.rstd,
            dgamma, dbeta, offset, slope if batch else None, maps.samples, maps.channels, maps.positions, BATCH=batch,
        )  # fmt: skip
        if need_z:
            _spread_gradient(
                given, g, dz, for_map.factor, offset, norm.shift if batch else None, slope if batch else None
            )
        old_dh, old_dc, flat = _state_and_parameters(given, of, need_parameters, as_factors)
        affine = (dgamma, dbeta) if need_affine else (dgamma.new_empty(0), dbeta.new_empty(0))
        return dz, dshortcut, old_dh, old_dc, *affine, flat


# --- the parts: pool and rescale -----------------------------------------------------------------------------


def pool(x, channel_dim):
    maps = Maps.of(x, channel_dim)
    p = x.new_empty((maps.samples, maps.channels), dtype=torch.float32)
    _reduce(maps, maps.dense(x), None, None, None, p, None)
    return p.div_(maps.positions)


def rescale(x, scale, shortcut, channel_dim, relu):
    maps = Maps.of(x, channel_dim)
    y = empty_map(x, channel_dim)
    s_map = None if shortcut is None else maps.dense(shortcut)
    _spread(maps, maps.dense(x), None, None, s_map, y, scale.contiguous(), None, relu)
    return y


def rescale_backward(dy, x, scale, y, channel_dim, need_x, need_scale, need_shortcut):
    maps = Maps.of(x, channel_dim)
    dx = empty_map(x, channel_dim) if need_x else x.new_empty(0)
    dshortcut = empty_map(x, channel_dim) if need_shortcut else x.new_empty(0)
    dscale = torch.empty_like(scale, memory_format=torch.contiguous_format) if need_scale else scale.new_empty(0)
    dy_map, y_map = maps.dense(dy), None if y is None else maps.dense(y)
    if need_scale or need_shortcut:
        g, product = dshortcut if need_shortcut else None, dscale if need_scale else None
        _reduce(maps, maps.dense(x), dy_map, y_map, g, None, product)
    if need_x:
        g, mask = (dshortcut, None) if need_shortcut else (dy_map, y_map)
        _spread(maps, None, g, mask, None, dx, scale.contiguous(), None)
    return dx, dscale, dshortcut


#: By their names in ``SCHEMAS``.
KERNELS = {
    "step": step, "step_": step_, "step_backward": step_backward, "tail": tail, "tail_backward": tail_backward,
    "tail_join": tail_join, "pool": pool, "rescale": rescale, "rescale_backward": rescale_backward,
}  # fmt: skip
