"""What the processes of test_distributed.py run: gradients of a DIA network, and runs of ``train``. Importable by name.

torchrun ... distributed_processes.py runs <file of a list of runs>
torchrun ... distributed_processes.py killed <step> <marker> <arguments of python -m dia_kernels>
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.callbacks import Callback
from processes import hang_up
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dia_kernels import __main__, models
from dia_kernels.models.resnet import BasicBlock
from dia_kernels.train import files, run
from dia_kernels.train.classifier import Classifier
from dia_kernels.train.launch import Launch, leave
from dia_kernels.train.sync_norm import sync_norms

#: Images of a step, over both processes.
BATCH = 8


class Variant(NamedTuple):
    """A way to get the gradient of a DIA network in two processes."""

    options: tuple[str, ...] = ()  # of DistributedDataParallel
    checkpointed: str = ""  # each stage or each block
    unused: bool = False
    sharded: bool = False
    sync: bool = False
    folded: bool = False  # the norms before a step are nn.SyncBatchNorm, which it exchanges itself


VARIANTS = {
    "plain": Variant(),
    "find_unused_parameters": Variant(("find_unused_parameters",), unused=True),
    "static_graph": Variant(("static_graph",)),
    "checkpoint": Variant(checkpointed="stage"),
    "checkpoint, static_graph": Variant(("static_graph",), checkpointed="stage"),
    "checkpoint of blocks": Variant(checkpointed="block"),
    "checkpoint of blocks, static_graph": Variant(("static_graph",), checkpointed="block"),
    "fsdp2": Variant(sharded=True),
    "fsdp2, checkpoint": Variant(sharded=True, checkpointed="stage"),
    "sync_norm": Variant(sync=True),
    "sync_norm, checkpoint": Variant(sync=True, checkpointed="stage"),
    "fsdp2, sync_norm": Variant(sharded=True, sync=True),
    # (DistributedDataParallel refuses nn.SyncBatchNorm on the CPU.)
    "fsdp2, sync_norm folded": Variant(sharded=True, sync=True, folded=True),
}


def network() -> models.Network:
    """The same weights in every process. One attention module serves the three blocks of a stage."""
    torch.manual_seed(0)
    return models.create("resnet20", 5, attention="dia", in_channels=1).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 1, 12, 12, generator=generator, dtype=torch.float64), torch.arange(BATCH) % 5


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the second of two steps without an update: DistributedDataParallel learns from the first."""
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def _shard(model: models.Network) -> models.Network:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for stage in model.stages:
        fully_shard(stage, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _distributed(variant: Variant) -> nn.Module:
    model = network()
    if variant.unused:
        model.unused = nn.Linear(1, 1).double()
    if variant.folded:
        for module in model.modules():
            if isinstance(module, BasicBlock):
                module.bn2 = nn.SyncBatchNorm.convert_sync_batchnorm(module.bn2)
    if variant.sync:
        sync_norms(model)
    for stage in model.stages:
        parts = {"": (), "stage": (stage,), "block": stage.blocks}[variant.checkpointed]
        for part in parts:
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    if variant.sharded:
        return _shard(model)
    return nn.parallel.DistributedDataParallel(model, **dict.fromkeys(variant.options, True))


def run_gradients(rank: int, folder: str) -> None:
    """Writes the gradients of every variant, of this process's half of the batch, averaged over both processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    images, labels = batch()
    found = {}
    for name, variant in VARIANTS.items():
        model = _distributed(variant)
        buffers = {name.removeprefix("module."): b for name, b in model.named_buffers()}
        found[name] = gradients(model, images[half], labels[half]), buffers
    torch.save(found, Path(folder) / f"gradients{rank}.pt")
    hang_up()


class Stopped(Exception):
    """A run was stopped as asked."""


class Stop(Callback):
    """Stops a run, in every process, before the forward pass of a part of a batch."""

    def __init__(self, step: int, part: int = 0) -> None:
        self.step, self.part = step, part

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == self.part:
            raise Stopped


def tear(at: int) -> None:
    """Stops a run in the midst of its checkpoint number ``at`` of shards: they are written, nothing names them yet."""
    save, count = files.sharded.save, itertools.count(1)

    def torn(*arguments, **options) -> None:
        save(*arguments, **options)
        if next(count) == at:
            files.sharded.save = save
            raise Stopped

    files.sharded.save = torn


def run_one(
    folder: str, settings: dict, launch: dict | None = None, stop: list[int] | None = None, torn: int = 0, **options
) -> None:
    """One run of ``train``; with ``stop`` only up to that step, and part of it; with ``torn`` to that checkpoint."""
    callbacks = [] if stop is None else [Stop(*stop)]
    if torn:
        tear(torn)
    placed = None if launch is None else Launch(**launch)
    stopped = False
    try:
        run.train(run.Settings(**settings), Path(folder), placed, progress=False, callbacks=callbacks, **options)
    except Stopped:
        stopped = True
    assert stopped == (stop is not None or torn > 0), folder


def run_runs(path: str) -> None:
    """The runs whose arguments are in a file, one after the other."""
    for arguments in json.loads(Path(path).read_text()):
        run_one(**arguments)


def run_killed(step: str, marker: str, *arguments: str) -> None:
    """The command line, in which the second process kills itself before step number ``step``: the first time."""
    train = Classifier.training_step

    def training_step(self, batch, index):
        if self.global_step == int(step) and os.environ["RANK"] == "1" and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, batch, index)

    Classifier.training_step = training_step  # type: ignore[method-assign]
    leave(__main__.main(arguments))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"runs": run_runs, "killed": run_killed}[sys.argv[1]](*sys.argv[2:])
    leave(0)
