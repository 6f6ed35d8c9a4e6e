"""Segmentation in 3-D: MONAI's SegResNet with shared attention finds dim and bright blobs in noisy volumes.

``run`` makes the volumes, trains on some, measures the Dice score on others and saves a picture.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from . import run as task_run
from . import scenes
from .scenes import BLOBS, Volume

SIDE = 32
FULL = task_run.Settings(train=80, test=20, epochs=12, batch=2, rate=5e-3)
QUICK = task_run.Settings(train=4, test=2, epochs=1, batch=2, rate=5e-3, judged=False)
REQUIRED_DICE = 0.8

_SHOWN = 4
_COLOURS = ListedColormap(["#101418", "#2f8fd0", "#ffb02e"])


def create_network(seed: int) -> nn.Module:
    """MONAI's SegResNet in 3-D with 8 filters, random weights, no attention: (N, 1, D, H, W) to (N, 3, D, H, W).

    Raises:
        ModuleNotFoundError: monai is not here.
    """
    from monai.networks.nets import SegResNet

    torch.manual_seed(seed)
    return SegResNet(
        spatial_dims=3,
        init_filters=8,
        in_channels=1,
        out_channels=len(BLOBS) + 1,
        blocks_down=(1, 2, 2),
        blocks_up=(1, 1),
    )


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus 1 minus the mean soft Dice score of the blobs, a scalar.

    Args:
        logits: (N, kinds + 1, D, H, W), floating.
        labels: (N, D, H, W), int64, 0 to kinds.
    """
    shares = logits.softmax(1)[:, 1:]
    true = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].to(shares.dtype)
    spaces = (0, 2, 3, 4)  # over the batch too: a volume may lack a kind
    both = (shares * true).sum(spaces)
    # The 1 keeps the quotient defined where a kind is neither there nor found.
    score = (2 * both + 1) / (shares.sum(spaces) + true.sum(spaces) + 1)
    return F.cross_entropy(logits, labels) + 1 - score.mean()


def mean_dice(found: Tensor, labels: Tensor, kinds: int) -> float:
    """Mean over the kinds of ``2 |A and B| / (|A| + |B|)``, A the voxels found and B the true ones, in [0, 1].

    Kinds that are neither in ``found`` nor in ``labels`` do not count.

    Args:
        found: labels, int64, 0 (background) to ``kinds``, any shape.
        labels: the true ones, same shape.
        kinds: of blobs.

    Raises:
        ValueError: the shapes differ, or both hold background only.
    """
    if found.shape != labels.shape:
        raise ValueError(f"found: expected the shape of labels, {tuple(labels.shape)}, got {tuple(found.shape)}")
    scores = []
    for kind in range(1, kinds + 1):
        a, b = found == kind, labels == kind
        total = int(a.sum() + b.sum())
        if total:
            scores.append(2 * int((a & b).sum()) / total)
    if not scores:
        raise ValueError("labels: expected at least one voxel of a blob, got background only")
    return sum(scores) / len(scores)


@torch.no_grad()
def segment(model: nn.Module, batch: Sequence[Volume]) -> Tensor:
    """The label found for each voxel, int64 (N, D, H, W). Leaves the model in eval mode."""
    model.eval()
    return torch.cat([model(volume.image[None]).argmax(1) for volume in batch])


def draw(path: Path, found: Tensor, truths: Sequence[Volume], title: str) -> None:
    """Saves one slice of each volume in a row, that with most of the blobs: image, true labels, labels found."""
    figure = Figure(figsize=(6, 2 * len(truths) + 0.5), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=12)
    all_axes = figure.subplots(len(truths), 3, squeeze=False)
    for row, labels, truth in zip(all_axes, found, truths, strict=True):
        fullest = int((truth.labels > 0).sum((1, 2)).argmax())
        row[0].imshow(truth.image[0, fullest].numpy(), cmap="gray", vmin=-0.5, vmax=1.5)
        for axes, slices in ((row[1], truth.labels), (row[2], labels)):
            axes.imshow(slices[fullest].numpy(), cmap=_COLOURS, vmin=0, vmax=len(BLOBS), interpolation="nearest")
        for axes in row:
            axes.set_axis_off()
    for axes, name in zip(all_axes[0], ("slice", "truth", "found"), strict=True):
        axes.set_title(name, fontsize=10)
    figure.savefig(path)


def run(settings: task_run.Settings, picture: Path, *, seed: int = 0) -> int:
    """The whole task. Returns the exit status: 1 if the Dice score after training is judged and too low.

    Raises:
        ModuleNotFoundError: monai is not here.
    """
    start = time.perf_counter()
    print(
        f"SegResNet (MONAI) learns to find {', '.join(BLOBS)} in {settings.train} made volumes of "
        f"{SIDE}x{SIDE}x{SIDE} (epochs: {settings.epochs}, CPU threads: {torch.get_num_threads()})."
    )
    model = task_run.converted(create_network(seed))
    generator = torch.Generator().manual_seed(seed)
    train = scenes.volumes(settings.train, generator, SIDE)
    test = scenes.volumes(settings.test, generator, SIDE)
    truth = torch.stack([volume.labels for volume in test])

    def step_loss(numbers: list[int]) -> Tensor:
        images = torch.stack([train[k].image for k in numbers])
        return loss(model(images), torch.stack([train[k].labels for k in numbers]))

    before = mean_dice(segment(model, test), truth, len(BLOBS))
    trained = task_run.fit(model, step_loss, settings, seed)
    found = segment(model, test)
    after = mean_dice(found, truth, len(BLOBS))
    draw(picture, found[:_SHOWN], test[:_SHOWN], f"SegResNet with shared attention, mean Dice: {after:.2f}")

    print(f"{1e3 * trained.seconds:.0f} ms a step of {settings.batch} volumes (median).")
    print(f"Mean Dice score of the blobs in {settings.test} other volumes: {before:.3f} before, {after:.3f} after.")
    print(f"Picture: {picture}. All of it took {time.perf_counter() - start:.0f} s.")
    return task_run.verdict("mean Dice score", after, REQUIRED_DICE, settings)
