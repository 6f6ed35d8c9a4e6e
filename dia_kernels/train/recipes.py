"""How the papers train each network: optimiser, schedule, batch.

Source: the DIA authors' code (gbup-group/DIANet) and the appendix of arXiv:1905.10671, for CIFAR-100. The
basic-block ResNets follow the recipe of ResNet-164.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import models


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum and a learning rate that drops at milestones.

    Attributes:
        epochs: passes over the training images.
        milestones: epochs at whose begin the learning rate is multiplied by ``decay``.
        decay: that factor.
        learning_rate: before the first milestone.
        weight_decay: on all parameters.
        momentum: of SGD.
        batch_size: images a step, over all processes.
    """

    epochs: int
    milestones: tuple[int, ...]
    decay: float
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    batch_size: int = 128

    def stretched(self, epochs: int) -> Recipe:
        """The same recipe over another number of epochs, its milestones at the same shares of it."""
        milestones = tuple(round(milestone * epochs / self.epochs) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones)


_RESNET = Recipe(180, (60, 120), 0.1)

_PRERESNET = Recipe(164, (81, 122), 0.1)
_WRN = Recipe(200, (80, 120, 160), 0.2, weight_decay=5e-4)
_RESNEXT = Recipe(300, (150, 225), 0.1, weight_decay=5e-4)

#: By the family that a network's name begins with.
_FAMILIES = {"preresnet": _PRERESNET, "resnext": _RESNEXT, "resnet": _RESNET, "wrn": _WRN}


def recipe_of(network: str) -> Recipe:
    """The recipe of a network by its name, see ``models.create``; that of its family, whatever its size.

    Raises:
        ValueError: there is no such network.
    """
    models.builder(network)
    return next(recipe for family, recipe in _FAMILIES.items() if network.startswith(family))


#: Those of the papers' networks.
RECIPES: dict[str, Recipe] = {name: recipe_of(name) for name in models.names()}
