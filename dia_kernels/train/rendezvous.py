"""How the processes of one start under torchrun find each other, and not those of the start before it.

torchrun's agent keeps one store for all of its restarts, and restarted processes read there what the dead ones wrote:
their addresses, which nobody answers at (pytorch/pytorch#135712 and #167288; in torch 2.14 still). So those of one
start first agree on a name that no other start has, and keep to themselves under it. The agents' count of restarts is
no such name: those of several machines count differently.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import time
import uuid
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

_PATIENCE = timedelta(seconds=1)


def join() -> None:
    """Makes the default process group of processes that torchrun started; without torchrun, or if it is there, nothing.

    Its backend is NCCL with a GPU, else gloo.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or distributed.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agent = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    cuda = torch.cuda.is_available()
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        store=PrefixStore(agreed_name(agent, rank, world), agent),
        rank=rank,
        world_size=world,
        device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else None,
    )
    atexit.register(_leave)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def agreed_name(store: Store, rank: int, processes: int) -> str:
    """A name on which all living processes agree, whatever earlier ones have left in ``store``.

    Each says who it is. The first one lists who is there; a list is agreed on when everyone on it says so, and no dead
    process can say so of a list that names a living one.
    """
    own = uuid.uuid4().hex
    store.set(f"process {rank}", own)
    while True:
        if rank == 0:
            store.set("processes", " ".join(store.get(f"process {k}").decode() for k in range(processes)))
        present = store.get("processes").decode()
        if present.split()[rank : rank + 1] != [own]:
            time.sleep(0.1)  # a list of an earlier start, or one of this start that was made too soon
            continue
        name = hashlib.sha256(present.encode()).hexdigest()
        store.set(f"{name} {rank}", "here")
        try:
            store.wait([f"{name} {k}" for k in range(processes)], _PATIENCE)
        except DistStoreError:
            continue
        return name
