"""Made scenes: images with circles, squares and triangles and their boxes, volumes with blobs and their labels.

All of it comes from the ``torch.Generator`` that is given: the same seed makes the same scenes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

#: Names of the labels of a ``Scene``: label k is ``SHAPES[k - 1]``, 0 is the background.
SHAPES = ("circle", "square", "triangle")
#: Names of the labels of a ``Volume``, as above.
BLOBS = ("dim blob", "bright blob")

SMALLEST_SIDE = 32

_MOST_SHAPES = 4
_MOST_BLOBS = 5
_PLACES_TRIED = 20
_GAP = 2
#: A shape's colour is at least so far from the background's, in the channel where they differ most.
_CONTRAST = 0.35
_IMAGE_NOISE = 0.08
#: Noise of about half a step of intensity: a voxel alone does not tell its label, its neighbours do.
_INTENSITIES = (0.0, 0.5, 1.0)
_VOLUME_NOISE = 0.3


@dataclass(frozen=True)
class Scene:
    """An image with shapes in it.

    Attributes:
        image: (3, side, side), float32 in [0, 1].
        boxes: (n, 4), float32: left, top, right, bottom of each shape, in pixels; right and bottom lie beyond it.
        labels: (n,), int64, 1 to ``len(SHAPES)``.
        masks: (n, side, side), bool: the pixels of each shape.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Volume:
    """A volume with blobs in it.

    Attributes:
        image: (1, side, side, side), float32.
        labels: (side, side, side), int64: 0 is the background, k a blob of kind ``BLOBS[k - 1]``.
    """

    image: Tensor
    labels: Tensor


def _between(low: float, high: float, size: tuple[int, ...], generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(size, generator=generator)


def _whole(low: int, high: int, generator: Generator) -> int:
    """``low`` to ``high``, both possible."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _check_side(side: int) -> None:
    if side < SMALLEST_SIDE:
        raise ValueError(f"side: expected at least {SMALLEST_SIDE}, got {side}")


def scene(generator: Generator, side: int = 96, noise: float = _IMAGE_NOISE) -> Scene:
    """An image of 1 to 4 shapes that do not touch, in colours of their own, before a noisy background.

    Args:
        generator: of all that is random.
        side: of the square image, at least 32.
        noise: standard deviation of the noise.

    Raises:
        ValueError: ``side`` is too small.
    """
    _check_side(side)
    background = _between(0, 1, (3,), generator)
    image = background[:, None, None].repeat(1, side, side)
    taken = torch.zeros(side, side, dtype=torch.bool)
    masks: list[Tensor] = []
    labels: list[int] = []
    wanted = _whole(1, _MOST_SHAPES, generator)
    for _ in range(_PLACES_TRIED):
        if len(masks) == wanted:
            break
        label = _whole(1, len(SHAPES), generator)
        radius = float(_between(side / 14, side / 5, (1,), generator))
        centre = _between(radius + 1, side - radius - 1, (2,), generator)
        colour = _colour(background, generator)
        mask = _shape(SHAPES[label - 1], side, centre, radius)
        left, top, right, bottom = _box(mask).int().tolist()
        # The boxes stay apart, not only the shapes: no shape then lies in another's box.
        if taken[max(top - _GAP, 0) : bottom + _GAP, max(left - _GAP, 0) : right + _GAP].any():
            continue
        taken[top:bottom, left:right] = True
        image[:, mask] = colour[:, None]
        masks.append(mask)
        labels.append(label)
    image = (image + noise * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    return Scene(image, torch.stack([_box(mask) for mask in masks]), torch.tensor(labels), torch.stack(masks))


def _colour(background: Tensor, generator: Generator) -> Tensor:
    """A colour (3,) unlike the background: drawn again until it is."""
    while True:
        colour = _between(0, 1, (3,), generator)
        if (colour - background).abs().max() >= _CONTRAST:
            return colour


def _shape(name: str, side: int, centre: Tensor, radius: float) -> Tensor:
    """The pixels (side, side) whose middle is in the shape."""
    middles = torch.arange(side) + 0.5
    across, down = middles[None, :] - centre[0], middles[:, None] - centre[1]
    if name == "circle":
        return across.square() + down.square() <= radius**2
    if name == "square":
        return torch.maximum(across.abs(), down.abs()) <= radius
    # A triangle with its tip above: half as wide as it is far below the tip.
    return (down.abs() <= radius) & (across.abs() <= (down + radius) / 2)


def _box(mask: Tensor) -> Tensor:
    rows, columns = mask.nonzero(as_tuple=True)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def volume(generator: Generator, side: int = 32, noise: float = _VOLUME_NOISE) -> Volume:
    """A volume of 2 to 5 ellipsoids, each dim or bright, in noise. A later one covers an earlier one.

    Args:
        generator: of all that is random.
        side: of the cube, at least 32.
        noise: standard deviation of the noise; the intensities are 0 (background), 0.5 and 1.

    Raises:
        ValueError: ``side`` is too small.
    """
    _check_side(side)
    labels = torch.zeros(side, side, side, dtype=torch.int64)
    middles = torch.arange(side) + 0.5
    grid = torch.stack(torch.meshgrid(middles, middles, middles, indexing="ij"), dim=-1)
    for _ in range(_whole(2, _MOST_BLOBS, generator)):
        kind = _whole(1, len(BLOBS), generator)
        radii = _between(side / 11, side / 4, (3,), generator)
        centre = _between(side / 6, side - side / 6, (3,), generator)
        # The orthogonal factor of a random matrix: the ellipsoid lies in any direction.
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
        inside = (((grid - centre) @ turn) / radii).square().sum(-1) <= 1
        labels[inside] = kind
    image = torch.tensor(_INTENSITIES)[labels] + noise * torch.randn(labels.shape, generator=generator)
    return Volume(image[None], labels)


def scenes(count: int, generator: Generator, side: int = 96) -> list[Scene]:
    """``count`` images, one after the other: see ``scene``."""
    return [scene(generator, side) for _ in range(count)]


def volumes(count: int, generator: Generator, side: int = 32) -> list[Volume]:
    """``count`` volumes, one after the other: see ``volume``."""
    return [volume(generator, side) for _ in range(count)]
