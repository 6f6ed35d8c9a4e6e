"""Batch norms over the batch of all processes: nn.SyncBatchNorm, and the same for where PyTorch's cannot be."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from .. import reference
from ..norms import update_buffers


class HostSyncBatchNorm(nn.BatchNorm2d):
    """What ``nn.SyncBatchNorm`` computes, for tensors of the CPU.

    PyTorch's refuses those, and DistributedDataParallel refuses a network on the CPU that has one in it. A step with
    ``norm=`` calls this one by itself, and does not fold it.
    """

    def forward(self, z: Tensor) -> Tensor:
        """Norm of a map (N, C, H, W); in training by the statistics of all processes of the default group."""
        if not self.training or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return super().forward(z)
        from ..autograd_sync import statistics  # it imports the compiler: slow, and rarely needed

        mean, var, count = statistics(z, 1, distributed.group.WORLD)
        update_buffers(self, mean, var, count)
        return reference.normalise(z, mean, (var + self.eps).rsqrt(), self.weight, self.bias, 1)[1].to(z.dtype)


def sync_norms(network: nn.Module) -> nn.Module:
    """``network`` with its ``nn.BatchNorm2d`` over all processes, in place; state-dict keys stay.

    With a GPU they become ``nn.SyncBatchNorm``, which a step with ``norm=`` folds; without, ``HostSyncBatchNorm``.
    """
    if torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # changes its children in place
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = HostSyncBatchNorm
    return network
