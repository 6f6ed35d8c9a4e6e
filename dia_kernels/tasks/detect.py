"""Detection: torchvision's FCOS on a ResNet-18 with shared attention finds circles, squares and triangles.

``run`` makes the images, trains on some, measures the mean average precision on others and saves a picture.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from . import run as task_run
from . import scenes
from .scenes import SHAPES, Scene

SIDE = 96
FULL = task_run.Settings(train=320, test=40, epochs=12, batch=8, rate=1e-3)
QUICK = task_run.Settings(train=8, test=4, epochs=1, batch=4, rate=1e-3, judged=False)
REQUIRED_PRECISION = 0.6

_SHOWN = 5
#: Boxes are drawn from this score, if they overlap none of a higher score by so much, whatever the labels.
_SHOWN_SCORE = 0.3
_SHOWN_OVERLAP = 0.5
_COLOURS = ("#e8432f", "#1f77d0", "#12a150")
#: Width of the pyramid and of the heads: torchvision's 256 are for larger images and 80 classes.
_WIDTH = 64

#: boxes (n, 4) float32, labels (n,) int64, scores (n,) float32: what torchvision's detectors give for an image.
Found = Mapping[str, Tensor]


def create_network(seed: int) -> nn.Module:
    """torchvision's FCOS with a pyramid on a ResNet-18, random weights, no attention; for images of 96x96.

    Raises:
        ModuleNotFoundError: torchvision is not here.
    """
    from torchvision.models import resnet18
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    torch.manual_seed(seed)
    # The shapes are small: the pyramid begins at stride 8, and torchvision adds one level above the last stage.
    stages = {f"layer{k + 2}": str(k) for k in range(3)}
    backbone = BackboneWithFPN(resnet18(weights=None), stages, [128, 256, 512], _WIDTH)
    anchors = AnchorGenerator(tuple((stride,) for stride in (8, 16, 32, 64)), ((1.0,),) * 4)
    return FCOS(backbone, len(SHAPES) + 1, min_size=SIDE, max_size=SIDE, anchor_generator=anchors)


def loss(model: nn.Module, batch: Sequence[Scene]) -> Tensor:
    """Sum of the detector's losses for a batch, a scalar. The model is in training mode."""
    losses = model([scene.image for scene in batch], [{"boxes": s.boxes, "labels": s.labels} for s in batch])
    return sum(losses.values(), torch.zeros(()))


@torch.no_grad()
def find(model: nn.Module, batch: Sequence[Scene]) -> list[Found]:
    """What the detector finds in each image. Leaves the model in eval mode."""
    model.eval()
    return [model([scene.image])[0] for scene in batch]


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4), as left, top, right, bottom."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return both / (areas[0][:, None] + areas[1][None, :] - both)


def average_precision(found: Sequence[Found], truths: Sequence[Scene], label: int, overlap: float = 0.5) -> float:
    """Area under the curve of precision over recall for one label, at every recall that occurs.

    From the highest score down, a found box takes the true box in its image, of its label and not taken before,
    that it overlaps most, if by at least ``overlap``; otherwise it is false. The precision at a recall is the best
    at that recall or a higher one.

    Args:
        found: for each image, boxes (n, 4), labels (n,) and scores (n,).
        truths: for each image, the true boxes and labels.
        label: which.
        overlap: intersection over union that makes a box right.

    Raises:
        ValueError: the numbers of images differ, or no image holds the label.
    """
    if len(found) != len(truths):
        raise ValueError(f"found: expected one entry for each of {len(truths)} images, got {len(found)}")
    true_boxes = [truth.boxes[truth.labels == label] for truth in truths]
    number = sum(map(len, true_boxes))
    if number == 0:
        raise ValueError(f"label: no image holds label {label}")
    candidates = [
        (score, image, box)
        for image, boxes in enumerate(found)
        for score, box in zip(
            boxes["scores"][boxes["labels"] == label].tolist(), boxes["boxes"][boxes["labels"] == label], strict=True
        )
    ]
    candidates.sort(key=lambda candidate: -candidate[0])
    free = [torch.ones(len(boxes), dtype=torch.bool) for boxes in true_boxes]
    precisions: list[float] = []  # at each right box, where recall rises by 1 / number
    for rank, (_, image, box) in enumerate(candidates, start=1):
        shares = overlaps(box[None], true_boxes[image])[0] * free[image]
        if len(shares) and shares.max() >= overlap:
            free[image][shares.argmax()] = False
            precisions.append((len(precisions) + 1) / rank)
    return sum(max(precisions[k:]) for k in range(len(precisions))) / number


def mean_average_precision(found: Sequence[Found], truths: Sequence[Scene], overlap: float = 0.5) -> float:
    """Mean of ``average_precision`` over the labels that occur in ``truths``, in [0, 1].

    Raises:
        ValueError: the numbers of images differ, or there are no true boxes.
    """
    labels = sorted({label for truth in truths for label in truth.labels.tolist()})
    if not labels:
        raise ValueError("truths: expected at least one true box, got none")
    return sum(average_precision(found, truths, label, overlap) for label in labels) / len(labels)


def shown(boxes: Found) -> list[int]:
    """Numbers of the boxes that a picture shows, best first: the detector may give one shape several labels."""
    shares = overlaps(boxes["boxes"], boxes["boxes"])
    chosen: list[int] = []
    for k in boxes["scores"].argsort(descending=True, stable=True).tolist():
        if boxes["scores"][k] >= _SHOWN_SCORE and not (shares[k, chosen] >= _SHOWN_OVERLAP).any():
            chosen.append(k)
    return chosen


def draw(path: Path, found: Sequence[Found], truths: Sequence[Scene], title: str) -> None:
    """Saves a row of images, each with its true boxes (dashed) and those found (solid, with label and score)."""
    figure = Figure(figsize=(3 * len(truths), 3.5), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=13)
    for axes, boxes, truth in zip(figure.subplots(1, len(truths), squeeze=False)[0], found, truths, strict=True):
        axes.imshow(truth.image.permute(1, 2, 0).numpy(), extent=(0, SIDE, SIDE, 0))
        axes.set_axis_off()
        for box in truth.boxes:
            _draw_box(axes, box, "white", "--")
        for k in shown(boxes):
            box, label, score = boxes["boxes"][k], int(boxes["labels"][k]), float(boxes["scores"][k])
            colour = _COLOURS[label - 1]
            _draw_box(axes, box, colour, "-")
            axes.text(
                float(box[0]),
                float(box[1]) - 1.5,
                f"{SHAPES[label - 1]} {score:.2f}",
                color="white",
                fontsize=7,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
            )
    figure.savefig(path)


def _draw_box(axes: Axes, box: Tensor, colour: str, style: str) -> None:
    left, top, right, bottom = box.tolist()
    rectangle = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style)
    # Dashed boxes above the solid ones: where the two agree both are seen.
    rectangle.set(linewidth=1.2 if style == "--" else 2.2, zorder=3 if style == "--" else 2)
    axes.add_patch(rectangle)


def run(settings: task_run.Settings, picture: Path, *, seed: int = 0) -> int:
    """The whole task. Returns the exit status: 1 if the precision after training is judged and too low.

    Raises:
        ModuleNotFoundError: torchvision is not here.
    """
    start = time.perf_counter()
    print(
        f"FCOS (torchvision) on a ResNet-18 learns to find {', '.join(SHAPES)} in {settings.train} made images of "
        f"{SIDE}x{SIDE} (epochs: {settings.epochs}, CPU threads: {torch.get_num_threads()})."
    )
    model = task_run.converted(create_network(seed))
    generator = torch.Generator().manual_seed(seed)
    train = scenes.scenes(settings.train, generator, SIDE)
    test = scenes.scenes(settings.test, generator, SIDE)

    before = mean_average_precision(find(model, test), test)
    trained = task_run.fit(model, lambda numbers: loss(model, [train[k] for k in numbers]), settings, seed)
    found = find(model, test)
    after = mean_average_precision(found, test)
    draw(picture, found[:_SHOWN], test[:_SHOWN], f"FCOS with shared attention, mean AP at 0.5: {after:.2f}")

    print(f"{1e3 * trained.seconds:.0f} ms a step of {settings.batch} images (median).")
    print(f"Mean average precision at IoU 0.5 on {settings.test} other images: {before:.3f} before, {after:.3f} after.")
    print(f"Picture: {picture}. All of it took {time.perf_counter() - start:.0f} s.")
    return task_run.verdict("mean average precision", after, REQUIRED_PRECISION, settings)
