"""What is noted while a run learns; it goes into the run's checkpoints, so that a resumed run has whole curves."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from ..models import Network

#: Attributes of ``Curves``.
NOTED = ("losses", "accuracies", "gradient_norms")


def layers(network: Network) -> dict[str, nn.Conv2d]:
    """The convolutions of the blocks by name, in the order of the forward pass, without those of shortcuts."""
    return {
        name: module
        for name, module in network.stages.named_modules()
        if isinstance(module, nn.Conv2d) and "projection" not in name
    }


class Curves(Callback):
    """Losses of the steps, test accuracies of the epochs, and the layers' gradients.

    Attributes:
        losses: of each step.
        accuracies: on the test images after each epoch, in [0, 1].
        gradient_norms: of the weights of each layer (``layers``), at the first step of each epoch.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.gradient_norms: list[list[float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {name: list(getattr(self, name)) for name in NOTED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in NOTED:
            setattr(self, name, state_dict[name])

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.fit_loop.batch_idx == 0:
            gradients = [layer.weight.grad for layer in layers(pl_module.network).values()]
            norms = torch.stack([g.norm() for g in gradients if g is not None])
            self.gradient_norms.append(norms.tolist())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())
        if not math.isfinite(self.losses[-1]):
            trainer.should_stop = True

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.accuracies.append(float(trainer.callback_metrics["test_accuracy"]))
