"""Checkpoints on disk: a file, or a folder of shards; whole at every moment; either loads under any launch.

``last.ckpt`` is a file where every process has all weights. Sharded weights go into one of two folders, ``last-0`` and
``last-1``, and ``last.ckpt`` is then a link to the one that is whole: the other is written, then the link is changed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

#: In a folder, the file of what belongs to no parameter. The name is Lightning's, whose loader reads it.
_REST = "meta.pt"


def write(path: Path, content: Callable[[BinaryIO], Any]) -> None:
    """Writes a file under another name and moves it into place: a process killed meanwhile leaves the old one whole.

    The other name is in the same folder. Lightning's own way is by the system's folder for temporary files, from
    where a move can be a copy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        content(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _folders(path: Path) -> list[Path]:
    """The two folders that a link at ``path`` can name."""
    return [path.with_name(f"{path.stem}-{number}") for number in range(2)]


def _free_folder(path: Path) -> Path:
    """The one of the two that ``path`` does not name, empty."""
    free = next(folder for folder in _folders(path) if folder.resolve() != path.resolve())
    shutil.rmtree(free, ignore_errors=True)
    free.mkdir(parents=True)
    return free


def _link(path: Path, folder: Path) -> None:
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    os.replace(new, path)


class Files(TorchCheckpointIO):
    """Writes a checkpoint as one file; reads that, or a folder of shards from any number of processes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write(Path(path), lambda file: torch.save(checkpoint, file))
        for folder in _folders(Path(path)):
            shutil.rmtree(folder, ignore_errors=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not Path(path).is_dir():
            return super().load_checkpoint(path, map_location, weights_only)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "whole.ckpt"
            dcp_to_torch_save(path, file)
            checkpoint = torch.load(file, map_location, weights_only=weights_only)
        # By the parameters' names, where a file has numbers: an optimiser goes by their order alone.
        optimizer = checkpoint.pop("optimizer_0")
        rest = torch.load(Path(path) / _REST, map_location, weights_only=weights_only)
        return {**checkpoint, "optimizer_states": [optimizer], **rest}


def whole_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded module with whole tensors. All processes must call this."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes; ``Classifier.configure_model`` shards. Reads files and folders, as ``Files`` does."""

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if "optimizer_states" not in checkpoint:  # weights to use elsewhere, not a run to go on with: one file
            assert self.model is not None
            checkpoint["state_dict"] = whole_state_dict(self.model)
            if self.is_global_zero:
                write(path, lambda file: torch.save(checkpoint, file))
            return
        # The first process looks and clears, then all know where to write.
        folder = self.broadcast(_free_folder(path) if self.is_global_zero else path)
        state = {"state_dict": checkpoint.pop("state_dict"), "optimizer_0": checkpoint.pop("optimizer_states")[0]}
        # Buffers are whole in each process: those of the first are kept, as DistributedDataParallel does.
        sharded.save(state, checkpoint_id=folder, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
        if self.is_global_zero:
            write(folder / _REST, lambda file: torch.save(checkpoint, file))
            _link(path, folder)
