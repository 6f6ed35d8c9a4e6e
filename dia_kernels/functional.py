"""The step as a function: checks every argument, settles dtypes and layout, picks the backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import autograd, autograd_tail, backends, norms, reference
from .cells import OUTPUTS, LSTMParameters, StackedLayer, stacked_lstm
from .layout import channels, compute_dtype, shares_memory

State = tuple[Tensor, Tensor]
Activation = Literal["relu"] | None
Output = Literal["sigmoid", "tanh"]

MAP_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def step(
    x: Tensor,
    parameters: LSTMParameters,
    state: State | None = None,
    *,
    stacked: Sequence[StackedLayer] = (),
    shortcut: Tensor | None = None,
    activation: Activation = None,
    output: Output = "sigmoid",
    channel_dim: int = 1,
    dropout: float = 0.0,
    inplace: bool = False,
    norm: norms.Norm | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """One step of Dense-and-Implicit Attention: the tail of a residual block.

    ``p = mean(x); (h, c) = lstm(p, state); y = activation(x * h + shortcut)``
    (arXiv:1905.10671, section 3; the authors' code).

    Args:
        x: feature map (N, C, \\*spatial) with 1 to 3 spatial dimensions, or (N, \\*spatial, C) with
            ``channel_dim=-1``; float64, float32, float16 or bfloat16; any strides.
        parameters: of the LSTM cell, any floating dtype; cast to the compute dtype, which is
            float64 if x is, else float32.
        state: (h, c) as returned by the block before, or None at the first block of a stage.
            (N, C) each, or (L, N, C) with L - 1 ``stacked`` layers.
        stacked: parameters of the LSTM layers above the first.
        shortcut: added after the scaling; shape of x. If its dtype is not that of x, the sum has
            PyTorch's result type.
        activation: None or ``"relu"``, after the addition.
        output: the function of the cell state in h: ``"sigmoid"`` (the paper's) or ``"tanh"``.
        channel_dim: 1 or -1.
        dropout: probability of zeroing an h between stacked layers (0 in evaluation).
        inplace: write y over x and return it. Inference only.
        norm: a norm of x that comes first: an ``nn.BatchNorm1d/2d/3d``, an ``nn.SyncBatchNorm`` (on any
            device), torchvision's ``FrozenBatchNorm2d`` or a pair (scale, bias)
            of a value for each channel is folded into the step, at no pass of its own over x and nothing saved for
            it; its parameters and buffers are used and updated exactly as it would itself. Any other module or
            function is called, and the step follows. (arXiv:1502.03167, algorithm 1.)
        backend: None for the best one here, or a name out of ``dia_kernels.backends.names()``.

    Returns:
        ``(y, (h, c))``: y in the dtype of x (channels_last if x is and is not contiguous, else
        contiguous), the state in the compute dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: in backward, when the state comes from a forward pass whose graph is gone.
    """
    _check_map(x, channel_dim)
    if inplace and norm is not None:
        raise ValueError("inplace: expected False with a norm, got True")
    parameters = _checked_parameters(parameters, x, channel_dim)
    stacked = [_checked_layer(layer, k, x, channel_dim) for k, layer in enumerate(stacked, start=1)]
    h, c = _checked_state(state, x, channel_dim, len(stacked))
    if shortcut is not None:
        _check_shortcut(shortcut, x)
    if activation not in (None, "relu"):
        raise ValueError(f'activation: expected None or "relu", got {activation!r}')
    if output not in OUTPUTS:
        raise ValueError(f'output: expected "sigmoid" or "tanh", got {output!r}')
    backends.check(backend, x.device)
    folded = None
    if norm is not None:
        if not stacked and (shortcut is None or shortcut.dtype == x.dtype):
            folded = norms.fold(norm, x, channel_dim)
        if folded is None:
            x = _called(norm, x, channel_dim)
    if folded is not None:
        return _tail_step(x, shortcut, h, c, parameters, folded, channel_dim, activation == "relu", output, backend)

    relu, later = activation == "relu", None
    if shortcut is not None and shortcut.dtype != x.dtype:
        if inplace:
            raise TypeError(f"shortcut: with inplace=True expected the dtype of x, {x.dtype}, got {shortcut.dtype}")
        relu, shortcut, later = False, None, shortcut

    if inplace:
        _check_inplace(x, shortcut, (h, c, *parameters), stacked)
        if backend == "reference":
            y, h, c = reference.step(x, shortcut, h, c, parameters, channel_dim, relu, output)
            x.copy_(y)
        else:
            h, c = backends.operators_of(backend, x).step_(
                x, shortcut, h, c, *parameters, channel_dim, relu, output == "tanh"
            )
        return x, (h, c)
    if stacked:
        y, h, c = _stacked_step(x, shortcut, h, c, parameters, stacked, channel_dim, relu, output, dropout, backend)
    elif backend == "reference":
        y, h, c = reference.step(x, shortcut, h, c, parameters, channel_dim, relu, output)
    else:
        ops = backends.operators_of(backend, x)
        y, h, c = autograd.step(ops, x, shortcut, h, c, parameters, channel_dim, relu, output == "tanh")
    if later is not None:
        y = y + later
        y = torch.relu(y) if activation == "relu" else y
    return y, (h, c)


def _called(norm: norms.Norm, x: Tensor, channel_dim: int) -> Tensor:
    """The norm of ``x``, by itself."""
    if isinstance(norm, tuple):
        shape = [-1 if dim == channel_dim % x.ndim else 1 for dim in range(x.ndim)]
        return x * norm[0].view(shape).to(x.dtype) + norm[1].view(shape).to(x.dtype)
    y = norm(x)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise ValueError(f"norm: expected a result of shape {tuple(x.shape)}, got {getattr(y, 'shape', type(y))}")
    return y


def _tail_step(x, shortcut, h, c, parameters, folded, channel_dim, relu, output, backend):
    """The step with its norm folded in, and what the norm does to its buffers."""
    shape = (channels(x, channel_dim),)
    gamma, beta, mean, var = (
        None if t is None else _cast(f"norm {name}", t, shape, x)
        for name, t in zip(("weight", "bias", "running_mean", "running_var"), folded[:4], strict=True)
    )
    first, last = (x, shortcut, h, c, gamma, beta), (folded.eps, parameters, channel_dim, relu)
    count: int | Tensor = x.numel() // max(shape[0], 1)
    ops = None if backend == "reference" else backends.operators_of(backend, x)
    if folded.group is not None:
        from . import autograd_sync  # it imports the compiler, to break its graphs: slow, and rarely needed

        y, h, c, mean, var, count = autograd_sync.tail(ops, *first, *last, output, folded.group)
    elif ops is None:
        y, h, c, mean, var = reference.tail(*first, mean, var, *last, output)
    else:
        y, h, c, mean, var = autograd_tail.tail(ops, *first, mean, var, *last, output == "tanh")
    if folded.module is not None:
        norms.update_buffers(folded.module, mean.detach(), var.detach(), count)
    return y, (h, c)


def _stacked_step(x, shortcut, h, c, first, rest, channel_dim, relu, output, dropout, backend):
    """The split path: pool and rescale by their operators, the small cell between them by PyTorch."""
    pool, rescale = reference.pool, reference.rescale
    if backend != "reference":
        pool, rescale = (partial(f, backends.operators_of(backend, x)) for f in (autograd.pool, autograd.rescale))
    with torch.autocast(x.device.type, enabled=False):
        p = pool(x, channel_dim)
        if h is None:
            h = c = p.new_zeros(len(rest) + 1, *p.shape)
        h, c = stacked_lstm(p, h, c, first, rest, output, dropout)
        if backend != "reference":
            h, c = autograd.hand_on(h, c)  # before the rescale: the backward of y passes it too
        return rescale(x, h[-1], shortcut, channel_dim, relu), h, c


def _check_plain(name: str, tensor: object) -> None:
    if type(tensor) in _PLAIN_TYPES:
        if tensor.layout != torch.strided:  # type: ignore[attr-defined]
            raise TypeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")  # type: ignore[attr-defined]
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    raise TypeError(
        f"{name}: expected a plain torch.Tensor, got the subclass {type(tensor).__name__}, whose meaning the kernels "
        "do not know; pass its local or plain tensor"
    )


def _check_map(x: Tensor, channel_dim: int) -> None:
    _check_plain("x", x)
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim: expected 1 or -1, got {channel_dim!r}")
    if x.dtype not in MAP_DTYPES:
        raise TypeError(f"x: expected a floating dtype (float64, float32, float16 or bfloat16), got {x.dtype}")
    if not 3 <= x.ndim <= 5:
        form = "(N, C, *spatial)" if channel_dim == 1 else "(N, *spatial, C)"
        raise ValueError(f"x: expected {form} with 1 to 3 spatial dimensions, got shape {tuple(x.shape)}")


def _cast(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """``tensor`` in the compute dtype of the map ``like``, after checking everything about it."""
    _check_plain(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} like x, got {tensor.device}")
    dtype = compute_dtype(like.dtype)
    if tensor.dtype == dtype:
        return tensor
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.dtype == torch.float64:
        raise TypeError(f"{name}: float64 with x in {like.dtype} would lose precision; expected at most {dtype}")
    return tensor.to(dtype)


def _checked_parameters(parameters: LSTMParameters, x: Tensor, channel_dim: int) -> LSTMParameters:
    width = channels(x, channel_dim)
    _check_plain("input_reduce_weight", parameters[0])
    rows = parameters[0].shape[0] if parameters[0].ndim == 2 else 0
    if rows == 0:
        raise ValueError(
            f"input_reduce_weight: expected shape (C // reduction, {width}) with at least one row, "
            f"got {tuple(parameters[0].shape)}"
        )
    if parameters[0].shape[1] != width:
        raise ValueError(
            f"x: expected {parameters[0].shape[1]} channels in dimension {channel_dim}, as the parameters have, "
            f"got shape {tuple(x.shape)}"
        )
    shapes = ((rows, width), (rows,), (4 * width, rows), (4 * width,)) * 2
    return LSTMParameters(
        *(_cast(name, p, shape, x) for name, p, shape in zip(parameters._fields, parameters, shapes, strict=True))
    )


def _checked_layer(layer: StackedLayer, index: int, x: Tensor, channel_dim: int) -> StackedLayer:
    width = channels(x, channel_dim)
    shapes = ((4 * width, width), (4 * width,)) * 2
    return StackedLayer(
        *(_cast(f"{name}_l{index}", p, s, x) for name, p, s in zip(layer._fields, layer, shapes, strict=True))
    )


def _checked_state(
    state: State | None, x: Tensor, channel_dim: int, stacked: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state: expected None or a pair (h, c), got {type(state).__name__}")
    shape: tuple[int, ...] = (x.shape[0], channels(x, channel_dim))
    if stacked:
        shape = (stacked + 1, *shape)
    h, c = state
    return _cast("state h", h, shape, x), _cast("state c", c, shape, x)


def _check_shortcut(shortcut: Tensor, x: Tensor) -> None:
    _check_plain("shortcut", shortcut)
    if shortcut.shape != x.shape:
        raise ValueError(f"shortcut: expected shape {tuple(x.shape)} like x, got {tuple(shortcut.shape)}")
    if shortcut.device != x.device:
        raise ValueError(f"shortcut: expected device {x.device} like x, got {shortcut.device}")
    if not shortcut.dtype.is_floating_point:
        raise TypeError(f"shortcut: expected a floating dtype, got {shortcut.dtype}")


def _check_inplace(x: Tensor, shortcut: Tensor | None, rest: tuple, stacked: Sequence) -> None:
    if stacked:
        raise ValueError("inplace: expected False with stacked layers, got True")
    if autograd.wants_gradient(x, shortcut, *rest) or autograd.transforms_active():
        raise ValueError(
            "inplace: expected False where a gradient is needed (the step must keep x), got True; "
            "use torch.no_grad() or torch.inference_mode()"
        )
    if torch.autograd.forward_ad._current_level >= 0:
        raise ValueError("inplace: expected False under forward-mode differentiation, got True")
    if shares_memory(x):
        raise ValueError("inplace: x is an expanded tensor, several of its elements share memory")
