"""The step as a function: checks every argument, settles dtypes and layout, picks the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import autograd, autograd_norm, autograd_tail, backends, norms, overwriting, reference
from .cells import OUTPUTS, LSTMParameters, StackedLayer, lstm, stacked_lstm
from .layout import channels, compute_dtype, no_autocast
from .overwriting import Inplace

State = tuple[Tensor, Tensor]
Activation = Literal["relu"] | None
Output = Literal["sigmoid", "tanh"]

#: Added to a variance before its root, by the authors of SRM: the gradient of the root is infinite at zero.
STD_EPS = 1e-5
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
    inplace: Inplace = False,
    norm: norms.Norm | None = None,
    sample_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """One step of Dense-and-Implicit Attention: the tail of a residual block.

    ``p = mean(x); (h, c) = lstm(p, state); y = activation(x * h + shortcut)``
    (arXiv:1905.10671, section 3; the authors' code).

    Args:
        x: feature map (N, C, \\*spatial) with 1 to 3 spatial dimensions, or (N, \\*spatial, C) with
            ``channel_dim=-1``; float64, float32, float16 or bfloat16; any strides.
        parameters: of the LSTM cell, in the compute dtype, which is float64 if x is, else float32; or narrower, and
            then cast.
        state: (h, c) as returned by the block before, or None at the first block of a stage.
            (N, C) each, or (L, N, C) with L - 1 ``stacked`` layers.
        stacked: parameters of the LSTM layers above the first.
        shortcut: added after the scaling; shape of x. If its dtype is not that of x, the sum has
            PyTorch's result type.
        activation: None or ``"relu"``, after the addition.
        output: the function of the cell state in h: ``"sigmoid"`` (the paper's) or ``"tanh"``.
        channel_dim: 1 or -1.
        dropout: probability of zeroing an h between stacked layers (0 in evaluation).
        inplace: True writes y over x and returns it; inference only. ``"auto"`` does so where that is right and saves
            memory; the caller must not read x any more, and y may be a map of its own.
        norm: a norm of x that comes first: an ``nn.BatchNorm1d/2d/3d``, an ``nn.SyncBatchNorm`` (on any
            device), torchvision's ``FrozenBatchNorm2d``, timm's ``BatchNormAct2d`` with no activation, or a pair
            (scale, bias) of a value for each channel is folded into the step, at no pass of its own over x and nothing
            saved for it; its parameters and buffers are used and updated exactly as it would itself. Any other module
            or function is called, and the step follows. The channels of PyTorch's batch, group and instance norms are
            those of ``channel_dim``. (arXiv:1502.03167, algorithm 1.)
        sample_scale: (N,), a factor for the scale of each sample: ``y = activation(x * (h * sample_scale[:, None]) +
            shortcut)``, for stochastic depth (arXiv:1603.09382). The state is not scaled. Any floating dtype that the
            compute dtype holds. With it, and with ``stacked`` layers, pool, cell and rescale run one by one, and a norm
            is folded into these unless something transforms or exports the call, which then calls it by itself.
        backend: a name out of ``dia_kernels.backends.names()``, or None for that of the ``use_backend`` around the
            call; without one, for the best one here.

    Returns:
        ``(y, (h, c))``: y in the dtype of x, or x's and the shortcut's result type (channels_last if x is and is not
        contiguous, else contiguous), the state in the compute dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: the backend is not here; ``vmap`` maps over the batches of a norm but not over its running
            statistics; in backward, when the state comes from a forward pass whose graph is gone.
    """
    if inplace is not False:
        inplace = overwriting.checked(inplace)
    backend, sample_scale = _checked_call(x, shortcut, activation, channel_dim, inplace, sample_scale, backend)
    parameters = _checked_parameters(parameters, x, channel_dim)
    if not isinstance(stacked, (tuple, list, Sequence)):  # the first two spare an abstract class's three calls
        raise TypeError(f"stacked: expected a list of StackedLayer, got {type(stacked).__name__}")
    stacked = [_checked_layer(layer, k, x, channel_dim) for k, layer in enumerate(stacked, start=1)]
    h, c = _checked_state(state, x, channel_dim, len(stacked))
    if output not in OUTPUTS:
        raise ValueError(f'output: expected "sigmoid" or "tanh", got {output!r}')
    if stacked and not (isinstance(dropout, (int, float)) and 0 <= dropout <= 1):
        raise ValueError(f"dropout: expected a probability, got {dropout!r}")
    split = len(stacked) > 0 or sample_scale is not None
    folded = None
    if norm is not None:
        if split:
            folded = _fold_apart(norm, x, channel_dim, backend)
        elif shortcut is None or shortcut.dtype == x.dtype:
            folded = norms.fold(norm, x, channel_dim)
    given, norm_is_called = x, norm is not None and folded is None
    if inplace and (inplace := overwriting.worth_asking(inplace, x, norm_is_called)):
        layers = (p for layer in stacked for p in layer)
        rest = (h, c, *parameters, *layers, *norms.tensors(norm, folded), sample_scale)
        inplace = overwriting.unless_kept(inplace, x, shortcut, rest)
    if norm_is_called:
        x = _called(norm, x, channel_dim)  # type: ignore[arg-type]

    ops = None if backend == "reference" else backends.operators_of(backend, x)
    over = overwriting.target(inplace, ops, given, x, shortcut, channel_dim) if inplace else None
    directly = over is not None and over.directly
    relu, later = activation == "relu", None
    if shortcut is not None and shortcut.dtype != x.dtype:
        relu, shortcut, later = False, None, shortcut
    if split:
        y, h, c = _split_step(
            x, shortcut, h, c, parameters, stacked, sample_scale, channel_dim, relu, output, dropout, folded, backend,
            directly,
        )  # fmt: skip
    elif folded is not None:
        y, h, c = _tail_step(x, shortcut, h, c, parameters, folded, channel_dim, relu, output, ops, directly)
    elif ops is None:
        y, h, c = reference.step(x, shortcut, h, c, parameters, channel_dim, relu, output)
    elif over is not None and x is given and not autograd.exporting_to_onnx():  # a map of any strides
        h, c = ops.step_(x, shortcut, h, c, *parameters, channel_dim, relu, output == "tanh")
        y = x
    else:
        y, h, c = autograd.step(ops, x, shortcut, h, c, parameters, channel_dim, relu, output == "tanh")
    y = y if later is None else _closed(y, later, activation)
    return (y if over is None else overwriting.put(y, over)), (h, c)


fx.wrap("step")  # one node of a symbolically traced graph: its checks and choices need tensors


def _closed(y: Tensor, shortcut: Tensor | None, activation: Activation) -> Tensor:
    """``activation(y + shortcut)`` by PyTorch, with its result type."""
    y = y if shortcut is None else y + shortcut
    return torch.relu(y) if activation == "relu" else y


def _called_if_traced(norm: norms.Norm | None, x: Tensor, channel_dim: int) -> tuple[Tensor, norms.Norm | None]:
    """``(x, norm)``, under symbolic tracing ``(norm(x), None)``: no node can have a module as its argument."""
    if type(x) is not fx.Proxy or norm is None or isinstance(norm, tuple):
        return x, norm
    return norms.called(norm, x, channel_dim), None


def _called(norm: norms.Norm, x: Tensor, channel_dim: int) -> Tensor:
    """The norm of ``x``, by itself."""
    if isinstance(norm, tuple):
        width = (channels(x, channel_dim),)
        scale, bias = (
            reference.per_channel(_cast(f"norm {name}", t, width, x), x, channel_dim).to(x.dtype)
            for name, t in zip(("weight", "bias"), norms.pair(norm), strict=True)
        )
        return x * scale + bias
    if not callable(norm):
        raise TypeError(f"norm: expected a norm module, a function or a pair (scale, bias), got {type(norm).__name__}")
    y = norms.called(norm, x, channel_dim)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise ValueError(f"norm: expected a result of shape {tuple(x.shape)}, got {getattr(y, 'shape', type(y))}")
    return y


def _tail_step(x, shortcut, h, c, parameters, folded, channel_dim, relu, output, ops, directly):
    """The step with its norm folded in, and what the norm does to its buffers. ``directly``: y is written over x."""
    shape = (channels(x, channel_dim),)
    if not _all_fit([t for t in folded[:4] if t is not None], repeat(shape), x):
        folded = _cast_norm(folded, shape, x)
    gamma, beta, mean, var = folded[:4]
    first, last = (x, shortcut, h, c, gamma, beta), (folded.eps, parameters, channel_dim, relu)
    count: int | Tensor = x.numel() // max(shape[0], 1)
    tracked = None
    if folded.group is not None:
        from . import autograd_sync  # it imports the compiler, to break its graphs: slow, and rarely needed

        y, h, c, mean, var, count = autograd_sync.tail(ops, *first, *last, output, folded.group)
    elif ops is None:
        y, h, c, mean, var = reference.tail(*first, mean, var, *last, output)
    elif directly:
        last = (folded.eps, *parameters, channel_dim, relu, output == "tanh")
        h, c, mean, var = overwriting.tail(*first, mean, var, *last, False)
        y = x
    else:
        if folded.module is not None and autograd.is_plain():
            tracked = norms.tracked_by(ops, folded.module, x)
        y, h, c, mean, var = autograd_tail.tail(ops, *first, mean, var, *last, output == "tanh", tracked)
    if folded.module is not None and tracked is None:
        norms.update_buffers(folded.module, mean.detach(), var.detach(), count)
    return y, h, c


def _cast_norm(folded: norms.Folded, shape: tuple[int, ...], x: Tensor) -> norms.Folded:
    """``folded`` with its tensors in the compute dtype of ``x``, after checking everything about them."""
    names = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, var = (
        None if t is None else _cast(f"norm {k}", t, shape, x) for k, t in zip(names, folded[:4], strict=True)
    )
    return folded._replace(gamma=gamma, beta=beta, mean=mean, var=var)


def _folds_apart(x: Tensor, backend: str | None) -> bool:
    """Whether a norm before a cell that runs by itself may be folded.

    There have to be kernels; and a call that is plain or compiled, as the gradients of both parts know nothing of
    transforms.
    """
    if backend == "reference" or not (autograd.is_plain() or autograd.is_compiled()):
        return False
    return x.device.type in backends.operators_of(backend, x).folding_devices


def _fold_apart(norm: norms.Norm, x: Tensor, channel_dim: int, backend: str | None) -> norms.Folded | None:
    """What a norm before a cell that runs by itself is folded by; None where the norm has to be called by itself.

    Beyond what ``norms.fold`` asks, its statistics have to be of this process.
    """
    folded = norms.fold(norm, x, channel_dim) if _folds_apart(x, backend) else None
    return None if folded is None or folded.group is not None else folded


def _norm_pool(
    x: Tensor, folded: norms.Folded, statistics: tuple[str, ...], channel_dim: int, backend: str | None
) -> tuple[tuple[Tensor, ...], autograd_norm.Normed]:
    """``statistics`` of each channel behind a norm and what its rescaling needs; the norm's buffers are moved."""
    ops, shape = backends.operators_of(backend, x), (channels(x, channel_dim),)
    if not _all_fit([t for t in folded[:4] if t is not None], repeat(shape), x):
        folded = _cast_norm(folded, shape, x)
    tracked = None
    if folded.module is not None and not torch.compiler.is_compiling():  # then the call is plain: see _fold_apart
        tracked = norms.tracked_by(ops, folded.module, x)
    wanted = "std" in statistics, "max" in statistics
    pooled, of_batch, normed = autograd_norm.pool(ops, x, folded, channel_dim, *wanted, tracked)
    if folded.module is not None and of_batch is not None:
        norms.update_buffers(folded.module, *of_batch, x.numel() // max(shape[0], 1))
    gamma, beta = folded[:2]
    values = {"mean": pooled.p}
    if "std" in statistics:
        variance = pooled.variance if gamma is None else pooled.variance * gamma.square()
        values["std"] = (variance + STD_EPS).sqrt().to(pooled.p.dtype)
    if "max" in statistics:
        largest = pooled.extreme if gamma is None else pooled.extreme * gamma
        values["max"] = largest if beta is None else largest + beta
    return tuple(map(values.__getitem__, statistics)), normed


def _split_step(
    x, shortcut, h, c, first, rest, sample_scale, channel_dim, relu, output, dropout, folded, backend, directly
):
    """The split path: pool and rescale by their operators, the small cell between them by PyTorch.

    ``directly``: y is written over x.
    """
    normed = None
    with no_autocast(x):
        if folded is None:
            p = _parts(backend, x)[0](x, channel_dim)
        else:
            (p,), normed = _norm_pool(x, folded, ("mean",), channel_dim, backend)
        if h is None:
            h = c = p.new_zeros(len(rest) + 1, *p.shape) if rest else torch.zeros_like(p)
        if rest:
            h, c = stacked_lstm(p, h, c, first, rest, output, dropout)
        else:
            h, c, *_ = lstm(p, h, c, first, output)
        if backend != "reference":
            h, c = autograd.hand_on(h, c)  # before the rescale: the backward of y passes it too
        scale = _scaled(h[-1] if rest else h, sample_scale)
        return _rescale_of(backend, x, normed, directly)(x, scale, shortcut, channel_dim, relu), h, c


def _parts(backend: str | None, x: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Pool and rescale of ``backend``, which ``backends.chosen`` gave, for the map ``x``."""
    if backend == "reference":
        return reference.pool, reference.rescale
    ops = backends.operators_of(backend, x)
    return partial(autograd.pool, ops), partial(autograd.rescale, ops)


def _rescale_of(
    backend: str | None, x: Tensor, normed: autograd_norm.Normed | None, directly: bool
) -> Callable[..., Tensor]:
    """The rescale of ``_parts``; of a folded norm, if there is one. ``directly``: it writes over its map."""
    if normed is None:
        return overwriting.rescale if directly else _parts(backend, x)[1]
    ops = backends.operators_of(backend, x)

    def rescale(x: Tensor, scale: Tensor, shortcut: Tensor | None, channel_dim: int, relu: bool) -> Tensor:
        if directly:
            return overwriting.norm_rescale(x, scale, shortcut, normed, channel_dim, relu)
        return autograd_norm.rescale(ops, x, scale, shortcut, normed, channel_dim, relu)

    return rescale


def _scaled(scale: Tensor, sample_scale: Tensor | None) -> Tensor:
    return scale if sample_scale is None else scale * sample_scale[:, None]


def _checked_call(
    x: Tensor,
    shortcut: Tensor | None,
    activation: Activation,
    channel_dim: int,
    inplace: Inplace,
    sample_scale: Tensor | None,
    backend: str | None,
) -> tuple[str | None, Tensor | None]:
    """Checks what a call has whatever its cell; the backend to take, and ``sample_scale`` in the compute dtype."""
    _check_map(x, channel_dim)
    if shortcut is not None:
        _check_shortcut(shortcut, x)
        if inplace is True and shortcut.dtype != x.dtype:
            raise TypeError(f"shortcut: with inplace=True expected the dtype of x, {x.dtype}, got {shortcut.dtype}")
    if activation not in (None, "relu"):
        raise ValueError(f'activation: expected None or "relu", got {activation!r}')
    backend = backends.chosen(backend, x.device)
    return backend, None if sample_scale is None else _cast("sample_scale", sample_scale, (x.shape[0],), x)


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


def _all_fit(tensors: Iterable[Tensor], shapes: Iterable[tuple[int, ...]], like: Tensor) -> bool:
    """Whether ``_cast`` would return every tensor as it is: asked first, for a tenth of what asking it costs."""
    dtype, device, strided = compute_dtype(like.dtype), like.device, torch.strided
    for t, shape in zip(tensors, shapes, strict=False):  # the shapes may be endless
        if type(t) not in _PLAIN_TYPES or t.dtype is not dtype or t.shape != shape:
            return False
        if t.device != device or t.layout is not strided:
            return False
    return True


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
    if type(parameters) is not LSTMParameters:
        parameters = LSTMParameters(*_several("parameters", parameters, LSTMParameters))
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
    if _all_fit(parameters, shapes, x):
        return parameters
    return LSTMParameters(
        *(_cast(name, p, shape, x) for name, p, shape in zip(parameters._fields, parameters, shapes, strict=True))
    )


def _checked_layer(layer: StackedLayer, index: int, x: Tensor, channel_dim: int) -> StackedLayer:
    width = channels(x, channel_dim)
    shapes = ((4 * width, width), (4 * width,)) * 2
    layer = StackedLayer(*_several("stacked", layer, StackedLayer))
    return StackedLayer(
        *(_cast(f"{name}_l{index}", p, s, x) for name, p, s in zip(layer._fields, layer, shapes, strict=True))
    )


def _several(name: str, values: Any, kind: type[LSTMParameters | StackedLayer]) -> Sequence[Tensor]:
    """``values``, as many as ``kind`` has fields."""
    if not isinstance(values, (tuple, list)) or len(values) != len(kind._fields):
        raise TypeError(f"{name}: expected {kind.__name__}, {len(kind._fields)} tensors, got {type(values).__name__}")
    return values


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
    if _all_fit((h, c), (shape, shape), x):
        return h, c
    return _cast("state h", h, shape, x), _cast("state c", c, shape, x)


def _check_shortcut(shortcut: Tensor, x: Tensor) -> None:
    _check_plain("shortcut", shortcut)
    if shortcut.shape != x.shape:
        raise ValueError(f"shortcut: expected shape {tuple(x.shape)} like x, got {tuple(shortcut.shape)}")
    if shortcut.device != x.device:
        raise ValueError(f"shortcut: expected device {x.device} like x, got {shortcut.device}")
    if not shortcut.dtype.is_floating_point:
        raise TypeError(f"shortcut: expected a floating dtype, got {shortcut.dtype}")
