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
from dia_kernels.train import images

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = demo.Settings(epochs=1, timed_rounds=1, judge_accuracy=False)


@pytest.fixture(scope="module")
def digits():
    return images.load("digits")


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


def test_variants_with_attention_begin_with_the_same_weights():
    eager, ours = (demo.create_network(variant, seed=5).state_dict() for variant in (demo.EAGER, demo.OURS))
    assert eager.keys() == ours.keys()
    assert all(torch.equal(eager[name], ours[name]) for name in eager)
    other = demo.create_network(demo.OURS, seed=6).state_dict()
    assert not torch.equal(other["stem.0.weight"], ours["stem.0.weight"])


def test_variants_are_what_they_are_called():
    def attention_backends(variant):
        return [m.backend for m in demo.create_network(variant, 0).modules() if isinstance(m, SharedAttention)]

    assert attention_backends(demo.PLAIN) == []
    assert attention_backends(demo.EAGER) == ["reference"] * 3
    assert attention_backends(demo.OURS) == [None] * 3


def test_training_repeats():
    first, second = (demo.train(demo.OURS, epochs=1, seed=0) for _ in range(2))
    assert len(first.losses) == 23
    assert second.losses == first.losses
    assert second.accuracy == first.accuracy


def test_saved_bytes_of_a_known_graph():
    batch = torch.ones(100, 1, 16, 16)[:10]
    weight = nn.Parameter(torch.ones(1))

    class Twice(nn.Module):
        """Keeps ``images * weight`` for each of two functions, which share one storage."""

        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, images):
            y = images * self.weight
            return y.square() + y.reshape(10, -1).square().sum()

    assert demo.saved_bytes(Twice(), batch) == 10 * 16 * 16 * 4


def test_attention_map_is_the_mean_state_of_the_last_stage(digits):
    model = demo.create_network(demo.OURS, 0)
    batch = torch.stack([digits.test[k][0] for k in range(8)])
    scales = demo.attention_map(model, batch)
    assert scales.shape == (64, 3)
    model.eval()
    x, state = model.stages[:2](model.stem(batch)), None
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
    judged = demo.Settings(TINY.epochs, TINY.timed_rounds, judge_accuracy=True)
    network = demo.create_network(demo.OURS, 0)
    monkeypatch.setattr(demo, "train", lambda *_: demo.Trained(network, [1.0, 0.5], 0.949))
    assert demo.run(judged, tmp_path / "a.png") == 1
    assert f"FAILED: test accuracy below 95%: {demo.EAGER}; {demo.OURS}" in capsys.readouterr().err
    monkeypatch.setattr(demo, "train", lambda *_: demo.Trained(network, [1.0, 0.5], 0.95))
    assert demo.run(judged, tmp_path / "b.png") == 0
    assert "FAILED" not in capsys.readouterr().err


def test_missing_library_is_said(monkeypatch, digits, capsys):
    monkeypatch.setattr(backends, "missing", lambda name: None if name == "reference" else "it was never built")
    demo._announce(digits, epochs=1)
    assert "No fused kernels: it was never built. Both runs are plain PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "module"),
    [("demo", "matplotlib"), ("demo", "lightning"), ("train", "lightning"), ("train", "torchvision")],
)
def test_missing_extra_is_named(monkeypatch, command, module):
    real = builtins.__import__

    def without_module(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for part in ("demo", "train.images", "train.run", "train.classifier", "train.loader"):
        monkeypatch.delitem(sys.modules, f"dia_kernels.{part}", raising=False)
        monkeypatch.delattr(f"dia_kernels.{part}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_module)
    with pytest.raises(SystemExit) as stopped:
        __main__.main([command])
    said = f'{command}: needs {module}, which is not here: pip install "dia_kernels[{command}]"'
    assert stopped.value.code == said


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
