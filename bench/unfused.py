"""What the fused step is compared with: the same step, and a block without attention, as a user writes them.

Nothing here comes from dia_kernels, so that a fault of the library cannot hide in its own yardstick.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


class EagerAttention(nn.Module):
    """Dense-and-Implicit Attention with the LSTM cell in plain PyTorch (arXiv:1905.10671, section 3)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        bottleneck = channels // reduction
        self.input_reduce = nn.Linear(channels, bottleneck)
        self.input_expand = nn.Linear(bottleneck, 4 * channels)
        self.hidden_reduce = nn.Linear(channels, bottleneck)
        self.hidden_expand = nn.Linear(bottleneck, 4 * channels)

    def cell(self, x: Tensor, state: State) -> State:
        """The new state (h, c), whose h is the scale of ``x``."""
        h, c = state
        p = x.mean((2, 3))
        u = self.input_expand(torch.relu(self.input_reduce(p))) + self.hidden_expand(torch.relu(self.hidden_reduce(h)))
        i, f, g, o = u.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.sigmoid(c), c

    def forward(self, x: Tensor, state: State, shortcut: Tensor) -> tuple[Tensor, State]:
        """The tail of a residual block: ``(relu(x * h + shortcut), (h, c))``."""
        h, c = self.cell(x, state)
        return torch.relu(x * h[..., None, None] + shortcut), (h, c)

    def forward_inplace(self, x: Tensor, state: State, shortcut: Tensor) -> tuple[Tensor, State]:
        """The same, written over ``x``. Inference only."""
        h, c = self.cell(x, state)
        return x.mul_(h[..., None, None]).add_(shortcut).relu_(), (h, c)


def plain_tail(x: Tensor, shortcut: Tensor) -> Tensor:
    """The tail of a residual block without attention."""
    return torch.relu(x + shortcut)
