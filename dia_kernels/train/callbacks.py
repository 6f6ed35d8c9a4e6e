"""What a run does beside its steps: run.json, the generators' states, and last.ckpt after whole steps only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from .launch import Launch
from .settings import Settings, write_run


class RunFile(Callback):
    """Writes run.json once all processes are there: each has by then seen what the folder held."""

    def __init__(self, folder: Path, settings: Settings, launch: Launch) -> None:
        self.folder, self.settings, self.launch = folder, settings, launch

    def on_fit_start(self, trainer, pl_module) -> None:
        if trainer.is_global_zero:
            write_run(self.folder, self.settings, self.launch)


class RandomState(Callback):
    """Keeps the generators of dropout in the checkpoint. All processes draw alike, so one state serves them."""

    def __init__(self) -> None:
        self.loaded: dict | None = None

    def state_dict(self) -> dict:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.loaded = state_dict

    def on_train_start(self, trainer, pl_module) -> None:
        if self.loaded is not None:
            torch.set_rng_state(self.loaded["cpu"])
            if len(self.loaded["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self.loaded["cuda"])
            self.loaded = None


class LastCheckpoint(Callback):
    """Writes a checkpoint to ``path`` after every ``every`` steps of the optimiser, never between the parts of one.

    (Lightning's own callback would, after a resume: it compares the number of steps alone.) Lightning counts parts;
    a checkpoint whose steps had another number of them is counted anew when it is loaded.
    """

    def __init__(self, path: Path, every: int, parts: int) -> None:
        self.path, self.every, self.parts = path, every, parts

    def state_dict(self) -> dict[str, int]:
        return {"parts": self.parts}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.parts == 0 and trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        parts = checkpoint["callbacks"][self.state_key]["parts"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            ready = counts["ready"]
            for name, count in counts.items():
                # `completed` is one behind in the midst of an epoch, by which Lightning knows where it was.
                counts[name] = ready // parts * self.parts - (ready - count)
