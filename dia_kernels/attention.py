"""``SharedAttention``: the attention unit that all blocks of a stage share, as an nn.Module.

``create_attention`` makes it, or its relatives with another cell, from a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

from . import functional, overwriting
from .cell_attention import CellAttention, check_placement
from .cells import (
    CBAM,
    DSU,
    ECA,
    OUTPUTS,
    SE,
    SRM,
    Cell,
    LSTMParameters,
    StackedLayer,
    check_bottleneck,
    check_positive,
)
from .functional import Activation, Output, State
from .norms import Norm
from .overwriting import Inplace

#: The cells that ``create_attention`` knows by name.
CELLS = ("lstm", "lstm_tanh", "dsu", "se", "eca", "srm", "cbam")


def _is_below_one(value: object) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < 1


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
        check_positive("num_layers", num_layers)
        check_bottleneck(channels, reduction)
        if output not in OUTPUTS:
            raise ValueError(f'output: expected "sigmoid" or "tanh", got {output!r}')
        if not _is_below_one(dropout):
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
        check_placement(channel_dim, backend)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        self.channels = channels
        self.reduction = reduction
        self.output: Output = output
        self.num_layers = num_layers
        self.dropout = float(dropout)
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

    @torch.no_grad()
    def make_constant(self) -> None:
        """Makes the scale a value of each channel and block that depends on no map, from which training goes on.

        Every weight behind a bottleneck is zero, and every one of stacked layers; with ``output="tanh"``, near zero for
        most biases, the biases of g are 1. For ``share_attention(init="preserve")``.
        """
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("expand_weight") or "_weight_l" in name:
                parameter.zero_()
            elif self.output == "tanh" and (name.endswith("expand_bias") or "_bias_l" in name):
                parameter[2 * self.channels : 3 * self.channels] = 1.0 if name.startswith("input") else 0.0

    def lstm_parameters(self) -> LSTMParameters:
        """The parameters of the first layer, in the order that ``functional.step`` takes."""
        own = self._parameters  # by way of the attributes it would take ten times as long
        try:
            return LSTMParameters(*[own[name] for name in LSTMParameters._fields])  # type: ignore[arg-type]
        except KeyError:  # one is parametrized or pruned: an attribute, made from others
            return LSTMParameters(*[getattr(self, name) for name in LSTMParameters._fields])

    def stacked_layers(self) -> list[StackedLayer]:
        """The parameters of the layers above the first."""
        layers = range(1, self.num_layers)
        return [StackedLayer(*[getattr(self, f"{name}_l{k}") for name in StackedLayer._fields]) for k in layers]

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        shortcut: Tensor | None = None,
        activation: Activation = None,
        inplace: Inplace = False,
        norm: Norm | None = None,
        sample_scale: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """``y = activation(x * h + shortcut)`` with the new state's h; see ``functional.step``.

        Args:
            x: feature map (N, C, \\*spatial), or (N, \\*spatial, C) with ``channel_dim=-1``.
            state: what the block before returned, None at the first block of a stage.
            shortcut: the block's other branch, shape of x, or None.
            activation: None or ``"relu"``.
            inplace: True writes y over x (inference only), ``"auto"`` where that is right and saves memory; see
                ``functional.step``.
            norm: the batch norm (or another norm) of x that comes first; a batch norm costs no pass of its own.
            sample_scale: (N,), a factor for the scale of each sample, as stochastic depth draws it; the state is not
                scaled.

        Returns:
            ``(y, state)``: hand the state to the next block of the stage.
        """
        x, norm = functional._called_if_traced(norm, x, self.channel_dim)
        result = functional.step(
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
            sample_scale=sample_scale,
            backend=self.backend,
        )
        state = result[1]  # before y: where a graph is traced, its last node stands for the module
        return result[0], state

    def extra_repr(self) -> str:
        text = f"{self.channels}, reduction={self.reduction}"
        for name, default in (("output", "sigmoid"), ("num_layers", 1), ("dropout", 0.0), ("channel_dim", 1)):
            value = getattr(self, name)
            text += f", {name}={value!r}" if value != default else ""
        return text


def inplace_between(convolution: nn.Module, attention: nn.Module) -> Inplace:
    """``inplace`` for ``attention`` on the result of ``convolution``, which nobody else is going to be given.

    ``"auto"``, or False: where a hook would see that result. Asked before the convolution is called, as a hook may go
    then.
    """
    return type(attention) in (SharedAttention, CellAttention) and overwriting.between(convolution, attention)


def create_attention(
    cell: str | Callable[[int], nn.Module],
    channels: int,
    reduction: int = 4,
    *,
    blocks: int = 1,
    spatial: int = 2,
    num_layers: int = 1,
    channel_dim: int = 1,
    backend: str | None = None,
) -> nn.Module:
    """An attention module for maps of ``channels`` channels, called as ``SharedAttention`` is.

    Args:
        cell: a name out of ``CELLS``, or what makes from a number of channels a ``Cell`` (which ``CellAttention`` then
            pools and rescales for) or a whole attention module (which is used as it is).
        channels: C of the feature maps.
        reduction: r of the bottleneck; the cells ``"eca"`` and ``"srm"`` have none.
        blocks: that will share the module; ``"srm"`` keeps the statistics of each.
        spatial: number of the maps' spatial dimensions, which ``"cbam"`` convolves over.
        num_layers: of the LSTM, stacked; 1 for every other cell.
        channel_dim, backend: as for ``SharedAttention``; a whole attention module has its own.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    check_placement(channel_dim, backend)
    check_positive("channels", channels)
    check_positive("blocks", blocks)
    if num_layers != 1 and cell not in ("lstm", "lstm_tanh"):
        raise ValueError(f"num_layers: expected 1 with cell {cell!r}, got {num_layers}")
    if not isinstance(cell, str):
        return _made_attention(cell, channels, channel_dim, backend)
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, or a function of the channels, got {cell!r}")
    if cell in ("lstm", "lstm_tanh"):
        output: Output = "tanh" if cell == "lstm_tanh" else "sigmoid"
        return SharedAttention(
            channels, reduction, output=output, num_layers=num_layers, channel_dim=channel_dim, backend=backend
        )
    makers: dict[str, Callable[[], Cell]] = {
        "dsu": lambda: DSU(channels, reduction),
        "se": lambda: SE(channels, reduction),
        "eca": lambda: ECA(channels),
        "srm": lambda: SRM(channels, blocks),
        "cbam": lambda: CBAM(channels, reduction, spatial=spatial),
    }
    return CellAttention(makers[cell](), channel_dim=channel_dim, backend=backend)


def _made_attention(
    make: Callable[[int], nn.Module], channels: int, channel_dim: int, backend: str | None
) -> nn.Module:
    if isinstance(make, nn.Module) or not callable(make):
        raise TypeError(f"cell: expected a name or a function of the number of channels, got a {type(make).__name__}")
    made = make(channels)
    if not isinstance(made, nn.Module):
        raise TypeError(f"cell: expected it to make a Cell or another nn.Module, it made a {type(made).__name__}")
    return CellAttention(made, channel_dim=channel_dim, backend=backend) if isinstance(made, Cell) else made
