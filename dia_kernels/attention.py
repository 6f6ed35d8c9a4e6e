"""``SharedAttention``: the attention unit that all blocks of a stage share, as an nn.Module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import backends, functional
from .cells import OUTPUTS, LSTMParameters, StackedLayer
from .functional import Activation, Output, State
from .norms import Norm


class SharedAttention(nn.Module):
    """Dense-and-Implicit Attention with the LSTM cell, shared by the blocks of a stage.

    One call is the tail of a residual block:
    ``y, state = attention(x, state, shortcut=s, activation="relu")``. Create one per stage, register
    it once, call it in every block of the stage, begin each forward pass with ``state=None``, and
    hand the state on from block to block. (arXiv:1905.10671, section 3; arXiv:2210.16101.)

    Args:
        channels: C of the feature maps.
        reduction: r; the bottleneck has C // r values. The authors use 4 for CIFAR, 20 for ImageNet.
        output: function of the cell state in h: ``"sigmoid"`` (the paper's) or ``"tanh"``.
        num_layers: stacked LSTM layers; every published model has one.
        dropout: probability of zeroing an h between stacked layers in training.
        channel_dim: 1 for (N, C, \\*spatial), -1 for token layout (N, L, C) or (N, \\*spatial, C).
        backend: None for the best one here, or a name out of ``dia_kernels.backends.names()``.
        device, dtype: of the parameters.

    Attributes:
        {input,hidden}_{reduce,expand}_{weight,bias}: parameters of the first layer, shapes
            (m, C), (m,), (4C, m), (4C,) with m = C // r; rows of the expansions in the order i, f, g, o.
        {input,hidden}_{weight,bias}_l1, ...: parameters of the layers above, (4C, C) and (4C,).

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        *,
        output: Output = "sigmoid",
        num_layers: int = 1,
        dropout: float = 0.0,
        channel_dim: int = 1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("reduction", reduction), ("num_layers", num_layers)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if channels // reduction == 0:
            raise ValueError(f"reduction: expected at most channels = {channels}, got {reduction} (C // r would be 0)")
        if output not in OUTPUTS:
            raise ValueError(f'output: expected "sigmoid" or "tanh", got {output!r}')
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim: expected 1 or -1, got {channel_dim!r}")
        if backend is not None and backend not in backends.names():
            raise ValueError(f"backend: expected None or one of {', '.join(backends.names())}, got {backend!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        self.channels = channels
        self.reduction = reduction
        self.output: Output = output
        self.num_layers = num_layers
        self.dropout = dropout
        self.channel_dim = channel_dim
        self.backend = backend
        for name, shape in self._parameter_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        width, bottleneck = self.channels, self.channels // self.reduction
        shapes: dict[str, tuple[int, ...]] = {}
        for path in ("input", "hidden"):
            shapes[f"{path}_reduce_weight"] = (bottleneck, width)
            shapes[f"{path}_reduce_bias"] = (bottleneck,)
            shapes[f"{path}_expand_weight"] = (4 * width, bottleneck)
            shapes[f"{path}_expand_bias"] = (4 * width,)
        for layer in range(1, self.num_layers):
            for path in ("input", "hidden"):
                shapes[f"{path}_weight_l{layer}"] = (4 * width, width)
                shapes[f"{path}_bias_l{layer}"] = (4 * width,)
        return shapes

    def reset_parameters(self) -> None:
        """Draws every weight and bias from U(-k, k), k = 1 / sqrt(inputs): the default of nn.Linear."""
        bound = 0.0
        for name, parameter in self.named_parameters(recurse=False):
            if "weight" in name:
                bound = 1.0 / math.sqrt(parameter.shape[1])
            nn.init.uniform_(parameter, -bound, bound)

    def lstm_parameters(self) -> LSTMParameters:
        """The parameters of the first layer, in the order that ``functional.step`` takes."""
        own = self._parameters
        return LSTMParameters(*[own[name] for name in LSTMParameters._fields])  # type: ignore[arg-type]

    def stacked_layers(self) -> list[StackedLayer]:
        """The parameters of the layers above the first."""
        own = self._parameters
        return [
            StackedLayer(*(own[f"{name}_l{layer}"] for name in StackedLayer._fields))  # type: ignore[arg-type]
            for layer in range(1, self.num_layers)
        ]

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        shortcut: Tensor | None = None,
        activation: Activation = None,
        inplace: bool = False,
        norm: Norm | None = None,
    ) -> tuple[Tensor, State]:
        """``y = activation(x * h + shortcut)`` with the new state's h; see ``functional.step``.

        Args:
            x: feature map (N, C, \\*spatial), or (N, \\*spatial, C) with ``channel_dim=-1``.
            state: what the block before returned, None at the first block of a stage.
            shortcut: the block's other branch, shape of x, or None.
            activation: None or ``"relu"``.
            inplace: write y over x. Inference only.
            norm: the batch norm (or another norm) of x that comes first; a batch norm costs no pass of its own.

        Returns:
            ``(y, state)``: hand the state to the next block of the stage.
        """
        return functional.step(
            x,
            self.lstm_parameters(),
            state,
            stacked=self.stacked_layers() if self.num_layers > 1 else (),
            shortcut=shortcut,
            activation=activation,
            output=self.output,
            channel_dim=self.channel_dim,
            dropout=self.dropout if self.training else 0.0,
            inplace=inplace,
            norm=norm,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        text = f"{self.channels}, reduction={self.reduction}"
        for name, default in (("output", "sigmoid"), ("num_layers", 1), ("dropout", 0.0), ("channel_dim", 1)):
            value = getattr(self, name)
            text += f", {name}={value!r}" if value != default else ""
        return text
