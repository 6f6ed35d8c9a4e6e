"""The network as Lightning trains it: loss, test accuracy, optimiser, schedule, and how FSDP2 shards it."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import Network
from .recipes import Recipe


class Classifier(lightning.LightningModule):
    """A network that learns to name images by a recipe.

    Logs ``loss`` every step, ``test_loss`` and ``test_accuracy`` (in [0, 1]) every epoch.
    """

    def __init__(self, network: Network, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe

    def configure_model(self) -> None:
        """Shards the network where the strategy is FSDP2: each stage is a unit, the rest another.

        The blocks of a stage share an attention module, so a unit smaller than the stage would gather its weights
        again for every block, or hold them in a unit of their own that must outlive the blocks'.
        """
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for stage in self.network.stages:
            fully_shard(stage, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        logits = self.network(images)
        right = (logits.argmax(1) == labels).float().mean()
        self.log("test_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log("test_accuracy", right, prog_bar=True, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self):
        recipe = self.recipe
        optimizer = torch.optim.SGD(
            self.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(recipe.milestones), recipe.decay)
        return [optimizer], [schedule]
