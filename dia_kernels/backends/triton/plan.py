"""Tiles of the Triton sweeps: a pure function of the sizes, without Triton."""

from __future__ import annotations

from typing import NamedTuple

#: Elements of a program of tables; channels and samples at a time of one that sums over samples.
ELEMENT_BLOCK, CHANNEL_BLOCK, SAMPLE_BLOCK = 256, 16, 32
#: Elements of a tile of a map, and its longer side at most: 16 for each of 128 lanes, rows of memory of 512 bytes and
#: more where the map has them. Half as many where every element has an address of its own, for the registers' sake.
TILE, LONGEST = 2048, 512


class Tile(NamedTuple):
    channels: int
    positions: int
    warps: int


def _power(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def tile_of(channels: int, positions: int, interleaved: bool) -> Tile:
    """What a program of a sweep takes at a time: as much as lies together, and of the other dimension the rest."""
    along, across = (channels, positions) if interleaved else (positions, channels)
    most = TILE if along % 8 == 0 else TILE // 2
    along = min(_power(along), LONGEST)
    across = min(_power(across), most // along)
    return Tile(*((along, across) if interleaved else (across, along)), warps=4)
