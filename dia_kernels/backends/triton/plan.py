"""Tiles of the Triton kernels: pure functions of the sizes, without Triton."""

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
    along = channels if interleaved else positions
    return _tile(channels, positions, interleaved, TILE if along % 8 == 0 else TILE // 2, LONGEST, 4)


def _tile(channels: int, positions: int, interleaved: bool, most: int, longest: int, warps: int) -> Tile:
    along, across = (channels, positions) if interleaved else (positions, channels)
    along = min(_power(along), longest)
    across = min(_power(across), most // along)
    return Tile(*((along, across) if interleaved else (across, along)), warps=warps)


def candidates_of(channels: int, positions: int, interleaved: bool) -> list[Tile]:
    """Tiles worth timing: the plan's own first, then others of as many elements a lane or twice as many."""
    plan = tile_of(channels, positions, interleaved)
    others = (
        _tile(channels, positions, interleaved, 128 * warps // 4 * lane, longest, warps)
        for warps in (2, 4, 8)
        for lane in (8, 16, 32)
        for longest in (LONGEST // 4, LONGEST)
    )
    return list(dict.fromkeys([plan, *others]))


#: Elements of a sample, with lanes' padding, up to which a program may have it; of a tile that is the whole sample,
#: and of one of several, in registers beside the next. 64 and 32 for each of 256 lanes: twice as many spill.
SAMPLE, WHOLE, PART = 1 << 16, 1 << 14, 1 << 13
#: Elements of a matrix of the cell in registers.
MATRIX = 1 << 13


class SampleTile(NamedTuple):
    channels: int
    width: int
    positions: int
    warps: int


def sample_tile_of(channels: int, positions: int, width: int, element_size: int) -> SampleTile | None:
    """What a program of ``step_of_sample`` takes at a time; None where the step is better split.

    The maps of a sample are small, and so are the weights, which every program reads: 10 C m float32 values, while the
    maps come to at least 2 C L elements. Weights come from the L2 cache, which gives twice what memory gives or more.
    """
    if min(channels, positions, width) == 0 or 10 * width * 4 > 2 * 2 * positions * element_size:
        return None
    wide, narrow, along = _power(channels), _power(width), _power(positions)
    if wide * along > SAMPLE or wide * narrow > MATRIX:
        return None
    along = along if wide * along <= WHOLE else PART // wide
    return SampleTile(wide, narrow, along, warps=8 if wide * max(along, narrow) >= PART else 4)
