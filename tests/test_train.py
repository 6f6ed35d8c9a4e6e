"""Training: images, order, settings, and a run that goes on to the same bits after it was killed."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from dia_kernels import __main__, models
from dia_kernels.train import images, run
from dia_kernels.train.images import DataError, Images
from dia_kernels.train.launch import Launch
from dia_kernels.train.loader import Order, ResumableLoader
from dia_kernels.train.recipes import RECIPES, Recipe, recipe_of
from dia_kernels.train.settings import read_run, write_run

pytestmark = pytest.mark.usefixtures("one_thread")


# --- images ------------------------------------------------------------------------------------------


def write_idx(path: Path, values: torch.Tensor, compress: bool = False) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = bytes((0, 0, 8, values.ndim)) + sizes + values.numpy().tobytes()
    if compress:
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content)
    path.write_bytes(content)


def write_fashion(folder: Path, train: int, test: int) -> Path:
    """A folder as Fashion-MNIST's; half of the files are gzipped."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("t10k", test)):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", pixels, compress=part == "train")
        write_idx(folder / f"{part}-labels-idx1-ubyte", (torch.arange(count) % 10).byte(), compress=part == "t10k")
    return folder


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    return write_fashion(tmp_path, 20, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes in files, red and blue ones."""
    for part in ("train", "val"):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(3):
                Image.new("RGB", (20 + k, 24), colour).save(tmp_path / part / name / f"{k}.png")
    return tmp_path


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as CIFAR-10's with a few images, whose checksums torchvision does not ask for."""
    base = tmp_path / images.datasets.CIFAR10.base_folder
    base.mkdir()
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        data = torch.randint(0, 256, (4, 3072), dtype=torch.uint8).numpy()
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 9, 3, 5]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}))
    monkeypatch.setattr(images.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(images.datasets.cifar, "check_integrity", lambda *_: True)
    return tmp_path


def test_digits():
    data = images.load("digits")
    assert (len(data.train), len(data.test), data.num_classes, data.in_channels) == (1437, 360, 10, 1)
    image, label = data.test[0]
    assert image.shape == (1, 16, 16)
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert isinstance(label, int)
    # Stratified: each digit is a tenth of both parts, up to the set's own imbalance.
    for part in (data.train, data.test):
        labels = torch.tensor(part.source.labels)
        assert (labels.bincount(minlength=10) / len(labels)).sub(0.1).abs().max() < 0.005
    train = {image.numpy().tobytes() for image in data.train.source.images}
    assert not any(image.numpy().tobytes() in train for image in data.test.source.images)


def test_fashion(fashion):
    data = images.load("fashion", fashion)
    assert (len(data.train), len(data.test), data.num_classes, data.in_channels) == (20, 10, 10, 1)
    image, label = data.test[7]
    expected = images.read_idx(fashion, "t10k-images-idx3-ubyte", 3)[7][None].float() / 255
    torch.testing.assert_close(image, (expected - 0.2860) / 0.3530)
    assert label == 7
    assert data.train[0][0].shape == (1, 28, 28)


def test_cifar10(cifar10):
    data = images.load("cifar10", cifar10)
    assert (len(data.train), len(data.test), data.num_classes, data.in_channels) == (20, 4, 10, 3)
    image, label = data.test[1]
    assert image.shape == (3, 32, 32)
    assert label == 9
    raw = pickle.loads((cifar10 / "cifar-10-batches-py" / "test_batch").read_bytes())["data"][1].reshape(3, 32, 32)
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    deviation = torch.tensor([0.2023, 0.1994, 0.2010])[:, None, None]
    torch.testing.assert_close(image, (torch.from_numpy(raw.copy()).float() / 255 - mean) / deviation)


def test_image_folder(folder):
    data = images.load("folder", folder, size=14)
    assert (len(data.train), len(data.test), data.num_classes, data.in_channels) == (6, 6, 2, 3)
    image, label = data.test[5]
    assert image.shape == data.train[5][0].shape == (3, 14, 14)
    assert label == 1
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image, red[:, None, None].expand_as(image))


def test_without_augmentation_training_images_are_as_they_are(fashion, folder):
    for name, where in (("digits", None), ("fashion", fashion), ("folder", folder)):
        data = images.load(name, where, size=16, augment=False)
        assert torch.equal(data.train[0][0], data.train[len(data.train)][0])
        changed, count = images.load(name, where, size=16).train, len(data.train)
        assert any(not torch.equal(changed[k][0], changed[k + count][0]) for k in range(count))


def test_so_many_of_the_images_the_same_for_every_seed(fashion, folder):
    """Those of a folder are sorted by class: some of them are not the first."""
    whole, some, other = (images.load("fashion", fashion, images=n, seed=s) for n, s in ((None, 0), (12, 0), (12, 1)))
    assert (len(some.train), len(some.test)) == (12, 6)
    assert len({some.train.source[k][1] for k in range(12)}) > 5
    for part, of_whole in ((some.train, whole.train), (some.test, whole.test)):
        kept = [image for image, _ in part.source]
        assert all(any(torch.equal(image, known) for known, _ in of_whole.source) for image in kept)
        assert not any(torch.equal(a, b) for k, a in enumerate(kept) for b in kept[:k])
    for a, b in ((some.train, other.train), (some.test, other.test)):
        assert all(torch.equal(one, two) for (one, _), (two, _) in zip(a.source, b.source, strict=True))
    more = images.load("fashion", fashion, images=1000)
    assert (len(more.train), len(more.test)) == (20, 10)
    labels = [label for _, label in images.load("folder", folder, size=14, images=3).train.source]
    assert len(labels) == 3
    assert set(labels) == {0, 1}


def test_fashion_of_debian_needs_no_folder(fashion, monkeypatch):
    monkeypatch.setattr(images, "FASHION_OF_DEBIAN", fashion)
    assert images.installed("fashion")
    assert len(images.load("fashion").train) == 20
    monkeypatch.setattr(images, "FASHION_OF_DEBIAN", fashion / "nowhere")
    assert images.installed("digits")
    assert not images.installed("fashion")
    assert not images.installed("cifar10")
    with pytest.raises(ValueError, match="folder: expected the folder that holds the files of 'fashion', got None"):
        images.load("fashion")


def test_a_change_is_a_function_of_seed_epoch_and_image():
    source = [(torch.rand(1, 16, 16), 0), (torch.rand(1, 16, 16), 1)]
    change = v2.RandomCrop(16, padding=4)
    first, same, other = (Images(source, change, None, seed) for seed in (0, 0, 1))
    state = torch.get_rng_state()
    looks = [first[key][0] for key in range(8)]
    assert torch.equal(torch.get_rng_state(), state), "the process's generator has moved"
    assert all(torch.equal(same[key][0], looks[key]) for key in reversed(range(8)))
    assert not all(torch.equal(looks[key], looks[key % 2]) for key in range(8)), "the same look in every epoch"
    assert not all(torch.equal(other[key][0], looks[key]) for key in range(8)), "the same look for every seed"
    assert [first[key][1] for key in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "t10k-images-idx3-ubyte").unlink(), r"t10k-images-idx3-ubyte: no such file, and none with .gz"),
        (lambda f: truncate(f / "t10k-images-idx3-ubyte"), r"expected 7856 bytes for sizes \[10, 28, 28\], got 7855"),
        (
            lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b""),
            "not an IDX file of unsigned bytes in 3 dimensions",
        ),
        (lambda f: truncate(f / "train-images-idx3-ubyte.gz"), "damaged gzip file"),
        (lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"text"), "damaged gzip file"),
        (lambda f: write_idx(f / "t10k-images-idx3-ubyte", torch.zeros(9, 28, 28).byte()), "9 images but 10 labels"),
        (lambda f: write_idx(f / "t10k-images-idx3-ubyte", torch.zeros(10, 9, 28).byte()), "expected images of 28x28"),
        (lambda f: write_idx(f / "train-labels-idx1-ubyte", torch.full((20,), 10).byte()), "labels 0 to 9, got 10"),
    ],
)
def test_damaged_idx_files(fashion, damage, message):
    damage(fashion)
    with pytest.raises(DataError, match=message):
        images.load("fashion", fashion)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name} is not there, or damaged; expected cifar-100?.*--download"):
        images.load(name, tmp_path)


def test_damaged_cifar(tmp_path):
    base = tmp_path / images.datasets.CIFAR10.base_folder
    base.mkdir()
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]:
        (base / name).write_bytes(b"not what it was")
    with pytest.raises(DataError, match="cifar10 is not there, or damaged"):
        images.load("cifar10", tmp_path)


def test_damaged_image_folders(folder):
    broken = folder / "train" / "red" / "0.png"
    broken.write_bytes(broken.read_bytes()[:50])
    data = images.load("folder", folder, size=14)
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        data.train[3]
    for path in (folder / "val" / "red").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"val: .*red"):
        images.load("folder", folder)
    (folder / "val" / "red").rmdir()
    with pytest.raises(DataError, match=r"only in one of train and val: \['red'\]"):
        images.load("folder", folder)
    (folder / "val").rename(folder / "tests")
    with pytest.raises(DataError, match=r"no such folder; expected train/<class>/ and test/<class>/"):
        images.load("folder", folder)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: images.load("digits", images=1), ValueError, "images: expected at least 2, got 1"),
        (lambda: images.load("mnist"), ValueError, "data: expected one of digits, .*, got 'mnist'"),
        (lambda: images.load("cifar10"), ValueError, "folder: expected the folder that holds the files of 'cifar10'"),
        (lambda: images.load("fashion", Path("/nowhere")), DataError, "/nowhere: no such folder"),
        (lambda: Order(10, 3, 0, processes=2), ValueError, r"batch_size: expected a multiple of 2 \(the processes\)"),
        (lambda: Order(1, 2, 0, processes=2), ValueError, "images: expected at least 2"),
        (lambda: run.Settings(network="vgg"), ValueError, "network: expected one of resnet20"),
        (lambda: run.Settings(precision="8-bit"), ValueError, "precision: expected one of 32-true"),
        (lambda: run.Settings(epochs=0), ValueError, "epochs: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- order -------------------------------------------------------------------------------------------


def test_order_visits_every_image_once_an_epoch_and_anew_in_each():
    order = Order(103, 8, seed=3)
    assert len(order) == 13
    epochs = [[key for batch in order for key in batch] for _ in range(3)]
    for epoch, keys in enumerate(epochs):
        assert sorted(keys) == list(range(epoch * 103, (epoch + 1) * 103))
    assert [key % 103 for key in epochs[0]] != [key % 103 for key in epochs[1]]
    assert list(Order(103, 8, seed=3)) == list(Order(103, 8, seed=3))
    assert list(Order(103, 8, seed=4)) != list(Order(103, 8, seed=3))


@pytest.mark.parametrize("images_", [64, 67, 103])
def test_processes_share_each_batch_evenly(images_):
    whole = Order(images_, 8, seed=0)
    shares = [list(Order(images_, 8, seed=0, rank=rank, processes=4)) for rank in range(4)]
    assert len({tuple(map(len, share)) for share in shares}) == 1
    assert all(len(share) == len(Order(images_, 8, 0, 0, 4)) for share in shares)
    for number, batch in enumerate(whole):
        dealt = {key for share in shares if number < len(share) for key in share[number]}
        assert dealt <= set(batch)
        assert len(dealt) == len(batch) // 4 * 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_loader_goes_on_where_it_stood(stop, workers):
    def make():
        source = [(torch.full((1, 4, 4), float(k)), k) for k in range(19)]
        return ResumableLoader(Images(source, v2.RandomCrop(4, padding=2), None, 0), Order(19, 4, 0), workers)

    def batches(loader, count):
        while True:
            for batch in loader:
                yield batch
                count -= 1
                if count == 0:
                    return

    expected = list(batches(make(), 12))
    first = make()
    seen = list(batches(first, stop))
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    seen += batches(second, 12 - stop)
    for found, true in zip(seen, expected, strict=True):
        assert torch.equal(found[0], true[0])
        assert torch.equal(found[1], true[1])


def test_loading_leaves_the_generator_of_dropout_alone():
    state = torch.get_rng_state()
    data = images.load("digits")
    learn, test = run.loaders(run.Settings(), data)
    assert isinstance(test, DataLoader)
    next(iter(learn)), next(iter(test))
    assert torch.equal(torch.get_rng_state(), state)


# --- recipes and settings ------------------------------------------------------------------------------


def test_recipes_of_the_papers():
    assert set(RECIPES) == set(models.names())
    assert recipe_of("resnet14") == RECIPES["resnet20"]
    assert recipe_of("wrn16_1") == RECIPES["wrn52_4"]
    assert recipe_of("preresnet20") == RECIPES["preresnet164"]
    assert recipe_of("resnext20_2x8") == RECIPES["resnext101_8x32"]
    assert RECIPES["resnet164"] == Recipe(180, (60, 120), 0.1, 0.1, 1e-4, 0.9, 128)
    assert RECIPES["preresnet164"] == Recipe(164, (81, 122), 0.1, 0.1, 1e-4, 0.9, 128)
    assert RECIPES["wrn52_4"] == Recipe(200, (80, 120, 160), 0.2, 0.1, 5e-4, 0.9, 128)
    assert RECIPES["resnext101_8x32"] == Recipe(300, (150, 225), 0.1, 0.1, 5e-4, 0.9, 128)


def test_settings_change_the_recipe():
    recipe = run.Settings(epochs=18, batch_size=32, learning_rate=0.5).recipe()
    assert recipe == Recipe(18, (6, 12), 0.1, 0.5, 1e-4, 0.9, 32)
    assert run.Settings(network="wrn52_4").recipe() == RECIPES["wrn52_4"]


def test_optimiser_and_schedule_follow_the_recipe():
    classifier, _ = run.build(run.Settings(epochs=6, learning_rate=0.4))
    (optimizer,), (schedule,) = classifier.configure_optimizers()
    group = optimizer.param_groups[0]
    assert len(group["params"]) == len(list(classifier.network.parameters()))
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    rates = []
    for _ in range(6):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.004, 0.004])


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = run.build(run.Settings(seed=5))[0].state_dict()
    torch.manual_seed(2)
    again, other = (run.build(run.Settings(seed=seed))[0].state_dict() for seed in (5, 6))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["network.stem.0.weight"], other["network.stem.0.weight"])


# --- runs ----------------------------------------------------------------------------------------------

SHORT = {"data": "fashion", "epochs": 2, "batch_size": 20, "checkpoint_every": 2}  # three steps an epoch

#: Trains in a folder and kills itself, as a machine that loses power, before its step number `at`.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from dia_kernels.train import run
torch.set_num_threads(1)
folder, at, settings = Path(sys.argv[1]), int(sys.argv[2]), run.Settings(**eval(sys.argv[3]))
step = run.Classifier.training_step
def training_step(self, batch, index):
    if self.global_step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)
run.Classifier.training_step = training_step
run.train(settings, folder, progress=False)
"""


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)


def assert_same_end(folder: Path, other: Path) -> None:
    """Weights, buffers and momenta are the same bits."""
    a, b = checkpoint(folder), checkpoint(other)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for key, state in a["optimizer_states"][0]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer_states"][0]["state"][key]["momentum_buffer"]), key


def killed(folder: Path, at: int, settings: dict) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(at), repr(settings)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Settings of a run of six steps."""
    return {**SHORT, "folder": str(write_fashion(tmp_path_factory.mktemp("fashion"), 60, 20))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, short):
    """A run that nothing has disturbed, and its result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = run.train(run.Settings(**short), folder, progress=False)
    torch.set_num_threads(threads)
    return folder, result


def test_a_run_leaves_checkpoints_logs_and_settings(whole):
    folder, result = whole
    assert result.steps == 6
    assert set(result.metrics) == {"loss", "test_loss", "test_accuracy"}
    assert json.loads((folder / "run.json").read_text())["settings"]["batch_size"] == 20
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert any((folder / "logs" / "version_0").glob("events.out.tfevents.*"))
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracies = [float(row["test_accuracy"]) for row in rows if row["test_accuracy"]]
    assert len(accuracies) == 2
    assert accuracies[-1] == pytest.approx(result.metrics["test_accuracy"])
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=False)["state_dict"]
    assert best.keys() == checkpoint(folder)["state_dict"].keys()


def test_channels_last_is_the_same_network_in_another_layout(short):
    settings = run.Settings(**short, precision="64-true")
    seen, losses = [], []
    for channels_last in (False, True):
        classifier, data = run.build(replace(settings, channels_last=channels_last))
        learn, _ = run.loaders(settings, data)
        batch, labels = next(iter(learn))
        classifier.network.stages[1].register_forward_hook(lambda module, args, maps: seen.append(maps))
        losses.append(torch.nn.functional.cross_entropy(classifier(batch.double()), labels))
        losses[-1].backward()
    assert not seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


def test_a_run_of_so_many_images(short):
    _, data = run.build(run.Settings(**short, images=12))
    assert (len(data.train), len(data.test)) == (12, 6)


def test_loss_falls():
    """The same batch, several times: the parts are connected."""
    settings = run.Settings(batch_size=16)
    classifier, data = run.build(settings)
    learn, _ = run.loaders(settings, data)
    batch = next(iter(learn))
    (optimizer,), _ = classifier.configure_optimizers()
    classifier.log = lambda *args, **options: None
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = classifier.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Steps 0 to 5, three an epoch, a checkpoint after each second: killed before 3 it goes on within the first epoch,
# before 5 within the second.
@pytest.mark.parametrize("at", [pytest.param(3, marks=pytest.mark.slow), 5])
def test_a_killed_run_goes_on_to_the_same_bits(whole, short, tmp_path, at):
    killed(tmp_path / "run", at, short)
    assert checkpoint(tmp_path / "run")["global_step"] == at - 1
    result = run.train(run.Settings(**short), tmp_path / "run", resume=True, progress=False)
    assert_same_end(tmp_path / "run", whole[0])
    assert result.metrics == whole[1].metrics


@pytest.mark.slow
def test_killed_at_the_end_of_an_epoch(whole, short, tmp_path):
    settings = {**short, "checkpoint_every": 3}
    killed(tmp_path / "run", 3, settings)
    assert checkpoint(tmp_path / "run")["global_step"] == 3
    run.train(run.Settings(**settings), tmp_path / "run", resume=True, progress=False)
    assert_same_end(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(whole, short, tmp_path):
    killed(tmp_path / "run", 1, short)
    run.train(run.Settings(**short), tmp_path / "run", resume=True, progress=False)
    assert_same_end(tmp_path / "run", whole[0])


def test_any_number_of_workers_gives_the_same_bits(whole, short, tmp_path):
    run.train(run.Settings(**short), tmp_path / "run", Launch(workers=2), progress=False)
    assert_same_end(tmp_path / "run", whole[0])


@pytest.mark.parametrize("part", ["block", "stage"])
def test_what_is_computed_again_gives_the_same_bits(whole, short, tmp_path, part, monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    result = run.train(run.Settings(**short), tmp_path / "run", Launch(recompute=part), progress=False)
    assert len(calls) == result.steps * {"block": 9, "stage": 3}[part]
    assert_same_end(tmp_path / "run", whole[0])
    calls.clear()
    result.network(torch.randn(2, 1, 16, 16))
    assert calls == []


@pytest.mark.slow
def test_dropout_in_channels_last_goes_on_to_the_same_bits(short, tmp_path):
    settings = {**short, "network": "wrn52_4", "channels_last": True}
    killed(tmp_path / "killed", 5, settings)
    for name in ("killed", "whole"):
        run.train(run.Settings(**settings), tmp_path / name, resume=name == "killed", progress=False)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_images(short, tmp_path):
    options = ["--data", "fashion", "--folder", short["folder"], "--epochs", "1", "--batch-size", "20"]
    command = [sys.executable, "-m", "dia_kernels", "train", "--no-progress", *options]
    done = subprocess.run(
        [*command, "--processes", "2", "--output", str(tmp_path / "two")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps done") == 1
    one = run.train(run.Settings(**short | {"epochs": 1}), tmp_path / "one", progress=False)
    assert one.steps == checkpoint(tmp_path / "two")["global_step"] == 3
    # Batch norm sees half a batch in each process: the weights are alike, not equal.
    found, expected = (checkpoint(tmp_path / name)["state_dict"]["network.stem.0.weight"] for name in ("two", "one"))
    fresh = run.build(run.Settings(**short))[0].network.stem[0].weight
    assert 0 < (found - expected).norm() < 0.5 * (expected - fresh).norm()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(short, tmp_path, precision):
    settings = run.Settings(**short | {"epochs": 1}, precision=precision)
    result = run.train(settings, tmp_path / "run", progress=False)
    assert result.steps == 3
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert {p.dtype for p in result.network.parameters()} == {wide}


def test_a_finished_run_has_nothing_left_to_do(whole, short):
    folder, _ = whole
    again = run.train(run.Settings(**short), folder, resume=True, progress=False)
    assert again.steps == 6


def test_command_line(whole, tmp_path, capsys):
    folder, _ = whole

    def command(*arguments):
        status = __main__.main(["train", "--no-progress", *map(str, arguments)])
        return status, capsys.readouterr()

    status, said = command("--epochs", 1, "--batch-size", 720, "--attention", "none", "--output", tmp_path / "run")
    assert status == 0
    assert f"{tmp_path / 'run'}: 2 steps done." in said.out
    assert "test_accuracy" in said.out
    assert read_run(tmp_path / "run") == (run.Settings(epochs=1, batch_size=720, attention=None), Launch())
    status, said = command("--resume", tmp_path / "run", "--recompute", "block")
    assert (status, read_run(tmp_path / "run")[1].recompute) == (0, "block")
    status, said = command("--resume", tmp_path / "run", "--recompute", "none")
    assert (status, read_run(tmp_path / "run")[1].recompute) == (0, None)
    for arguments, message in (
        (("--output", folder), "holds a run already; resume it, or name another folder"),
        (("--resume", folder, "--epochs", 3), "with --resume the settings are the run's own; leave out epochs"),
        (("--resume", tmp_path), "no run to go on with"),
        (("--output", tmp_path / "run", "--continue"), "has other settings (attention, epochs, batch_size)"),
        (("--accumulate", 3, "--output", tmp_path / "x"), "batch_size: expected a multiple of 3"),
        (("--data", "cifar10"), "folder: expected the folder that holds the files of 'cifar10'"),
        (("--data", "fashion", "--folder", tmp_path), "train-images-idx3-ubyte: no such file"),
        (("--precision", "8"), "precision: expected one of"),
        (("--backend", "tpu", "--output", tmp_path / "x"), "backend: expected None or one of"),
    ):
        status, said = command(*arguments)
        assert status == 1
        assert said.err.startswith("train: ")
        assert message in said.err
        assert said.err.count("\n") == 1
    assert not (tmp_path / "x").exists(), "a run that cannot begin has left a folder"
    (tmp_path / "run" / "run.json").write_text("{")
    status, said = command("--resume", tmp_path / "run")
    assert status == 1
    assert "run.json: damaged" in said.err


def test_settings_survive_their_file_and_the_command_line(tmp_path, monkeypatch):
    settings = run.Settings(network="resnet14", attention="eca", shared=True, stages=(1, 2), carry_state=False)
    write_run(tmp_path, settings, Launch())
    assert read_run(tmp_path) == (settings, Launch())
    asked = []
    monkeypatch.setattr(
        run, "train", lambda settings, *rest, **options: asked.append(settings) or run.Result(None, 0, {})
    )
    arguments = ["train", "--network", "resnet14", "--attention", "eca", "--shared", "--stages", "1", "2", "--no-state"]
    assert __main__.main([*arguments, "--output", str(tmp_path / "new")]) == 0
    assert asked == [settings]
