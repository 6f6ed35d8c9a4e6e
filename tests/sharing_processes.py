"""What the processes of test_sharing.py run: a converted network under DistributedDataParallel. Importable by name."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import hang_up
from torch import Tensor, distributed, nn

from dia_kernels.sharing import share_attention


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(6, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 6, 1))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


def network(backend: str | None = None) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return share_attention(nn.Sequential(Block(), Block(), Block()), reduction=2, backend=backend).double()


def images(rank: int) -> Tensor:
    return torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def gradients(model: nn.Module, rank: int) -> dict[str, Tensor]:
    model(images(rank)).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def run(rank: int, folder: str) -> None:
    """Gradients of this process's images, averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(network())
    torch.save(gradients(model, rank), Path(folder) / f"gradients{rank}.pt")
    hang_up()


def run_sharded(rank: int, folder: str) -> None:
    """The same under FSDP2, which shards the stage as one unit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    stage = network()
    fully_shard(stage, mesh=mesh)
    found = {name: gradient.full_tensor() for name, gradient in gradients(stage, rank).items()}
    torch.save(found, Path(folder) / f"gradients{rank}.pt")
    hang_up()
