"""The demo: a small DIA network learns to read handwritten digits, through the fused kernels and without.

``python -m dia_kernels demo`` trains ResNet-20 with Dense-and-Implicit Attention twice from the same
seed (fused kernels, plain PyTorch), times a training step with and without attention, prints one
table and saves one picture.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from . import backends, models
from .attention import SharedAttention
from .models import Network
from .train import images as train_images
from .train import run as train_run

REQUIRED_ACCURACY = 0.95
BATCH = 64
WARM_UP_ROUNDS = 2

PLAIN, EAGER, OURS = "no attention", "DIA, eager PyTorch", "DIA, dia_kernels"
#: Arguments of the network behind each variant.
VARIANTS: dict[str, dict] = {
    PLAIN: {"attention": None},
    EAGER: {"attention": "dia", "backend": "reference", "fold_norm": False},
    OURS: {"attention": "dia"},
}
_COLOURS = {PLAIN: "#8a8f98", EAGER: "#e07b39", OURS: "#1f5fa8"}


@dataclass(frozen=True)
class Settings:
    """How much the demo does."""

    epochs: int
    timed_rounds: int
    judge_accuracy: bool


FULL = Settings(epochs=10, timed_rounds=25, judge_accuracy=True)
QUICK = Settings(epochs=1, timed_rounds=2, judge_accuracy=False)


@dataclass(frozen=True)
class Trained:
    """A network after training, its loss at each step, and its accuracy on the test digits, in [0, 1]."""

    network: Network
    losses: list[float]
    accuracy: float


class LossHistory(Callback):
    """Notes the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())


def create_network(variant: str, seed: int) -> Network:
    """ResNet-20 for the digits. Variants with attention have the same weights for the same seed."""
    torch.manual_seed(seed)
    return models.create("resnet20", num_classes=10, in_channels=1, **VARIANTS[variant])


def train(variant: str, epochs: int, seed: int) -> Trained:
    """Trains ResNet-20 on the digits as ``python -m dia_kernels train`` does, with a progress bar."""
    settings = train_run.Settings(epochs=epochs, batch_size=BATCH, seed=seed, **VARIANTS[variant])
    history = LossHistory()
    with tempfile.TemporaryDirectory() as folder:
        result = train_run.train(settings, Path(folder), callbacks=[history])
    return Trained(result.network, history.losses, result.metrics["test_accuracy"])


def train_step(model: Network, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step of training."""
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def time_steps(variants: Mapping[str, Network], images: Tensor, labels: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a training step of each network. Trains them a little."""
    optimizers = {
        name: torch.optim.SGD(model.train().parameters(), 0.01, momentum=0.9) for name, model in variants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    # The variants take turns, so that a slow moment of the machine meets all of them.
    for _ in range(WARM_UP_ROUNDS + rounds):
        for name, model in variants.items():
            start = time.perf_counter()
            train_step(model, optimizers[name], images, labels)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[WARM_UP_ROUNDS:]) for name, taken in seconds.items()}


def saved_bytes(model: torch.nn.Module, images: Tensor) -> int:
    """Bytes that one forward pass keeps for the backward pass, beside images, parameters and buffers.

    This is what attention adds to the peak memory of training: the peak comes when the forward pass ends.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (images, *model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # The result holds the graph, so no storage is freed and its address counted twice.
        result = model(images)
    del result
    return sum(sizes.values())


@torch.no_grad()
def attention_map(model: Network, images: Tensor) -> Tensor:
    """The scales h of the last stage, (channels, blocks), mean over ``images``."""
    scales: list[Tensor] = []
    last = [module for module in model.modules() if isinstance(module, SharedAttention)][-1]
    # An attention returns (y, (h, c)).
    handle = last.register_forward_hook(lambda module, args, result: scales.append(result[1][0]))
    model.eval()
    model(images)
    handle.remove()
    return torch.stack([h.mean(0) for h in scales], dim=1)


def table(accuracies: Mapping[str, float], seconds: Mapping[str, float], saved: Mapping[str, int]) -> str:
    """One line a variant: test accuracy, time of a training step, memory."""
    rows = [("variant", "test accuracy", "ms a step", "to no attention", "MiB kept for backward")]
    for variant in VARIANTS:
        accuracy = f"{100 * accuracies[variant]:.1f} %" if variant in accuracies else "not trained"
        ratio = seconds[variant] / seconds[PLAIN]
        rows.append(
            (variant, accuracy, f"{1e3 * seconds[variant]:.1f}", f"{ratio:.2f}x", f"{saved[variant] / 2**20:.1f}")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(path: Path, losses: Mapping[str, Sequence[float]], seconds: Mapping[str, float], scales: Tensor) -> None:
    """Saves the picture: loss curves, step times, and the attention of the last stage."""
    figure = Figure(figsize=(11, 7), layout="constrained", dpi=150)
    figure.suptitle("ResNet-20 with Dense-and-Implicit Attention on handwritten digits", fontsize=14)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1))
    _draw_losses(figure.add_subplot(grid[0, 0]), losses)
    _draw_times(figure.add_subplot(grid[0, 1]), seconds)
    _draw_scales(figure.add_subplot(grid[1, :]), scales)
    figure.savefig(path)


def _draw_losses(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    # The curves lie on each other as long as rounding errors have not grown: the upper one is dashed.
    for (variant, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, color=_COLOURS[variant], label=variant, linewidth=1.4)
    axes.set(title="Training loss, same seed", xlabel="step", ylabel="cross-entropy", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _draw_times(axes: Axes, seconds: Mapping[str, float]) -> None:
    milliseconds = [1e3 * taken for taken in seconds.values()]
    names = [name.replace(", ", ",\n") for name in seconds]
    bars = axes.barh(names, milliseconds, color=[_COLOURS[name] for name in seconds])
    axes.bar_label(bars, [f"{value:.1f} ms\n{value / milliseconds[0]:.2f}x" for value in milliseconds], padding=6)
    axes.set(title=f"Time of a training step, batch {BATCH}", xlabel="milliseconds (median)")
    axes.set_xlim(right=1.25 * max(milliseconds))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _draw_scales(axes: Axes, scales: Tensor) -> None:
    channels, blocks = scales.shape
    image = axes.imshow(scales.T.numpy(), aspect="auto", cmap="viridis")
    axes.set(title="Attention h of the last stage, mean over the test images", xlabel="channel", ylabel="block")
    axes.set_yticks(range(blocks), [str(k + 1) for k in range(blocks)])
    axes.set_xticks(range(0, channels, 8))
    axes.figure.colorbar(image, ax=axes, label="h (scale of the channel)", pad=0.01)


def _announce(data: train_images.ImageData, epochs: int) -> None:
    side = data.train[0][0].shape[-1]
    print(
        f"ResNet-20 with DIA learns {len(data.train)} handwritten digits of {side}x{side}, twice from the "
        f"same seed (epochs: {epochs}, CPU threads: {torch.get_num_threads()})."
    )
    reason = backends.missing("cpu")
    if reason is not None:
        print(f"No fused kernels: {reason}. Both runs are plain PyTorch, the row {OURS!r} too.")


def run(settings: Settings, picture: Path, *, seed: int = 0, epochs: int | None = None) -> int:
    """The whole demo. Returns the exit status: 1 if a network reads too few of the test digits."""
    start = time.perf_counter()
    epochs = settings.epochs if epochs is None else epochs
    data = train_images.load("digits", seed=seed)
    images = torch.stack([data.train[k][0] for k in range(BATCH)])
    labels = torch.tensor([data.train[k][1] for k in range(BATCH)])
    _announce(data, epochs)

    trained = {}
    for variant in (EAGER, OURS):
        print(f"{variant}:")
        trained[variant] = train(variant, epochs, seed)
    accuracies = {variant: result.accuracy for variant, result in trained.items()}
    fresh = {variant: create_network(variant, seed) for variant in VARIANTS}
    seconds = time_steps(fresh, images, labels, settings.timed_rounds)
    saved = {variant: saved_bytes(model, images) for variant, model in fresh.items()}
    test = torch.stack([data.test[k][0] for k in range(len(data.test))])
    losses = {variant: result.losses for variant, result in trained.items()}
    draw(picture, losses, seconds, attention_map(trained[OURS].network, test))

    print(f"\n{table(accuracies, seconds, saved)}\n")
    print(f"Picture: {picture}. All of it took {time.perf_counter() - start:.0f} s.")
    failed = [variant for variant, accuracy in accuracies.items() if accuracy < REQUIRED_ACCURACY]
    if failed and settings.judge_accuracy:
        print(f"FAILED: test accuracy below {REQUIRED_ACCURACY:.0%}: {'; '.join(failed)}", file=sys.stderr)
        return 1
    return 0
