"""Where images come from: ``load("cifar10", folder)``. Digits are built in; the others are read from a folder.

An image is a float tensor (channels, height, width) with values in [0, 1]. Training images are changed
at random, by the usual rules of their data set, and how is a function of seed, epoch and image alone:
no worker, no order and no interruption changes it.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

NAMES = ("digits", "fashion", "cifar10", "cifar100", "folder")

#: Where Debian's package dataset-fashion-mnist puts its files.
FASHION_OF_DEBIAN = Path("/usr/share/datasets/fashion-mnist")

Labelled = Sequence[tuple[Tensor, int]]
Change = Callable[[Tensor], Tensor]

_TEST_DIGITS = 360


class DataError(RuntimeError):
    """Data that is missing or damaged. The message says what, where, and what would help."""


def mixed_seed(seed: int, number: int) -> int:
    """A seed for each ``number`` of a run with ``seed``, in 32 bits: torch's generator ignores higher ones."""
    return zlib.crc32(f"{seed}/{number}".encode())


class Images(Dataset):
    """Labelled images, each with its random change if there is one.

    Args:
        source: of images and labels.
        change: made anew for each image in each epoch, or None.
        normalise: applied last, or None.
        seed: of the random changes.
    """

    def __init__(self, source: Labelled, change: Change | None, normalise: Change | None, seed: int) -> None:
        self.source = source
        self.change = change
        self.normalise = normalise
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        """Image ``key % len`` as it looks in epoch ``key // len``, and its label."""
        image, label = self.source[key % len(self)]
        if self.change is not None:
            # torchvision draws from the process's generator: lend it a state of our own for the while.
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(mixed_seed(self.seed, key))
                image = self.change(image)
        return (image if self.normalise is None else self.normalise(image)), label


@dataclass(frozen=True)
class ImageData:
    """Training and test images of one data set."""

    train: Images
    test: Images
    num_classes: int
    in_channels: int


class _Tensors(Sequence):
    """Images (N, C, H, W) in memory, uint8 or float, and their labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (image.float() / 255 if image.dtype == torch.uint8 else image), self.labels[index]


class _Files(Sequence):
    """Images in files, read when asked for."""

    def __init__(self, folder: datasets.ImageFolder) -> None:
        self.folder = folder
        self.to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index):
        try:
            image, label = self.folder[index]
        except OSError as error:  # PIL's errors are among them
            raise DataError(f"{self.folder.samples[index][0]}: not a readable image ({error})") from error
        return self.to_tensor(image), label


def load(
    name: str,
    folder: Path | None = None,
    *,
    size: int = 224,
    seed: int = 0,
    augment: bool = True,
    images: int | None = None,
    download: bool = False,
) -> ImageData:
    """The training and test images of a data set.

    Args:
        name: one of ``NAMES``. ``digits`` are scikit-learn's and need no folder; ``fashion`` reads the four IDX
            files of Fashion-MNIST, plain or gzipped; ``cifar10`` and ``cifar100`` read the authors' archives,
            unpacked; ``folder`` reads ``train/<class>/*`` and ``test/<class>/*`` (or ``val``).
        folder: where the files are; None for those of Debian's package dataset-fashion-mnist, if it is installed.
        size: side to which the images of ``folder`` are cut.
        seed: of the random changes.
        augment: whether to change training images at random; those of ``folder`` are then cut as the test images are.
        images: at most so many of the training images, and half as many of the test images: the same ones for every
            seed. None for all.
        download: fetch CIFAR into ``folder`` if it is not there.

    Raises:
        ValueError: an argument is wrong; the message names it.
        DataError: files are missing or damaged.
    """
    if images is not None and images < 2:
        raise ValueError(f"images: expected at least 2, got {images}")
    data = _whole(name, folder, size, seed, augment, download)
    if images is not None:
        for part, most in ((data.train, images), (data.test, images // 2)):
            part.source = _some(part.source, most)
    return data


def installed(name: str) -> bool:
    """Whether the images of a data set are on this machine, where ``load`` finds them without a folder."""
    return name == "digits" or (name == "fashion" and FASHION_OF_DEBIAN.is_dir())


def _some(source: Labelled, most: int) -> Labelled:
    """At most ``most`` of the images, drawn at random: they may be sorted by class."""
    if len(source) <= most:
        return source
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:most]
    return cast(Labelled, Subset(cast(Dataset, source), sorted(chosen.tolist())))


def _whole(name: str, folder: Path | None, size: int, seed: int, augment: bool, download: bool) -> ImageData:
    if name not in NAMES:
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "digits":
        return _augmented(_digits(seed), augment)
    if folder is None and name == "fashion" and installed(name):
        folder = FASHION_OF_DEBIAN
    if folder is None:
        raise ValueError(f"folder: expected the folder that holds the files of {name!r}, got None")
    if not folder.is_dir() and not download:
        raise DataError(f"{folder}: no such folder")
    if name == "fashion":
        return _augmented(_fashion(folder, seed), augment)
    if name == "folder":
        return _image_folder(folder, size, seed, augment)
    return _augmented(_cifar(name, folder, seed, download), augment)


def _augmented(data: ImageData, augment: bool) -> ImageData:
    """``data``, whose training images are changed at random only with ``augment``."""
    if not augment:
        data.train.change = None
    return data


def _digits(seed: int) -> ImageData:
    """Scikit-learn's handwritten digits, split into training and test images, the same split every time."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # From 8x8 to 16x16: the networks halve the sides twice, and 2x2 positions would leave little to pool.
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, scale_factor=2)
    labels = torch.from_numpy(digits.target)
    train, test = train_test_split(
        torch.arange(len(images)), test_size=_TEST_DIGITS, stratify=digits.target, random_state=0
    )
    change = v2.RandomCrop(16, padding=2)  # a digit in the mirror is another sign
    return ImageData(
        Images(_Tensors(images[train], labels[train]), change, None, seed),
        Images(_Tensors(images[test], labels[test]), None, None, seed),
        num_classes=10,
        in_channels=1,
    )


def _fashion(folder: Path, seed: int) -> ImageData:
    normalise = v2.Normalize([0.2860], [0.3530])
    change = v2.Compose([v2.RandomCrop(28, padding=4), v2.RandomHorizontalFlip()])
    splits = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte", dimensions=3)
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: {part} has {len(images)} images but {len(labels)} labels")
        if len(images) == 0 or images.shape[1:] != (28, 28):
            raise DataError(f"{folder}: {part}: expected images of 28x28, got {tuple(images.shape)}")
        if labels.max() > 9:
            raise DataError(f"{folder}: {part}: expected labels 0 to 9, got {int(labels.max())}")
        splits.append(_Tensors(images[:, None], labels))
    train, test = splits
    return ImageData(Images(train, change, normalise, seed), Images(test, None, normalise, seed), 10, 1)


def read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """The bytes of an IDX file, plain or gzipped, in its shape.

    Format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each size as a
    big-endian 32-bit number, then the values (yann.lecun.com/exdb/mnist).

    Raises:
        DataError: the file is missing or damaged.
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder / name}: no such file, and none with .gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path}: not an IDX file of unsigned bytes in {dimensions} dimensions")
    sizes = [int.from_bytes(content[k : k + 4], "big") for k in range(4, head, 4)]
    if len(content) != head + math.prod(sizes):
        raise DataError(f"{path}: expected {head + math.prod(sizes)} bytes for sizes {sizes}, got {len(content)}")
    return torch.frombuffer(bytearray(content[head:] or b"\0"), dtype=torch.uint8)[: math.prod(sizes)].reshape(sizes)


def _cifar(name: str, folder: Path, seed: int, download: bool) -> ImageData:
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        parts = [kind(folder, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError, EOFError) as error:
        raise DataError(
            f"{folder}: {name} is not there, or damaged; expected {kind.base_folder}/ with the files of "
            f"{kind.url} (--download fetches them)"
        ) from error
    train, test = (
        _Tensors(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    normalise = v2.Normalize([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    change = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    return ImageData(
        Images(train, change, normalise, seed),
        Images(test, None, normalise, seed),
        num_classes=10 if name == "cifar10" else 100,
        in_channels=3,
    )


def _image_folder(folder: Path, size: int, seed: int, augment: bool) -> ImageData:
    if size < 8:
        raise ValueError(f"size: expected at least 8, got {size}")
    test_folder = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), folder / "test")
    parts = []
    for part in (folder / "train", test_folder):
        if not part.is_dir():
            raise DataError(f"{part}: no such folder; expected train/<class>/ and test/<class>/ (or val) in {folder}")
        try:
            parts.append(datasets.ImageFolder(str(part)))
        except FileNotFoundError as error:
            raise DataError(f"{part}: {error}") from error
    train, test = parts
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{folder}: classes that are only in one of train and {test_folder.name}: {different}")
    normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    change = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    cut = v2.Compose([v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size), normalise])
    return ImageData(
        Images(_Files(train), change, normalise, seed) if augment else Images(_Files(train), None, cut, seed),
        Images(_Files(test), None, cut, seed),
        num_classes=len(train.classes),
        in_channels=3,
    )
