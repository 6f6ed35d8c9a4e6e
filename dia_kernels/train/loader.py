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
    """Batches of keys (see ``Images``), shuffled anew in each epoch, and this process's share of each.

    Args:
        images: how many there are.
        batch_size: of a step, over all processes.
        seed: of the shuffling.
        rank, processes: whose share; each batch is dealt out evenly, and what is left of an epoch that cannot
            be is dropped.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        if batch_size < 1 or batch_size % processes:
            raise ValueError(f"batch_size: expected a multiple of {processes} (the processes), got {batch_size}")
        if images < processes:
            raise ValueError(f"images: expected at least {processes}, one a process, got {images}")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.processes = rank, processes
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return -(-(self.images // self.processes * self.processes) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of ``epoch`` from number ``first`` on; the next call begins the next epoch."""
        epoch, first = self.epoch, self.first
        self.epoch, self.first = epoch + 1, 0
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        keys = torch.randperm(self.images, generator=generator) + epoch * self.images
        keys = keys[: self.images // self.processes * self.processes]
        for batch in keys.split(self.batch_size)[first:]:
            yield batch[self.rank :: self.processes].tolist()


class ResumableLoader(DataLoader):
    """Batches of ``images`` in an ``order``; ``state_dict`` is where it stands, and Lightning saves it."""

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
        epoch, batch = self.order.epoch, self.order.first
        for images in super().__iter__():
            # Counted before it is handed out: a checkpoint is written after the step on it.
            batch += 1
            self.position = {"epoch": epoch, "batch": batch}
            yield images

    def state_dict(self) -> dict[str, int]:
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = dict(state)
        self.order.epoch, self.order.first = state["epoch"], state["batch"]
        if self.order.first >= len(self.order):
            self.order.epoch, self.order.first = self.order.epoch + 1, 0
