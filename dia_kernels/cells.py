"""The cells of shared attention: their parameters and their mathematics.

A cell turns the pooled statistic ``p`` of a feature map and the state carried over from the
block before into the next state; its ``h`` is the scale of each channel. Nothing here pools or
rescales, and nothing here knows how a kernel does it.

First the LSTM, as functions, which the kernels compute too; then, as modules, ``Cell`` and its kinds, which
``CellAttention`` pools and rescales for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

OUTPUTS = ("sigmoid", "tanh")

#: What a ``Cell`` can want to know of each channel of each sample.
STATISTICS = ("mean", "std", "max")


class LSTMParameters(NamedTuple):
    """Parameters of the bottlenecked LSTM cell, each weight in (out, in) order.

    With ``C`` channels and ``m = C // reduction``: the two reductions are ``(m, C)`` and ``(m,)``,
    the two expansions ``(4 C, m)`` and ``(4 C,)``, their rows in the gate order i, f, g, o.
    """

    input_reduce_weight: Tensor
    input_reduce_bias: Tensor
    input_expand_weight: Tensor
    input_expand_bias: Tensor
    hidden_reduce_weight: Tensor
    hidden_reduce_bias: Tensor
    hidden_expand_weight: Tensor
    hidden_expand_bias: Tensor


def parameter_count(bottleneck: int, channels: int) -> int:
    """How many values the eight ``LSTMParameters`` have together."""
    return 10 * bottleneck * channels + 8 * channels + 2 * bottleneck


def join_parameters(parameters: LSTMParameters) -> Tensor:
    """The eight in one flat tensor: the weights, the biases of the expansions, those of the reductions.

    In this order whatever has a multiple of four channels begins at sixteen bytes. The native kernels write the same
    (``FlatParameters`` in ``csrc/ops/arguments.h``).
    """
    w1, b1, w2, b2, v1, a1, v2, a2 = parameters
    return torch.cat([t.reshape(-1) for t in (w1, w2, v1, v2, b2, a2, b1, a1)])


def split_parameters(flat: Tensor, bottleneck: int, channels: int) -> LSTMParameters:
    """The eight out of what ``join_parameters`` made, as views."""
    c, m = channels, bottleneck
    parts = flat.split([m * c, 4 * c * m, m * c, 4 * c * m, 4 * c, 4 * c, m, m])
    w1, w2, v1, v2 = (part.reshape(-1, width) for part, width in zip(parts[:4], (c, m, c, m), strict=True))
    b2, a2, b1, a1 = parts[4:]
    return LSTMParameters(w1, b1, w2, b2, v1, a1, v2, a2)


class StackedLayer(NamedTuple):
    """Parameters of a stacked layer above the first: plain linears ``(4 C, C)`` and ``(4 C,)``."""

    input_weight: Tensor
    input_bias: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor


class LSTMTrace(NamedTuple):
    """What one LSTM step computed: the new state, and the values that its gradient needs.

    ``h``, ``c`` and each gate (after its activation) are ``(N, C)``; the bottlenecks ``zx`` and
    ``zh`` (after their ReLU) are ``(N, m)``.
    """

    h: Tensor
    c: Tensor
    zx: Tensor
    zh: Tensor
    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor


def squash(c: Tensor, output: str) -> Tensor:
    """The function between the cell state and the output gate: the paper's sigmoid, or tanh."""
    return torch.sigmoid(c) if output == "sigmoid" else torch.tanh(c)


def lstm_gates(u: Tensor, c: Tensor, output: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gates and new state from the pre-activations ``u`` (N, 4 C) and the old state ``c`` (N, C)."""
    i, f, g, o = u.chunk(4, dim=1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    h = o * squash(c, output)
    return h, c, i, f, g, o


def lstm(p: Tensor, h: Tensor, c: Tensor, w: LSTMParameters, output: str = "sigmoid") -> LSTMTrace:
    """One step of the DIA-LSTM cell (arXiv:1905.10671, section 3.2, and the authors' code).

    Args:
        p: pooled feature map, (N, C).
        h, c: state left by the block before, (N, C) each.
        w: parameters of the cell, in the dtype of ``p``.
        output: ``"sigmoid"``, the paper's function of the cell state, or ``"tanh"``, the classic one.
    """
    zx = torch.relu(F.linear(p, w.input_reduce_weight, w.input_reduce_bias))
    zh = torch.relu(F.linear(h, w.hidden_reduce_weight, w.hidden_reduce_bias))
    u_x = F.linear(zx, w.input_expand_weight, w.input_expand_bias)
    u_h = F.linear(zh, w.hidden_expand_weight, w.hidden_expand_bias)
    h, c, i, f, g, o = lstm_gates(u_x + u_h, c, output)
    return LSTMTrace(h, c, zx, zh, i, f, g, o)


def stacked_lstm(
    p: Tensor,
    h: Tensor,
    c: Tensor,
    first: LSTMParameters,
    rest: Sequence[StackedLayer],
    output: str = "sigmoid",
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of L stacked LSTM layers: the bottlenecked one, then plain ones.

    Args:
        p: pooled feature map, (N, C).
        h, c: state, (L, N, C) each.
        first, rest: parameters of layer 0 and of the L - 1 layers above it.
        output: the function of the cell state in h: ``"sigmoid"`` or ``"tanh"``.
        dropout: probability of zeroing an ``h`` on its way to the layer above.

    Returns:
        The new (h, c), (L, N, C) each; ``h[-1]`` is the scale.
    """
    trace = lstm(p, h[0], c[0], first, output)
    hs, cs = [trace.h], [trace.c]
    for index, layer in enumerate(rest, start=1):
        below = F.dropout(hs[-1], dropout) if dropout else hs[-1]
        u_x = F.linear(below, layer.input_weight, layer.input_bias)
        u_h = F.linear(h[index], layer.hidden_weight, layer.hidden_bias)
        new_h, new_c, *_ = lstm_gates(u_x + u_h, c[index], output)
        hs.append(new_h)
        cs.append(new_c)
    return torch.stack(hs), torch.stack(cs)


# --- cells as modules ------------------------------------------------------------------------------


class Cell(nn.Module):
    """What makes the scale of each channel from pooled statistics; ``CellAttention`` does the rest.

    A subclass says in ``statistics`` what it wants to know, and computes the scale in ``forward``.

    Attributes:
        statistics: out of ``"mean"``, ``"std"`` (the root of the unbiased variance plus 1e-5) and ``"max"``, over the
            positions of each channel of each sample.
        position_statistics: out of the same, over the channels at each position of the rescaled map, for
            ``position_scale``. Empty: no scale for each position.
    """

    statistics: tuple[str, ...] = ("mean",)
    position_statistics: tuple[str, ...] = ()

    def forward(self, pooled: Any, state: Any) -> tuple[Tensor, Any]:
        """The scale and the new state.

        Args:
            pooled: (N, C) in the compute dtype: float64 for float64 maps, else float32. With several statistics a tuple
                of such, in the order of ``statistics``.
            state: what the block before returned, None at the first block of a stage.

        Returns:
            ``(scale, state)``: (N, C), and anything that the next block is to get.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def position_scale(self, pooled: Any) -> Tensor:
        """The scale of each position of the rescaled map, which is multiplied by it before shortcut and activation.

        Args:
            pooled: (N, \\*spatial) in the compute dtype. With several ``position_statistics`` a tuple of such, in their
                order.

        Returns:
            The scale, (N, \\*spatial).
        """
        raise NotImplementedError(f"{type(self).__name__} has no position_scale")

    def after(self, y: Tensor) -> Tensor:
        """A change to the rescaled map, before shortcut and activation: as it is, unless a subclass says otherwise.

        Args:
            y: (N, C, \\*spatial) in the dtype of the map; channels are in dimension 1 in token layout too.

        Returns:
            The changed map, of the same shape and dtype.
        """
        return y

    def make_constant(self) -> None:
        """Makes the scale a value of each channel that depends on no map, from which training goes on.

        For ``share_attention(init="preserve")``, which divides the layer before by that value.

        Raises:
            NotImplementedError: the cell cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} has no make_constant")


class DSU(Cell):
    """The Dynamic Sharing Unit: an LSTM of three gates, whose cell state alone makes the scale.

    ``u = We relu(Wr p + br) + be + (the same of h); i, f, g = sigmoid, sigmoid, tanh of u; c' = f * c + i * g;
    scale = h' = sigmoid(c')``. (Dynamic Layer Attention, IJCAI 2024, arXiv:2406.13392; gates, biases and bottlenecks
    as in the authors' code, one layer.) The state is (h, c), (N, C) each.

    Args:
        channels: C of the feature maps.
        reduction: r; the bottlenecks have C // r values. The authors use 4 for CIFAR, 16 or 20 for ImageNet.

    Attributes:
        input_reduce, hidden_reduce: linears C to C // r.
        input_expand, hidden_expand: linears C // r to 3 C, their rows in the order i, f, g.

    Raises:
        ValueError, TypeError: an argument is wrong, or a state; the message names it.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        check_bottleneck(channels, reduction)
        bottleneck = channels // reduction
        self.input_reduce = nn.Linear(channels, bottleneck)
        self.input_expand = nn.Linear(bottleneck, 3 * channels)
        self.hidden_reduce = nn.Linear(channels, bottleneck)
        self.hidden_expand = nn.Linear(bottleneck, 3 * channels)

    def forward(self, pooled: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``(h', (h', c'))`` from the mean (N, C) and the state (h, c), None for zeros."""
        h, c = _state_like(state, pooled)
        u_x = _linear(self.input_expand, torch.relu(_linear(self.input_reduce, pooled)))
        u_h = _linear(self.hidden_expand, torch.relu(_linear(self.hidden_reduce, h)))
        i, f, g = (u_x + u_h).chunk(3, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(c)
        return h, (h, c)

    def make_constant(self) -> None:
        """Both expansions' weights are zero."""
        nn.init.zeros_(self.input_expand.weight)
        nn.init.zeros_(self.hidden_expand.weight)


class SE(Cell):
    """Squeeze and excitation: ``scale = sigmoid(W2 relu(W1 p + b1) + b2)``. (arXiv:1709.01507, section 3.) No state.

    Args:
        channels: C of the feature maps.
        reduction: r; the bottleneck has C // r values. The paper's is 16.

    Attributes:
        reduce, expand: linears C to C // r and back.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        check_bottleneck(channels, reduction)
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, channels)

    def forward(self, pooled: Tensor, state: None) -> tuple[Tensor, None]:
        """``(scale, None)`` from the mean (N, C)."""
        return torch.sigmoid(_linear(self.expand, torch.relu(_linear(self.reduce, pooled)))), None

    def make_constant(self) -> None:
        """The expansion's weight is zero."""
        nn.init.zeros_(self.expand.weight)


class ECA(Cell):
    """Efficient channel attention: ``scale = sigmoid(conv(p))``, a convolution over the channels. No state.

    (arXiv:1910.03151, section 3; its kernel has k = |log2(C) / 2 + 1 / 2| values, rounded down, the next odd number
    where that is even; no bias.)

    Args:
        channels: C of the feature maps.

    Attributes:
        conv: the ``nn.Conv1d`` from one channel to one, k values.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive("channels", channels)
        t = int(abs((math.log2(channels) + 1) / 2))
        kernel = t if t % 2 else t + 1
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, pooled: Tensor, state: None) -> tuple[Tensor, None]:
        """``(scale, None)`` from the mean (N, C)."""
        weight = self.conv.weight.to(pooled.dtype)
        mixed = F.conv1d(pooled.unsqueeze(1), weight, padding=self.conv.padding)
        return torch.sigmoid(mixed).squeeze(1), None

    def make_constant(self) -> None:
        """The convolution's weight is zero."""
        nn.init.zeros_(self.conv.weight)


class SRM(Cell):
    """Style-based recalibration: ``scale = sigmoid(bn(w_mean * mean + w_std * std))``, channel by channel.

    (arXiv:1903.10829, section 3; the authors' code.) Weights, and weight and bias of the batch norm, are shared by all
    blocks; but each block has running statistics of its own, because one set for all would be that of none. So the
    state is the index of the next block, and the cell has to know how many there are.

    Args:
        channels: C of the feature maps.
        blocks: that share the cell.
        eps, momentum: of the batch norm.

    Attributes:
        style_weight: (C, 2), of mean and std. It starts as a convolution of two values to one does in PyTorch; the
            authors start at zero.
        norm_weight, norm_bias: (C,), of the batch norm, starting at 1 and 0.
        running_mean, running_var: buffers (blocks, C).

    Raises:
        ValueError, TypeError: an argument is wrong, or a state, or there are more calls than blocks.
    """

    statistics = ("mean", "std")
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, blocks: int = 1, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("blocks", blocks)
        self.blocks = blocks
        self.eps = eps
        self.momentum = momentum
        self.style_weight = nn.Parameter(torch.empty(channels, 2))
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.norm_bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(blocks, channels))
        self.register_buffer("running_var", torch.ones(blocks, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts anew, with the running statistics of no batch."""
        bound = 1 / math.sqrt(2)
        nn.init.uniform_(self.style_weight, -bound, bound)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(self, pooled: tuple[Tensor, Tensor], state: int | None) -> tuple[Tensor, int]:
        """``(scale, index of the next block)`` from (mean, std), (N, C) each, and the index of this block."""
        index = 0 if state is None else state
        if not isinstance(index, int):
            raise TypeError(f"state: expected None or the index of the block, got {type(state).__name__}")
        if not 0 <= index < self.blocks:
            raise ValueError(
                f"state: block {index} of an SRM with statistics for blocks={self.blocks}; make it for as many blocks "
                "as share it, and begin each forward pass with state=None"
            )
        mean, std = pooled
        weight = self.style_weight.to(mean.dtype)
        z = mean * weight[:, 0] + std * weight[:, 1]
        buffers, affine = (self.running_mean, self.running_var), (self.norm_weight, self.norm_bias)
        z = _batch_norm(z, *buffers, index, *affine, self.training, self.momentum, self.eps)
        return torch.sigmoid(z), index + 1

    def make_constant(self) -> None:
        """The norm's weight is zero: style weights of zero would be normalised as soon as they move."""
        nn.init.zeros_(self.norm_weight)

    def extra_repr(self) -> str:
        return f"{self.style_weight.shape[0]}, blocks={self.blocks}"


class CBAM(Cell):
    """The convolutional block attention module: a scale for each channel, then one for each position. No state.

    ``scale = sigmoid(mlp(mean) + mlp(max)); y = x * scale; y * sigmoid(bn(conv(max over channels, mean over
    channels)))`` with ``mlp(p) = W2 relu(W1 p + b1) + b2``. (arXiv:1807.06521, section 3; the authors' code.) Blocks
    that share it share the running statistics of its batch norm.

    Args:
        channels: C of the feature maps.
        reduction: r; the bottleneck has C // r values. The paper's is 16.
        spatial: the number of spatial dimensions, that of the convolution: 1, 2 or 3.
        kernel: odd width of the convolution.

    Attributes:
        reduce, expand: linears C to C // r and back.
        conv: from two channels to one, no bias.
        norm_weight, norm_bias, running_mean, running_var: of the batch norm, (1,) each; momentum 0.01, eps 1e-5.

    Raises:
        ValueError, TypeError: an argument is wrong, or a map has another number of spatial dimensions.
    """

    statistics = ("mean", "max")
    position_statistics = ("max", "mean")
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, reduction: int = 16, *, spatial: int = 2, kernel: int = 7) -> None:
        super().__init__()
        check_bottleneck(channels, reduction)
        check_positive("kernel", kernel)
        if spatial not in _CONVOLUTIONS:
            raise ValueError(f"spatial: expected 1, 2 or 3, got {spatial!r}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {kernel}")
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, channels)
        self.spatial = spatial
        self.conv = _CONVOLUTIONS[spatial][0](2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(1))
        self.norm_bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))

    def reset_parameters(self) -> None:
        """Starts the batch norm anew; linears and convolution have methods of their own for that."""
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(self, pooled: tuple[Tensor, Tensor], state: None) -> tuple[Tensor, None]:
        """``(scale, None)`` from (mean, max), (N, C) each."""
        mean, largest = pooled
        first, second = (_linear(self.expand, torch.relu(_linear(self.reduce, p))) for p in (mean, largest))
        return torch.sigmoid(first + second), None

    def position_scale(self, pooled: tuple[Tensor, Tensor]) -> Tensor:
        """That of each position, (N, \\*spatial), from (max, mean) over the channels."""
        largest, mean = pooled
        seen = _both_seen(largest, mean, self.spatial)
        convolve = _CONVOLUTIONS[self.spatial][1]
        z = convolve(seen, self.conv.weight.to(seen.dtype), padding=self.conv.padding)
        buffers, affine = (self.running_mean, self.running_var), (self.norm_weight, self.norm_bias)
        z = _batch_norm(z, *buffers, None, *affine, self.training, 0.01, 1e-5)
        return torch.sigmoid(z).squeeze(1)

    def make_constant(self) -> None:
        """The expansion's weight is zero, and that of the norm."""
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.norm_weight)


_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, F.conv1d),
    2: (nn.Conv2d, F.conv2d),
    3: (nn.Conv3d, F.conv3d),
}


def check_positive(name: str, value: int) -> None:
    """Raises TypeError or ValueError, naming the argument, unless it is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_bottleneck(channels: int, reduction: int) -> None:
    """The same for both, and that the bottleneck has at least one value."""
    check_positive("channels", channels)
    check_positive("reduction", reduction)
    if channels // reduction == 0:
        raise ValueError(f"reduction: expected at most channels = {channels}, got {reduction} (C // r would be 0)")


def _linear(layer: nn.Linear, p: Tensor) -> Tensor:
    """``layer`` of ``p`` in the dtype of ``p``, which is at least that of the layer."""
    return F.linear(p, layer.weight.to(p.dtype), layer.bias.to(p.dtype))


# The functions below look at tensors, or change buffers: in a graph traced by torch.fx each is one node.


def _state_like(state: Any, p: Tensor) -> tuple[Tensor, Tensor]:
    if state is None:
        return torch.zeros_like(p), torch.zeros_like(p)
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state: expected None or a pair (h, c), got {type(state).__name__}")
    for name, t in zip("hc", state, strict=True):
        if t.shape != p.shape:
            raise ValueError(f"state {name}: expected shape {tuple(p.shape)}, got {tuple(t.shape)}")
    return state[0].to(p.dtype), state[1].to(p.dtype)


def _both_seen(largest: Tensor, mean: Tensor, spatial: int) -> Tensor:
    """Two statistics of each position as the channels of a map."""
    if mean.ndim != spatial + 1:
        raise ValueError(f"x: expected {spatial} spatial dimensions, those of the CBAM, got {mean.ndim - 1}")
    # Not by torch.stack, of which the compiler makes a view: where sizes are symbols, it cannot keep that for backward.
    return torch.cat((largest.unsqueeze(1), mean.unsqueeze(1)), 1)


def _batch_norm(
    z: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    index: int | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm of ``z`` (N, C, ...) in its dtype, with the running statistics of block ``index``."""
    rows = [t if index is None else t[index] for t in (running_mean, running_var)]
    mean, var = (row.to(z.dtype) for row in rows)
    z = F.batch_norm(z, mean, var, weight.to(z.dtype), bias.to(z.dtype), training, momentum, eps)
    if training and rows[0].dtype != z.dtype:
        for row, updated in zip(rows, (mean, var), strict=True):
            row.copy_(updated)
    return z


fx.wrap("_state_like")
fx.wrap("_both_seen")
fx.wrap("_batch_norm")
