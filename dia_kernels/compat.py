"""The DIA units of the authors and of pytorchcv, under their own constructors, calls and state-dict keys.

Change the import, and a network written for either unit runs on this library, with its checkpoints:

    from dia_kernels.compat import LSTMCell        # instead of the authors', in gbup-group/DIANet
    from dia_kernels.compat import DIAAttention    # instead of pytorchcv.models.diaresnet's

Both have the reduction 4. Their linears only hold the parameters: hooks put on them do not run. The
originals also draw a dropout mask for the output of the last layer, which nobody reads. Ours draw
none, so with dropout the random numbers of later calls differ from the originals'.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .cells import LSTMParameters, StackedLayer, stacked_lstm
from .functional import Activation, State

REDUCTION = 4

LayerStates = tuple[Sequence[Tensor], Sequence[Tensor]]


class LSTMCell(nn.Module):
    """The authors' unit: the cell alone. The network pools before the call and scales by ``h[-1]`` after it.

    The call follows PyTorch's dtype rules, as the original does, since it never sees the feature map.
    It can fuse neither pooling nor scaling; ``step`` does both and is what makes a network faster.

    Args:
        input_size: channels of the pooled feature map.
        hidden_size: channels of the state.
        nlayers: stacked LSTM layers.
        dropout: probability of zeroing an h between stacked layers in training.

    Attributes:
        w_ih, w_hh: input and hidden path, one entry a layer: ``.seq.0`` (reduce) and ``.seq.2``
            (expand) in layer 0, plain linears above it.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    def __init__(self, input_size: int, hidden_size: int, nlayers: int, dropout: float = 0.1) -> None:
        super().__init__()
        _check_int("input_size", input_size, REDUCTION)
        _check_int("hidden_size", hidden_size, REDUCTION)
        _check_int("nlayers", nlayers, 1)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.nlayers = nlayers
        self.dropout = nn.Dropout(dropout)
        # Path after path within a layer, so that a seed gives the initial weights of the original.
        self.w_ih = nn.ModuleList([nn.ModuleDict({"seq": nn.Sequential(*_bottleneck(input_size, hidden_size))})])
        self.w_hh = nn.ModuleList([nn.ModuleDict({"seq": nn.Sequential(*_bottleneck(hidden_size, hidden_size))})])
        for _ in range(1, nlayers):
            self.w_ih.append(nn.Linear(hidden_size, 4 * hidden_size))
            self.w_hh.append(nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, input: Tensor, hidden: State) -> State:
        """One step of the cell.

        Args:
            input: pooled feature map, (N, input_size).
            hidden: (h, c) of the block before, (nlayers, N, hidden_size) each; zeros at the first
                block of a stage.

        Returns:
            The new (h, c).
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a torch.Tensor, got {type(input).__name__}")
        if input.ndim != 2 or input.shape[1] != self.input_size:
            raise ValueError(f"input: expected shape (N, {self.input_size}), got {tuple(input.shape)}")
        h, c = _pair("hidden", hidden)
        shape = (self.nlayers, input.shape[0], self.hidden_size)
        for name, state in (("h", h), ("c", c)):
            if tuple(state.shape) != shape:
                raise ValueError(f"hidden {name}: expected shape {shape}, got {tuple(state.shape)}")
        return stacked_lstm(input, h, c, *self._parameters_by_layer(), dropout=_rate(self.dropout))

    def step(
        self,
        x: Tensor,
        hidden: State | None = None,
        *,
        shortcut: Tensor | None = None,
        activation: Activation = None,
    ) -> tuple[Tensor, State]:
        """The tail of a residual block in one fused call: pool, ``forward``, scale, add, activate.

        Args:
            x: feature map, (N, C, \\*spatial) with C = input_size = hidden_size.
            hidden: (h, c) of the block before, (nlayers, N, C) each; None at the first block of a stage.
            shortcut, activation: as in ``dia_kernels.functional.step``.

        Returns:
            ``(y, (h, c))`` with ``y = activation(x * h[-1] + shortcut)``.
        """
        if self.input_size != self.hidden_size:
            raise ValueError(
                f"hidden_size: expected input_size = {self.input_size}, since h scales the map, got {self.hidden_size}"
            )
        state = hidden
        if self.nlayers == 1 and hidden is not None:
            h, c = _pair("hidden", hidden)
            state = h.squeeze(0), c.squeeze(0)
        first, rest = self._parameters_by_layer()
        y, (h, c) = functional.step(
            x, first, state, stacked=rest, shortcut=shortcut, activation=activation, dropout=_rate(self.dropout)
        )
        return y, ((h.unsqueeze(0), c.unsqueeze(0)) if self.nlayers == 1 else (h, c))

    def _parameters_by_layer(self) -> tuple[LSTMParameters, list[StackedLayer]]:
        (input_first, *input_rest), (hidden_first, *hidden_rest) = self.w_ih, self.w_hh
        return _parameters(input_first.seq, hidden_first.seq, input_rest, hidden_rest)


class DIAAttention(nn.Module):
    """pytorchcv's unit: pools the map, updates the state and rescales the map, in one fused call.

    One difference shows where the map has fewer than 32 bits, as under autocast: the state of the
    original is in the dtype of the map, ours in float32.

    Args:
        in_x_features: channels of the feature map.
        in_h_features: channels of the state; must equal ``in_x_features``, since h scales the map.
        num_layers: stacked LSTM layers. In training an h between them is zeroed with probability 0.1.

    Attributes:
        lstm: ``x_amps`` and ``h_amps``, the input and the hidden path: ``amp1.fc1`` (reduce) and
            ``amp1.fc2`` (expand) in the first layer, plain linears ``amp2``, ... above it.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    def __init__(self, in_x_features: int, in_h_features: int, num_layers: int = 1) -> None:
        super().__init__()
        _check_int("in_x_features", in_x_features, REDUCTION)
        _check_int("in_h_features", in_h_features, REDUCTION)
        _check_int("num_layers", num_layers, 1)
        if in_h_features != in_x_features:
            raise ValueError(
                f"in_h_features: expected in_x_features = {in_x_features}, since h scales the map, got {in_h_features}"
            )
        self.num_layers = num_layers
        self.lstm = _Amplifiers(in_x_features, num_layers)

    def forward(self, x: Tensor, hc: LayerStates | None = None) -> tuple[Tensor, LayerStates]:
        """``y = x * h[-1]`` with the new state's h.

        Args:
            x: feature map, (N, C, \\*spatial).
            hc: (h, c) of the block before, each a list of one (N, C) a layer; None at the first block
                of a stage.

        Returns:
            ``(y, (h, c))``.
        """
        state = None if hc is None else self._joined(hc)
        (x_first, *x_rest), (h_first, *h_rest) = self.lstm.x_amps, self.lstm.h_amps
        first, rest = _parameters(x_first, h_first, x_rest, h_rest)
        y, (h, c) = functional.step(x, first, state, stacked=rest, dropout=_rate(self.lstm.dropout))
        return y, (([h], [c]) if self.num_layers == 1 else (list(h.unbind()), list(c.unbind())))

    def _joined(self, hc: LayerStates) -> State:
        """The lists of the layers' states as ``functional.step`` takes them."""
        h, c = _pair("hc", hc)
        for name, layers in (("h", h), ("c", c)):
            if len(layers) != self.num_layers:
                raise ValueError(f"hc: expected {name} with one tensor a layer, {self.num_layers}, got {len(layers)}")
            if len({layer.shape for layer in layers}) > 1:
                raise ValueError(f"hc: expected {name} of one shape, got {[tuple(layer.shape) for layer in layers]}")
        return (h[0], c[0]) if self.num_layers == 1 else (torch.stack(tuple(h)), torch.stack(tuple(c)))


class _Amplifiers(nn.Module):
    """What ``DIAAttention`` keeps under ``lstm``: the layers of both paths, and the dropout between layers."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.x_amps = nn.Sequential()
        self.h_amps = nn.Sequential()
        for layer in range(1, num_layers + 1):
            for amps in (self.x_amps, self.h_amps):
                amps.add_module(f"amp{layer}", _first_amp(width) if layer == 1 else nn.Linear(width, 4 * width))
        self.dropout = nn.Dropout(0.1)


def _first_amp(width: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(zip(("fc1", "activ", "fc2"), _bottleneck(width, width), strict=True)))


def _pair(name: str, state: Any) -> tuple[Any, Any]:
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"{name}: expected a pair (h, c), got {type(state).__name__}")
    return state[0], state[1]


def _check_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _bottleneck(width: int, state_width: int) -> tuple[nn.Linear, nn.ReLU, nn.Linear]:
    """Reduce, ReLU and expand of one path of the first layer."""
    return (
        nn.Linear(width, width // REDUCTION),
        nn.ReLU(inplace=True),
        nn.Linear(width // REDUCTION, 4 * state_width),
    )


def _parameters(input_first, hidden_first, input_rest, hidden_rest) -> tuple[LSTMParameters, list[StackedLayer]]:
    """Parameters of the two paths: their bottlenecks in the first layer, their linears in those above."""
    input_reduce, _, input_expand = input_first
    hidden_reduce, _, hidden_expand = hidden_first
    first = LSTMParameters(
        input_reduce.weight,
        input_reduce.bias,
        input_expand.weight,
        input_expand.bias,
        hidden_reduce.weight,
        hidden_reduce.bias,
        hidden_expand.weight,
        hidden_expand.bias,
    )
    rest = [
        StackedLayer(from_input.weight, from_input.bias, from_hidden.weight, from_hidden.bias)
        for from_input, from_hidden in zip(input_rest, hidden_rest, strict=True)
    ]
    return first, rest


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0
