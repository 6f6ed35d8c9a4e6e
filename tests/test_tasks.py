"""``python -m dia_kernels demo --task detect`` and ``--task segment3d``: scenes, metrics, training, the command."""

import builtins
import dataclasses
import math
import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from dia_kernels import __main__
from dia_kernels.attention import SharedAttention
from dia_kernels.tasks import detect, scenes, segment3d
from dia_kernels.tasks import run as task_run

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same(first, second):
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", [scenes.scenes, scenes.volumes])
def test_scenes_are_functions_of_the_seed(make):
    state = torch.get_rng_state()
    first, second, other = make(3, seeded(5)), make(3, seeded(5)), make(3, seeded(6))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    assert not same(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state), "the process's generator was drawn from"


@pytest.mark.parametrize("side", [32, 96])
def test_boxes_are_tight_around_shapes_that_do_not_touch(side):
    generator, counts, labels = seeded(0), set(), set()
    for _ in range(40):
        # Without noise the pixels unlike the background are those of the shapes.
        made = scenes.scene(generator, side, noise=0)
        assert made.image.dtype == made.boxes.dtype == torch.float32
        assert made.labels.dtype == torch.int64
        assert made.image.shape == (3, side, side)
        assert made.image.min() >= 0
        assert made.image.max() <= 1
        assert made.boxes.shape == (len(made.labels), 4)
        counts.add(len(made.labels))
        labels.update(made.labels.tolist())
        union = made.masks.any(0)
        background = made.image[:, ~union]
        assert (background == background[:, :1]).all()
        assert torch.equal((made.image != background[:, :1, None]).any(0), union)
        assert torch.equal(made.masks.sum(0), union.long())
        for box, mask in zip(made.boxes, made.masks, strict=True):
            left, top, right, bottom = box.int().tolist()
            assert 0 <= left < right <= side
            assert 0 <= top < bottom <= side
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum()
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        shares = detect.overlaps(made.boxes, made.boxes)
        assert torch.equal(shares, torch.eye(len(shares)))
    assert counts == {1, 2, 3, 4}
    assert labels == {1, 2, 3}


def test_shapes_have_the_area_of_their_names():
    generator, seen = seeded(1), set()
    areas = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}
    for made in scenes.scenes(10, generator, side=192):
        for box, label, mask in zip(made.boxes, made.labels.tolist(), made.masks, strict=True):
            name = scenes.SHAPES[label - 1]
            seen.add(name)
            share = mask.sum() / (box[2:] - box[:2]).prod()
            assert share == pytest.approx(areas[name], abs=0.05)
    assert seen == set(areas)


def test_noise_is_what_was_asked_for():
    quiet, noisy = (scenes.volume(seeded(2), noise=noise) for noise in (0.0, 0.3))
    assert torch.equal(quiet.labels, noisy.labels)
    assert (noisy.image - quiet.image).std() == pytest.approx(0.3, rel=0.02)


def test_labels_of_volumes_are_those_of_their_intensities():
    generator, kinds = seeded(3), set()
    for _ in range(20):
        made = scenes.volume(generator, noise=0)
        assert made.image.shape == (1, 32, 32, 32)
        assert made.image.dtype == torch.float32
        assert made.labels.dtype == torch.int64
        assert torch.equal(made.image[0], made.labels / 2)
        blobs = (made.labels > 0).float().mean()
        assert 0.001 < blobs < 0.3
        kinds.update(made.labels.unique().tolist())
    assert kinds == {0, 1, 2}


@pytest.mark.parametrize("make", [scenes.scene, scenes.volume])
def test_small_sides_are_refused(make):
    with pytest.raises(ValueError, match="side: expected at least 32, got 31"):
        make(seeded(0), 31)


def truth(boxes, labels):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return scenes.Scene(torch.zeros(3, 96, 96), boxes, torch.tensor(labels, dtype=torch.int64), torch.zeros(0, 96, 96))


def found(boxes, labels, scores):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


A, B, C, FAR = (0, 0, 10, 10), (20, 20, 30, 40), (50, 50, 60, 60), (80, 80, 90, 90)


def test_overlaps():
    first = torch.tensor([A, (0, 0, 10, 20)], dtype=torch.float32)
    second = torch.tensor([A, (5, 0, 15, 10), FAR], dtype=torch.float32)
    expected = torch.tensor([[1, 1 / 3, 0], [1 / 2, 1 / 5, 0]])
    torch.testing.assert_close(detect.overlaps(first, second), expected)


@pytest.mark.parametrize(
    ("boxes", "scores", "expected"),
    [
        ([A, B], [0.9, 0.8], 1.0),
        ([], [], 0.0),
        ([FAR], [0.9], 0.0),
        ([A], [0.9], 1 / 2),  # recall ends at 1/2
        ([A, FAR, B], [0.9, 0.8, 0.7], 1 / 2 * 1 + 1 / 2 * 2 / 3),
        ([B, FAR, A], [0.7, 0.8, 0.9], 1 / 2 * 1 + 1 / 2 * 2 / 3),  # by score, not by place
        ([FAR, A, B], [0.9, 0.8, 0.7], 2 / 3),  # the best precision at that recall or a higher one
        ([A, A, B], [0.9, 0.8, 0.7], 1 / 2 * 1 + 1 / 2 * 2 / 3),  # a box is found once
        ([(0, 0, 10, 5), B], [0.9, 0.8], 1.0),  # overlap 0.5: right
        ([(0, 0, 10, 4.9), B], [0.9, 0.8], 1 / 2 * 1 / 2),
    ],
)
def test_average_precision_of_two_boxes(boxes, scores, expected):
    truths = [truth([A, B], [1, 1])]
    assert detect.average_precision([found(boxes, [1] * len(boxes), scores)], truths, 1) == pytest.approx(expected)


def test_average_precision_ranks_all_images_together():
    truths = [truth([A], [1]), truth([], []), truth([A, C], [1, 1])]
    boxes = [found([A], [1], [0.5]), found([B], [1], [0.7]), found([C, B], [1, 1], [0.9, 0.1])]
    # Right, false, right, false; 3 true boxes.
    assert detect.average_precision(boxes, truths, 1) == pytest.approx((1 + 2 / 3) / 3)
    # A box counts in its own image only.
    assert detect.average_precision([boxes[1], boxes[0], boxes[1]], truths, 1) == 0


def test_mean_average_precision_is_over_the_labels_that_occur():
    truths = [truth([A, B], [1, 3])]
    assert detect.mean_average_precision([found([A, B], [1, 1], [0.9, 0.8])], truths) == pytest.approx(1 / 2)
    assert detect.mean_average_precision([found([A, B], [1, 3], [0.9, 0.8])], truths) == 1
    # Label 2 does not occur: what is found of it does not count.
    assert detect.mean_average_precision([found([A, B, C], [1, 3, 2], [0.8, 0.8, 0.9])], truths) == 1
    assert detect.mean_average_precision([found([A, B], [1, 3], [0.9, 0.8])], truths, overlap=1.01) == 0


def test_precision_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="found: expected one entry for each of 1 images, got 0"):
        detect.average_precision([], [truth([A], [1])], 1)
    with pytest.raises(ValueError, match="label: no image holds label 2"):
        detect.average_precision([found([], [], [])], [truth([A], [1])], 2)
    with pytest.raises(ValueError, match="truths: expected at least one true box"):
        detect.mean_average_precision([found([], [], [])], [truth([], [])])


def test_mean_dice():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    assert segment3d.mean_dice(labels, labels, 2) == 1
    assert segment3d.mean_dice(torch.zeros_like(labels), labels, 2) == 0
    # Kind 1: 1 of 2 true, 1 of 3 found; kind 2: 3 of 4 true, 3 of 3 found.
    some = torch.tensor([1, 1, 1, 0, 2, 2, 2, 0])
    assert segment3d.mean_dice(some, labels, 2) == pytest.approx((2 * 1 / 5 + 2 * 3 / 7) / 2)
    # Kind 3 is nowhere and does not count; found where it is not, it does.
    assert segment3d.mean_dice(labels, labels, 3) == 1
    assert segment3d.mean_dice(torch.tensor([3, 0, 1, 1, 2, 2, 2, 2]), labels, 3) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="background only"):
        segment3d.mean_dice(torch.zeros(4), torch.zeros(4), 2)
    with pytest.raises(ValueError, match=r"found: expected the shape of labels, \(8,\), got \(4,\)"):
        segment3d.mean_dice(torch.zeros(4), labels, 2)


def test_segmentation_loss_is_cross_entropy_and_dice():
    labels = torch.randint(0, 3, (2, 4, 4, 4), generator=seeded(0))
    sure = 50.0 * nn.functional.one_hot(labels, 3).movedim(-1, 1)
    assert segment3d.loss(sure, labels) == pytest.approx(0, abs=1e-6)
    # Sure of a label that is wrong everywhere: a cross-entropy of 50 and a Dice score of 0, but for its two ones.
    number = [int((labels == kind).sum()) for kind in range(3)]
    wrong = sure.roll(1, 1)
    dice = [1 / (number[kind - 1] + number[kind] + 1) for kind in (1, 2)]
    assert segment3d.loss(wrong, labels) == pytest.approx(50 + 1 - sum(dice) / 2, rel=1e-6)
    # Equal shares everywhere: log 3, and 2 * n/3 + 1 over 128/3 + n + 1 for each kind.
    even = segment3d.loss(torch.zeros(2, 3, 4, 4, 4), labels)
    dice = [(2 * n / 3 + 1) / (128 / 3 + n + 1) for n in number[1:]]
    assert even == pytest.approx(math.log(3) + 1 - sum(dice) / 2, rel=1e-6)


def test_detector_of_given_boxes_is_measured_in_eval_mode():
    model = detect.create_network(0)
    boxes = detect.find(model.train(), scenes.scenes(2, seeded(0)))
    assert not model.training
    assert [set(entry) for entry in boxes] == [{"boxes", "labels", "scores"}] * 2


def test_a_picture_shows_the_best_box_at_a_place():
    boxes = found([A, B, (0, 0, 10, 9), FAR, (5, 0, 15, 10)], [1, 1, 2, 1, 3], [0.4, 0.8, 0.9, 0.29, 0.3])
    assert detect.shown(boxes) == [2, 1, 4]
    assert detect.shown(found([], [], [])) == []


TINY = task_run.Settings(train=4, test=2, epochs=8, batch=4, rate=1e-2, judged=False)


def fit(task, seed):
    """Tiny training of a task's plain network on four scenes: the losses."""
    model = task.create_network(seed)
    if task is detect:
        made = scenes.scenes(TINY.train, seeded(seed))
        return task_run.fit(model, lambda numbers: detect.loss(model, [made[k] for k in numbers]), TINY, seed).losses
    made = scenes.volumes(TINY.train, seeded(seed))
    images, labels = torch.stack([v.image for v in made]), torch.stack([v.labels for v in made])
    return task_run.fit(model, lambda k: segment3d.loss(model(images[k]), labels[k]), TINY, seed).losses


@pytest.mark.parametrize("task", [detect, segment3d])
def test_a_few_steps_lower_the_loss_and_repeat(task, capsys):
    first, second = fit(task, 0), fit(task, 0)
    assert second == first
    assert len(first) == TINY.epochs
    assert first[-1] < 0.9 * first[0]
    assert f"epoch 8 of 8: loss {first[-1]:.3f}" in capsys.readouterr().out


def test_every_scene_once_an_epoch_in_another_order():
    seen = []
    model = nn.Linear(1, 1)
    settings = task_run.Settings(train=7, test=1, epochs=3, batch=2, rate=0.1)

    def loss(numbers):
        seen.append(numbers)
        return model(torch.ones(1, 1)).sum()

    assert len(task_run.fit(model, loss, settings, 0).losses) == 3
    assert [len(numbers) for numbers in seen] == [2] * 9
    epochs = [[number for numbers in seen[3 * k : 3 * k + 3] for number in numbers] for k in range(3)]
    assert all(len(set(order)) == 6 and set(order) <= set(range(7)) for order in epochs)
    assert epochs[0] != epochs[1]


def test_verdict(capsys):
    judged = dataclasses.replace(TINY, judged=True)
    assert task_run.verdict("mean Dice score", 0.8, 0.8, judged) == 0
    assert task_run.verdict("mean Dice score", 0.1, 0.8, TINY) == 0
    assert capsys.readouterr().err == ""
    assert task_run.verdict("mean Dice score", 0.7996, 0.8, judged) == 1
    assert "FAILED: mean Dice score 0.800 is below 0.8" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "stages"), [(detect, 4), (segment3d, 5)])
def test_networks_are_converted(task, stages, capsys):
    model = task.create_network(0)
    assert task_run.converted(model) is model
    attentions = [module for module in model.modules() if isinstance(module, SharedAttention)]
    assert len(attentions) == stages
    assert f"in {stages} stages" in capsys.readouterr().out


METRICS = {"detect": "Mean average precision at IoU 0.5 on", "segment3d": "Mean Dice score of the blobs in"}


def run_command(task, picture, capsys, *arguments):
    """The exit status of the command, and the metric before and after."""
    status = __main__.main(["demo", "--task", task, "--picture", str(picture), *arguments])
    printed = capsys.readouterr().out
    (values,) = re.findall(rf"^{METRICS[task]} .* (\d\.\d+) before, (\d\.\d+) after\.$", printed, re.MULTILINE)
    assert re.search(r"^\d+ ms a step of \d+ ", printed, re.MULTILINE)
    assert f"Picture: {picture}." in printed
    return status, *map(float, values)


@pytest.mark.parametrize("task", ["detect", "segment3d"])
def test_short_demo(task, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    assert run_command(task, picture, capsys, "--quick", "--epochs", "2")[0] == 0
    pixels = imread(picture)
    assert min(pixels.shape[:2]) > 300
    # The true labels at least are drawn, in their colours.
    wanted = np.array([1, 1, 1] if task == "detect" else [0x10 / 255, 0x14 / 255, 0x18 / 255])
    assert (np.abs(pixels[:, :, :3] - wanted).max(2) < 0.5 / 255).sum() > 1000


def test_default_pictures_are_the_tasks(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(detect, "run", lambda settings, picture, seed: called.append((settings, picture, seed)) or 0)
    monkeypatch.setattr(segment3d, "run", detect.run)
    for task in ("detect", "segment3d"):
        assert __main__.main(["demo", "--task", task, "--epochs", "3", "--seed", "4"]) == 0
    assert [(str(picture), seed) for _, picture, seed in called] == [("demo-detect.png", 4), ("demo-segment3d.png", 4)]
    assert [settings for settings, _, _ in called] == [
        dataclasses.replace(task.FULL, epochs=3) for task in (detect, segment3d)
    ]


@pytest.mark.parametrize(
    ("task", "module", "extra"),
    [("detect", "torchvision", "networks"), ("segment3d", "monai", "networks"), ("segment3d", "matplotlib", "demo")],
)
def test_missing_package_is_named(monkeypatch, task, module, extra):
    real = builtins.__import__

    def without_module(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for part in ("detect", "segment3d"):
        monkeypatch.delitem(sys.modules, f"dia_kernels.tasks.{part}", raising=False)
        monkeypatch.delattr(f"dia_kernels.tasks.{part}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_module)
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["demo", "--task", task])
    assert stopped.value.code == f'demo: needs {module}, which is not here: pip install "dia_kernels[{extra}]"'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "fly"], "--task: invalid choice: 'fly'"),
        (["--task", "detect", "--epochs", "0"], "--epochs: expected a whole number, at least 1, got '0'"),
        (["--task", "detect", "--picture", "a.txt"], "--picture: expected a name that ends in .png, .pdf, .svg"),
        (["--task", "segment3d", "--picture", "nowhere/a.png"], "--picture: the folder 'nowhere' does not exist"),
    ],
)
def test_wrong_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("task", "least", "most_before"), [("detect", 0.8, 0.1), ("segment3d", 0.9, 0.3)])
def test_full_demo(task, least, most_before, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    status, before, after = run_command(task, picture, capsys)
    assert status == 0
    assert before < most_before
    assert after > least
    assert min(imread(picture).shape[:2]) > 300
