"""In which order images are seen, and a loader that can begin in the middle of an epoch.

The order is a function of seed and epoch alone, so a position is two numbers. Nothing of a worker needs
saving, and any number of workers gives the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from .images import Images, mixed_seed


class Order(Sampler[list[int]]):
    """Batches of keys (see ``Images``), shuffled anew in each epoch: this process's share of each, in parts.

    Each batch is dealt out evenly to processes and parts, and what is left of an epoch that cannot be is dropped. So
    the parts of a batch are equally large, and the mean over them is the mean over the batch.

    Args:
        images: how many there are.
        batch_size: of a step of the optimiser, over all processes and parts.
        seed: of the shuffling.
        rank, processes: whose share.
        parts: of a share, given out one after the other.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1, parts: int = 1
    ) -> None:
        shares = processes * parts
        why = f"the processes x {parts} accumulated parts" if parts > 1 else "the processes"
        if batch_size < 1 or batch_size % shares:
            raise ValueError(f"batch_size: expected a multiple of {shares} ({why}), got {batch_size}")
        if images < shares:
            raise ValueError(f"images: expected at least {shares} ({why}), got {images}")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.parts, self.shares = rank, parts, shares
        self.epoch = self.first = 0

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return -(-(self.images // self.shares * self.shares) // self.batch_size)

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        """The parts of the batches of ``epoch`` from batch ``first`` on; the next call begins the next epoch."""
        epoch, first = self.epoch, self.first
        self.epoch, self.first = epoch + 1, 0
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        keys = torch.randperm(self.images, generator=generator) + epoch * self.images
        keys = keys[: self.images // self.shares * self.shares]
        processes = self.shares // self.parts
        for batch in keys.split(self.batch_size)[first:]:
            for part in range(self.parts):
                yield batch[part * processes + self.rank :: self.shares].tolist()


class ResumableLoader(DataLoader):
    """Parts of batches of ``images`` in an ``order``; ``state_dict`` is where it stands, and Lightning saves it.

    It stands at a whole batch: how many processes and parts there are is not in it, and may change.
    """

    def __init__(self, images: Images, order: Order, workers: int = 0) -> None:
        # A generator of its own: iterating must not draw from the one that dropout uses.
        super().__init__(
            images,
            batch_sampler=order,
            num_workers=workers,
            generator=torch.Generator(),
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.order = order
        self.position = {"epoch": 0, "batch": 0}

    def __iter__(self):
        epoch, part = self.order.epoch, self.order.first * self.order.parts
        for images in super().__iter__():
            # Counted before it is handed out: a checkpoint is written after the step on it.
            part += 1
            self.position = {"epoch": epoch, "batch": part // self.order.parts}
            yield images

    def state_dict(self) -> dict[str, int]:
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = dict(state)
        self.order.epoch, self.order.first = state["epoch"], state["batch"]
        if self.order.first >= self.order.steps:
            self.order.epoch, self.order.first = self.order.epoch + 1, 0
