"""The cells of shared attention: their parameters and their mathematics.

A cell turns the pooled statistic ``p`` of a feature map and the state carried over from the
block before into the next state; its ``h`` is the scale of each channel. Nothing here pools or
rescales, and nothing here knows how a kernel does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

OUTPUTS = ("sigmoid", "tanh")


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
