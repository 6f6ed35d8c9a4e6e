"""The tables of small values that an operator's forward hands to its gradient: their parts, one behind the other."""

from __future__ import annotations

from torch import Tensor

from .layout import channels


def table_sizes(n: int, c: int, m: int) -> list[int]:
    """Element counts of the parts of ``tables``: p, zx, zh and the gates i, f, g, o."""
    return [n * c, n * m, n * m, n * c * 4]


def factor_sizes(n: int, c: int, m: int) -> list[int]:
    """Element counts of the parts of a step's factors: du, dzx and dzh."""
    return [n * c * 4, n * m, n * m]


def norm_table_size(n: int, c: int) -> int:
    """Element count of a norm's tables, which come alone or behind those of a cell (``norm_parts``)."""
    return n * c + 3 * c


def norm_parts(z: Tensor, tables: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What lies before a norm's part of ``tables``, and of that part ``(off, mean, rstd)``.

    ``off`` (N, C) is each sample's mean less the mean. The mean lies there as shift and d, and the norm of z is
    ``((z - shift) - d) * rstd``.
    """
    n, width = z.shape[0], channels(z, channel_dim)
    before, off, shift, d, rstd = tables.split(
        [tables.numel() - norm_table_size(n, width), n * width, width, width, width]
    )
    return before, off.view(n, width), shift + d, rstd


def norm_tokens(z: Tensor, p: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """The tokens of ``operators.norm_pool``: one shaped like z, one (3, N, C), each a single element in memory."""
    if not wanted:
        return z.new_empty(0), p.new_empty(0)
    return z.new_empty(()).expand(z.shape), p.new_empty(()).expand(3, *p.shape)
