"""The authors' DIA unit and a small CIFAR network around it, written down from what their public code computes.

Constructor, call and state-dict keys of ``LSTMCell`` are those of gbup-group/DIANet, and the network
uses the unit as theirs do: it pools, flattens, calls the cell, scales by ``h[-1]``, adds the shortcut
in place. Nothing here imports the library. ``Stage`` looks ``LSTMCell`` up by its name in this file,
so replacing that name is the same as changing the import of a network.
"""

import torch
from torch import nn
from torch.nn import functional as F


class BottleneckPath(nn.Module):
    def __init__(self, width, state_width):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, 4 * state_width))

    def forward(self, values):
        return self.seq(values)


class LSTMCell(nn.Module):
    def __init__(self, input_size, hidden_size, nlayers, dropout=0.1):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.w_ih = nn.ModuleList([BottleneckPath(input_size, hidden_size)])
        self.w_hh = nn.ModuleList([BottleneckPath(hidden_size, hidden_size)])
        for _ in range(nlayers - 1):
            self.w_ih.append(nn.Linear(hidden_size, 4 * hidden_size))
            self.w_hh.append(nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, input, hidden):
        all_h, all_c = [], []
        for from_input, from_hidden, h, c in zip(self.w_ih, self.w_hh, *hidden, strict=True):
            i, f, g, o = torch.split(from_input(input) + from_hidden(h), h.shape[1], dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.sigmoid(c)
            all_h.append(h)
            all_c.append(c)
            # Drawn after the last layer too, although nobody reads it: as in the original.
            input = self.dropout(h)
        return torch.stack(all_h), torch.stack(all_c)


class Bottleneck(nn.Module):
    """Residual branch and shortcut of a block, not yet joined."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        middle = channels // 4
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = None
        if in_channels != channels or stride != 1:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return branch, x if self.downsample is None else self.downsample(x)


class Stage(nn.Module):
    """Blocks of one width, which share one cell."""

    def __init__(self, in_channels, channels, blocks, stride, nlayers):
        super().__init__()
        first = Bottleneck(in_channels, channels, stride)
        self.blocks = nn.ModuleList([first, *(Bottleneck(channels, channels, 1) for _ in range(blocks - 1))])
        self.lstm = LSTMCell(channels, channels, nlayers)
        self.nlayers = nlayers

    def forward(self, x):
        h = c = None
        for block in self.blocks:
            x, shortcut = block(x)
            pooled = F.adaptive_avg_pool2d(x, 1)
            pooled = pooled.view(pooled.size(0), pooled.size(1))
            if h is None:
                h = pooled.new_zeros(self.nlayers, pooled.size(0), pooled.size(1))
                c = torch.zeros_like(h)
            h, c = self.lstm(pooled, (h, c))
            x = x * h[-1].view(h.size(1), h.size(2), 1, 1)
            x += shortcut
            x = F.relu(x, inplace=True)
        return x


class ResNet(nn.Module):
    """Three stages of bottleneck blocks for small images."""

    def __init__(self, widths=(16, 32, 64), blocks=2, nlayers=1, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        in_channels = 16
        self.stages = nn.Sequential()
        for stage, channels in enumerate(widths):
            self.stages.append(Stage(in_channels, channels, blocks, 1 if stage == 0 else 2, nlayers))
            in_channels = channels
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stages(x)
        return self.fc(x.mean((2, 3)))
