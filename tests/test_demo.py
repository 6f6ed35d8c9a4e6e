"""``python -m dia_kernels demo`` in a short form, and its parts."""

import builtins
import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from dia_kernels import __main__, backends, demo
from dia_kernels.attention import SharedAttention

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = demo.Settings(epochs=1, train_images=demo.BATCH, timed_rounds=1, judge_accuracy=False)


@pytest.fixture(scope="module")
def digits():
    return demo.load_data()


@pytest.fixture(scope="module")
def two_batches():
    return demo.load_data(2 * demo.BATCH)


def test_short_demo(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    assert __main__.main(["demo", "--quick", "--epochs", "1", "--seed", "3", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    for variant in demo.VARIANTS:
        assert len(re.findall(rf"^{variant} .* \d+\.\d+ .* \d+\.\d\dx .* \d+\.\d$", printed, re.MULTILINE)) == 1
    assert len(re.findall(r"\d+\.\d %", printed)) == 2
    assert str(picture) in printed
    pixels = imread(picture)
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 500
    for colour in demo._COLOURS.values():
        wanted = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        assert (np.abs(pixels[:, :, :3] - wanted).max(2) < 0.5 / 255).sum() > 1000, f"no bar of colour {colour}"


def test_data(digits):
    assert digits.train_images.shape == (1437, 1, 16, 16)
    assert digits.test_images.shape == (360, 1, 16, 16)
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    # Stratified: each digit is a tenth of both parts, up to the set's own imbalance.
    for labels in (digits.train_labels, digits.test_labels):
        assert (labels.bincount(minlength=10) / len(labels)).sub(0.1).abs().max() < 0.005
    again = demo.load_data()
    assert torch.equal(digits.train_images, again.train_images)
    assert torch.equal(digits.test_labels, again.test_labels)


def test_no_image_is_in_both_parts(digits):
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)


def test_variants_with_attention_begin_with_the_same_weights():
    eager, ours = (demo.create_network(variant, seed=5).state_dict() for variant in (demo.EAGER, demo.OURS))
    assert eager.keys() == ours.keys()
    assert all(torch.equal(eager[name], ours[name]) for name in eager)
    other = demo.create_network(demo.OURS, seed=6).state_dict()
    assert not torch.equal(other["conv.weight"], ours["conv.weight"])


def test_variants_are_what_they_are_called():
    def attention_backends(variant):
        return [m.backend for m in demo.create_network(variant, 0).modules() if isinstance(m, SharedAttention)]

    assert attention_backends(demo.PLAIN) == []
    assert attention_backends(demo.EAGER) == ["reference"] * 3
    assert attention_backends(demo.OURS) == [None] * 3


def test_training_lowers_the_loss_and_repeats(two_batches):
    # Both exist before either is trained: making one seeds the global generator, which training must not need.
    networks = [demo.create_network(demo.OURS, 0) for _ in range(2)]
    first, second = (demo.train(network, two_batches, epochs=8, seed=0, title="test") for network in networks)
    assert len(first) == 16
    assert sum(first[-4:]) < 0.9 * sum(first[:4])
    assert second == first


def test_evaluate_counts_right_answers(digits):
    class Oracle(nn.Module):
        def forward(self, images):
            answers = digits.test_labels.clone()
            answers[:90] = (answers[:90] + 1) % 10
            return nn.functional.one_hot(answers, 10)

    assert demo.evaluate(Oracle(), digits) == 0.75


def test_saved_bytes_of_a_known_graph():
    images = torch.ones(100, 1, 16, 16)[:10]
    weight = nn.Parameter(torch.ones(1))

    class Twice(nn.Module):
        """Keeps ``images * weight`` for each of two functions, which share one storage."""

        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, images):
            y = images * self.weight
            return y.square() + y.reshape(10, -1).square().sum()

    assert demo.saved_bytes(Twice(), images) == 10 * 16 * 16 * 4


def test_attention_map_is_the_mean_state_of_the_last_stage(two_batches):
    model = demo.create_network(demo.OURS, 0)
    images = two_batches.test_images[:8]
    scales = demo.attention_map(model, images)
    assert scales.shape == (64, 3)
    model.eval()
    x, state = model.stages[:2](torch.relu(model.bn(model.conv(images)))), None
    for block, mean in zip(model.stages[2].blocks, scales.T, strict=True):
        x, state = block(x, model.stages[2].attention, state)
        assert torch.equal(state[0].mean(0), mean)
    assert not any(module._forward_hooks for module in model.modules())


def test_table():
    accuracies = {demo.EAGER: 0.5, demo.OURS: 0.9876}
    seconds = {demo.PLAIN: 0.010, demo.EAGER: 0.015, demo.OURS: 0.011}
    saved = {demo.PLAIN: 2**20, demo.EAGER: 3 * 2**20, demo.OURS: 2**21}
    lines = demo.table(accuracies, seconds, saved).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [re.split(r" {2,}", line) for line in (lines[0], *lines[2:])] == [
        ["variant", "test accuracy", "ms a step", "to no attention", "MiB kept for backward"],
        [demo.PLAIN, "not trained", "10.0", "1.00x", "1.0"],
        [demo.EAGER, "50.0 %", "15.0", "1.50x", "3.0"],
        [demo.OURS, "98.8 %", "11.0", "1.10x", "2.0"],
    ]


def test_low_accuracy_fails(monkeypatch, tmp_path, capsys):
    judged = demo.Settings(TINY.epochs, TINY.train_images, TINY.timed_rounds, judge_accuracy=True)
    monkeypatch.setattr(demo, "evaluate", lambda model, digits: 0.949)
    assert demo.run(judged, tmp_path / "a.png") == 1
    assert f"FAILED: test accuracy below 95%: {demo.EAGER}; {demo.OURS}" in capsys.readouterr().err
    monkeypatch.setattr(demo, "evaluate", lambda model, digits: 0.95)
    assert demo.run(judged, tmp_path / "b.png") == 0
    assert "FAILED" not in capsys.readouterr().err


def test_missing_library_is_said(monkeypatch, two_batches, capsys):
    monkeypatch.setattr(backends, "missing", lambda name: None if name == "reference" else "it was never built")
    demo._announce(two_batches, epochs=1)
    assert "No fused kernels: it was never built. Both runs are plain PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["matplotlib", "sklearn", "tqdm"])
def test_missing_extra_is_named(monkeypatch, capsys, module):
    real = builtins.__import__

    def without_module(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "dia_kernels.demo")
    monkeypatch.delattr("dia_kernels.demo")
    monkeypatch.setattr(builtins, "__import__", without_module)
    assert __main__.main(["demo"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"The demo needs {module}")
    assert 'pip install "dia_kernels[demo]"' in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--epochs", "0"], "--epochs: expected a whole number, at least 1, got '0'"),
        (["demo", "--epochs", "two"], "--epochs: expected a whole number, at least 1, got 'two'"),
        (["demo", "--picture", "nowhere/a.png"], "--picture: the folder 'nowhere' does not exist"),
        (["demo", "--picture", "a.txt"], "--picture: expected a name that ends in .png, .pdf, .svg, got 'a.txt'"),
    ],
)
def test_wrong_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
