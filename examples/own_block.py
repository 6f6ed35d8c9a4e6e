"""Shared attention in a residual block of your own: the block before and after, two lines apart.

Run ``python examples/own_block.py``. It builds a stage of a ResNet without and with attention, checks
the fused step against the plain PyTorch one, and trains the stage for one step.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dia_kernels import SharedAttention

CHANNELS, BLOCKS, REDUCTION = 64, 3, 4


class Block(nn.Module):
    """A residual block without attention."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def branch(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):  # before, line 1
        return F.relu(self.branch(x) + x)  # before, line 2


class AttentiveBlock(Block):
    """The same block with attention: its tail is one fused call."""

    def forward(self, x, attention, state):  # after, line 1
        return attention(self.branch(x), state, shortcut=x, activation="relu")  # after, line 2


class AttentiveStage(nn.Module):
    """Blocks that share one attention unit. Each pass begins with no state, and each block hands it on."""

    def __init__(self, channels, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(AttentiveBlock(channels) for _ in range(blocks))
        self.attention = SharedAttention(channels, reduction=REDUCTION)

    def forward(self, x):
        state = None
        for block in self.blocks:
            x, state = block(x, self.attention, state)
        return x


def in_plain_pytorch(attention, x, state, shortcut):
    """What ``attention`` computes in one block, written out."""
    h, c = state or (torch.zeros(x.shape[:2]), torch.zeros(x.shape[:2]))
    w = attention.lstm_parameters()
    from_map = F.relu(F.linear(x.mean((2, 3)), w.input_reduce_weight, w.input_reduce_bias))
    from_state = F.relu(F.linear(h, w.hidden_reduce_weight, w.hidden_reduce_bias))
    gates = F.linear(from_map, w.input_expand_weight, w.input_expand_bias)
    gates = gates + F.linear(from_state, w.hidden_expand_weight, w.hidden_expand_bias)
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.sigmoid()
    return F.relu(x * h[:, :, None, None] + shortcut), (h, c)


def check_against_plain_pytorch(stage, x):
    """Largest difference between the stage and the same stage with its attention written out."""
    with torch.no_grad():
        fused, plain, state = stage(x), x, None
        for block in stage.blocks:
            plain, state = in_plain_pytorch(stage.attention, block.branch(plain), state, plain)
    torch.testing.assert_close(fused, plain)
    return (fused - plain).abs().max().item()


def train_one_step(stage, x, target):
    """The loss before and after one step of gradient descent."""
    optimiser = torch.optim.SGD(stage.parameters(), lr=0.1)
    before = F.mse_loss(stage(x), target)
    before.backward()
    optimiser.step()
    after = F.mse_loss(stage(x), target)
    return before.item(), after.item()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def main():
    torch.manual_seed(0)
    x, target = torch.randn(8, CHANNELS, 16, 16), torch.randn(8, CHANNELS, 16, 16)
    before = nn.Sequential(*(Block(CHANNELS) for _ in range(BLOCKS)))
    after = AttentiveStage(CHANNELS, BLOCKS)
    print(f"before: {tuple(x.shape)} -> {tuple(before(x).shape)}, {count(before):,} parameters")
    print(
        f"after:  {tuple(x.shape)} -> {tuple(after(x).shape)}, {count(after):,} parameters, "
        f"{count(after.attention):,} of them in the attention that all {BLOCKS} blocks share"
    )
    print(f"fused equals plain PyTorch: largest difference {check_against_plain_pytorch(after, x):.1e}")
    loss_before, loss_after = train_one_step(after, x, target)
    print(f"one training step: loss {loss_before:.4f} -> {loss_after:.4f}")


if __name__ == "__main__":
    main()
