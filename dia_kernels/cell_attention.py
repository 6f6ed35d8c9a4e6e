"""``CellAttention``: pooling and rescaling, fused, around any cell."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from . import backends, functional, norms, overwriting, reference
from .autograd import wants_gradient
from .autograd_norm import Normed
from .cells import STATISTICS, Cell
from .functional import STD_EPS, Activation
from .layout import channels, compute_dtype, no_autocast, output_format, spatial_dims
from .norms import Norm
from .overwriting import Inplace, Target

_MEAN_ALONE = ("mean",)
#: Shortcut, activation and the map written over by a rescaling that does not close the block.
_OPEN = (None, None, None)


class CellAttention(nn.Module):
    """Attention of a channel's scale by ``cell``: called as ``SharedAttention`` is, by one block or by all of a stage.

    ``pooled = statistics(x); (scale, state) = cell(pooled, state); y = activation(x * scale + shortcut)``

    The map is pooled and rescaled by the operators of the backend, with a batch norm that comes first folded into them.
    The cell never follows autocast; in a graph that ``torch.fx`` traced it does, since the graph holds the cell's own
    operations.

    Args:
        cell: a ``Cell``.
        channel_dim: 1 for (N, C, \\*spatial), -1 for token layout (N, L, C) or (N, \\*spatial, C).
        backend: None for the best one here, or a name out of ``dia_kernels.backends.names()``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    def __init__(self, cell: Cell, *, channel_dim: int = 1, backend: str | None = None) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(f"cell: expected a dia_kernels.Cell, got {type(cell).__name__}")
        _check_statistics("statistics", cell.statistics)
        if not isinstance(cell.position_statistics, tuple) or cell.position_statistics:
            _check_statistics("position_statistics", cell.position_statistics)
        check_placement(channel_dim, backend)
        self.cell = cell
        self.channel_dim = channel_dim
        self.backend = backend
        self._has_after = type(cell).after is not Cell.after

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        shortcut: Tensor | None = None,
        activation: Activation = None,
        inplace: Inplace = False,
        norm: Norm | None = None,
        sample_scale: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """``y = activation(x * scale + shortcut)`` with the scale of the cell, and that of each position if it has one.

        Args:
            x: feature map (N, C, \\*spatial), or (N, \\*spatial, C) with ``channel_dim=-1``; float64, float32, float16
                or bfloat16; any strides.
            state: what the block before returned, None at the first block of a stage.
            shortcut: the block's other branch, shape of x, or None.
            activation: None or ``"relu"``.
            inplace: True writes y over x (inference only); ``"auto"`` where that is right and saves memory, by cells
                that scale channels alone; see ``functional.step``.
            norm: the norm of x that comes first, as in ``functional.step``. Folded in are those that it folds, if
                nothing transforms or exports the call; else it is called by itself.
            sample_scale: (N,), a factor for the scale of each sample, or None.

        Returns:
            ``(y, state)``: y as from ``functional.step``; hand the state to the next block of the stage.

        Raises:
            ValueError, TypeError: an argument is wrong, or what the cell returns; the message names it.
        """
        x, norm = functional._called_if_traced(norm, x, self.channel_dim)
        wanted, channel_dim, backend = self.cell.statistics, self.channel_dim, self.backend
        across = self.cell.position_statistics
        more = across or self._has_after
        if inplace is not False:
            inplace = overwriting.checked(inplace)
        if inplace == "auto" and more:
            inplace = False  # what closes the block writes beside its map
        kept = (list(self.cell.parameters()), state) if inplace is True else ()
        prepared = _pooled(x, wanted, shortcut, activation, channel_dim, inplace, norm, sample_scale, backend, kept)
        x, pooled, normed, over = prepared[0], prepared[1], prepared[2], prepared[3]
        with _no_autocast(x):
            scale, state = self.cell(pooled, state)
        closing = shortcut, activation, over  # for what rescales last
        y = _rescaled(x, normed, scale, channel_dim, sample_scale, backend, *(_OPEN if more else closing))
        if across:
            seen = _pooled_across(y, across, channel_dim, backend)
            with _no_autocast(x):
                scale = self.cell.position_scale(seen[0])
            y = _rescaled_across(x, y, seen[1], scale, channel_dim, backend, *(_OPEN if self._has_after else closing))
        if self._has_after:
            with _no_autocast(x):
                y = self.cell.after(y.movedim(channel_dim, 1))
            y = _closed(x, y.movedim(1, channel_dim), *closing)
        return y, state

    def make_constant(self) -> None:
        """See ``Cell.make_constant``."""
        self.cell.make_constant()

    def extra_repr(self) -> str:
        return "" if self.channel_dim == 1 else f"channel_dim={self.channel_dim}"


def _check_statistics(name: str, wanted: object) -> None:
    if not isinstance(wanted, tuple) or not wanted or not set(wanted) <= set(STATISTICS):
        raise ValueError(f"cell: expected {name} to be a tuple out of {', '.join(STATISTICS)}, got {wanted!r}")


def check_placement(channel_dim: int, backend: str | None) -> None:
    """Raises ValueError unless the two are what every attention module takes."""
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim: expected 1 or -1, got {channel_dim!r}")
    if backend is not None and backend not in backends.names():
        raise ValueError(f"backend: expected None or one of {', '.join(backends.names())}, got {backend!r}")


# --- nodes of a traced graph -----------------------------------------------------------------------
# Whatever has to look at a tensor's shape, dtype or device: symbolic tracing sees none of them.


def _pooled(
    x: Tensor,
    statistics: tuple[str, ...],
    shortcut: Tensor | None,
    activation: Activation,
    channel_dim: int,
    inplace: Inplace,
    norm: Norm | None,
    sample_scale: Tensor | None,
    backend: str | None,
    kept: Any = (),
) -> tuple[Tensor, Tensor | tuple[Tensor, ...], Normed | None, Target | None]:
    """``(x, pooled, normed, over)``, after a check of every argument.

    The map after its norm, and its statistics as a cell takes them; where the norm is folded, the map as it is, and
    what the rescaling needs of the norm; and which map the result is written over. ``kept``: tensors that the cell
    takes beside the map, in any structure.
    """
    backend, _ = functional._checked_call(x, shortcut, activation, channel_dim, inplace, sample_scale, backend)
    folded = None if norm is None else functional._fold_apart(norm, x, channel_dim, backend)
    given, norm_is_called = x, norm is not None and folded is None
    if inplace and (inplace := overwriting.worth_asking(inplace, x, norm_is_called)):
        of_cell = (t for t in tree_leaves(kept) if isinstance(t, Tensor))
        rest = (*of_cell, *norms.tensors(norm, folded), sample_scale)
        inplace = overwriting.unless_kept(inplace, x, shortcut, rest)
    if norm_is_called:
        x = functional._called(norm, x, channel_dim)  # type: ignore[arg-type]
    pooled, normed = _statistics(x, statistics, folded, channel_dim, backend)
    over = None
    if inplace:
        ops = None if backend == "reference" else backends.operators_of(backend, x)
        over = overwriting.target(inplace, ops, given, x, shortcut, channel_dim)
    return x, pooled[0] if len(pooled) == 1 else pooled, normed, over


def _statistics(
    x: Tensor, statistics: tuple[str, ...], folded: norms.Folded | None, channel_dim: int, backend: str | None
) -> tuple[tuple[Tensor, ...], Normed | None]:
    """``statistics`` of each channel behind the norm ``folded``, and what the rescaling needs of that."""
    if folded is None and statistics != _MEAN_ALONE and functional._folds_apart(x, backend):
        folded = norms.nothing(x, channel_dim)
    with no_autocast(x):
        if folded is not None:
            return functional._norm_pool(x, folded, statistics, channel_dim, backend)
        pool, _ = functional._parts(backend, x)
        return tuple(pool(x, channel_dim) if s == "mean" else _statistic(s, x, channel_dim) for s in statistics), None


def _across(x: Tensor, channel_dim: int) -> tuple[Tensor, int]:
    """The map ``x`` seen the other way round, its positions as channels and its channels as positions, and its dim."""
    if channel_dim == 1 and output_format(x, 1) == torch.contiguous_format:
        return x.flatten(2), -1
    return x.movedim(channel_dim, -1).flatten(1, -2), 1


def _pooled_across(
    x: Tensor, statistics: tuple[str, ...], channel_dim: int, backend: str | None
) -> tuple[Tensor | tuple[Tensor, ...], Normed | None]:
    """``statistics`` over the channels at each position of ``x``, (N, \\*spatial), and what the rescaling needs."""
    seen, dim = _across(x, channel_dim)
    pooled, normed = _statistics(seen, statistics, None, dim, backends.chosen(backend, x.device))
    spatial = [x.shape[k] for k in spatial_dims(x, channel_dim)]
    maps = tuple(p.unflatten(1, spatial) for p in pooled)
    return maps[0] if len(maps) == 1 else maps, normed


def _statistic(name: str, x: Tensor, channel_dim: int) -> Tensor:
    if x.numel() == 0:
        return reference.pool(x, channel_dim)  # nothing, or NaN where there are samples but no positions
    if name == "max":
        return x.amax(spatial_dims(x, channel_dim)).to(compute_dtype(x.dtype))
    return (reference.variance(x, channel_dim) + STD_EPS).sqrt()


def _rescaled(
    x: Tensor,
    normed: Normed | None,
    scale: Tensor,
    channel_dim: int,
    sample_scale: Tensor | None,
    backend: str | None,
    shortcut: Tensor | None,
    activation: Activation,
    over: Target | None,
) -> Tensor:
    """``activation(x * scale + shortcut)``, x behind its norm; a shortcut of another dtype is added by PyTorch."""
    shape = (x.shape[0], channels(x, channel_dim))
    scale = functional._cast("cell scale", scale, shape, x)
    if sample_scale is not None:
        scale = functional._scaled(scale, functional._cast("sample_scale", sample_scale, shape[:1], x))
    directly = over is not None and over.directly and not wants_gradient(scale)
    y = _times(x, normed, scale, shortcut, activation, channel_dim, backend, directly)
    return y if over is None else overwriting.put(y, over)


def _times(
    x: Tensor,
    normed: Normed | None,
    scale: Tensor,
    shortcut: Tensor | None,
    activation: Activation,
    channel_dim: int,
    backend: str | None,
    directly: bool = False,
) -> Tensor:
    rescale = functional._rescale_of(backends.chosen(backend, x.device), x, normed, directly)
    if shortcut is not None and shortcut.dtype != x.dtype:
        return functional._closed(rescale(x, scale, None, channel_dim, False), shortcut, activation)
    return rescale(x, scale, shortcut, channel_dim, activation == "relu")


def _rescaled_across(
    x: Tensor,
    y: Tensor,
    normed: Normed | None,
    scale: Tensor,
    channel_dim: int,
    backend: str | None,
    shortcut: Tensor | None,
    activation: Activation,
    over: Target | None,
) -> Tensor:
    """``activation(y * scale + shortcut)`` with a scale for each position of ``y``, which was made of the map ``x``."""
    spatial = tuple(x.shape[k] for k in spatial_dims(x, channel_dim))
    scale = functional._cast("cell position_scale", scale, (x.shape[0], *spatial), x).flatten(1)
    seen, dim = _across(y, channel_dim)
    if shortcut is not None:
        shortcut = shortcut.flatten(2) if dim == -1 else shortcut.movedim(channel_dim, -1).flatten(1, -2)
    y = _times(seen, normed, scale, shortcut, activation, dim, backend)
    y = y.unflatten(-1, spatial) if dim == -1 else y.unflatten(1, spatial).movedim(-1, channel_dim)
    return y if over is None else overwriting.put(y, over)


def _closed(x: Tensor, y: Tensor, shortcut: Tensor | None, activation: Activation, over: Target | None) -> Tensor:
    """``activation(y + shortcut)`` of what ``Cell.after`` has made of the rescaled map ``x``."""
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(
            f"cell after: expected shape {tuple(x.shape)} and {x.dtype} as given, got {tuple(y.shape)} and {y.dtype}"
        )
    y = functional._closed(y, shortcut, activation)
    return y if over is None else overwriting.put(y, over)


fx.wrap("_pooled")
fx.wrap("_rescaled")
fx.wrap("_pooled_across")
fx.wrap("_rescaled_across")
fx.wrap("_closed")


def _no_autocast(x: Tensor) -> AbstractContextManager:
    return nullcontext() if type(x) is fx.Proxy else no_autocast(x)
