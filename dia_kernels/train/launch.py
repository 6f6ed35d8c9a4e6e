"""How and on what a run is executed: processes, strategy, accumulation, workers. It is no part of what the run is."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from torch import distributed

STRATEGIES = ("ddp", "fsdp2")
RECOMPUTED = ("block", "stage")


@dataclass(frozen=True)
class Launch:
    """How a run is executed. A run may go on under another launch than the one it began under.

    Attributes:
        processes: on each machine, each with one device.
        nodes: machines; more than one only under torchrun.
        strategy: ``"ddp"``, every process has all weights (DistributedDataParallel), or ``"fsdp2"``, they are sharded
            over the processes (``torch.distributed.fsdp.fully_shard``).
        accumulate: parts of its share of a batch that a process takes one after the other for one step of the
            optimiser.
        workers: processes that read images, for each of ``processes``.
        recompute: None, or ``"block"`` or ``"stage"``: these are computed again in the backward pass, for less memory
            and the same bits (``memory.checkpoint``).

    Raises:
        ValueError: an attribute is wrong; the message names it.
    """

    processes: int = 1
    nodes: int = 1
    strategy: str = "ddp"
    accumulate: int = 1
    workers: int = 0
    recompute: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("nodes", 1), ("accumulate", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.recompute not in (None, *RECOMPUTED):
            raise ValueError(f"recompute: expected None or one of {', '.join(RECOMPUTED)}, got {self.recompute!r}")

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.nodes


def here(given: Mapping[str, Any] | None = None, last: Launch | None = None) -> Launch:
    """The launch that this process is part of: by torchrun where that started it, then as given, then as last time.

    Args:
        given: attributes of a ``Launch``.
        last: where the others come from; None for their defaults.

    Raises:
        ValueError: an attribute is wrong, or is not what torchrun says; the message names it.
    """
    given = {} if given is None else given
    started = _torchrun_started()
    placed = _placed_by_torchrun() if started else {"nodes": 1}
    for name, value in placed.items():
        if given.get(name, value) != value:
            by = "torchrun started" if started else "only torchrun starts more, without it there is"
            raise ValueError(f"{name}: {by} {value}, got {given[name]}; leave it out")
    return Launch(**{**asdict(last or Launch()), **given, **placed})


def _torchrun_started() -> bool:
    return distributed.is_available() and distributed.is_torchelastic_launched()


def _placed_by_torchrun() -> dict[str, int]:
    local, nodes, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "WORLD_SIZE"))
    if local * nodes != world:
        raise ValueError(
            f"processes: expected the same number on every machine, got {world} on {nodes} machines, {local} on this"
        )
    return {"processes": local, "nodes": nodes}


def speaks() -> bool:
    """Whether this process prints for all: the first one, of torchrun's or of those that Lightning starts."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def leave(status: int) -> NoReturn:
    """Ends this process with ``status``; one that torchrun started without the interpreter's own farewell.

    Threads of gloo outlive their process group where something still refers to it, as FSDP2 does, and what they hold
    may belong to Python: while the interpreter takes itself down they now and then abort the process
    (pytorch/pytorch#179291; "terminate called without an active exception", twice in some 150 starts with torch 2.14),
    which torchrun takes for the failure of a run that is done.
    """
    if not _torchrun_started():
        sys.exit(status)
    if status == 0 and distributed.is_initialized():
        distributed.barrier()  # nobody hangs up on another
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
