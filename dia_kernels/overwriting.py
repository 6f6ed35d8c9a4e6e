"""Results written over the map that an operator reads: when that may be, and the calls that do it.

A map of 32 MB or more is fresh memory, which the system first has to fill (docs/kernels.md, huge pages); what is
written over is there already. ``inplace=True`` asks for it and is refused where something keeps x. ``inplace="auto"``
allows it: the caller does not read x any more, and wherever it would not be right, or gain nothing, y is a map of its
own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import autograd, autograd_norm, operators
from .layout import output_format, shares_memory

Inplace = bool | Literal["auto"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check(x: Tensor, shortcut: Tensor | None, rest: Iterable[Tensor | None]) -> None:
    """Raises ValueError where ``x`` may not be written over by a call with these arguments."""
    if autograd.wants_gradient(x, shortcut, *rest) or autograd.transforms_active():
        raise ValueError(
            "inplace: expected False where a gradient is needed (the step must keep x), got True; "
            "use torch.no_grad() or torch.inference_mode()"
        )
    if torch.autograd.forward_ad._current_level >= 0:
        raise ValueError("inplace: expected False under forward-mode differentiation, got True")
    if shares_memory(x):
        raise ValueError("inplace: x is an expanded tensor, several of its elements share memory")


class Over(NamedTuple):
    """The map that a result is written over.

    ``asked``: by ``inplace=True``, not only allowed. ``directly``: an operator writes it there, not a copy.
    """

    map: Tensor
    asked: bool
    directly: bool


def over(
    inplace: Inplace,
    ops: operators.Operators | None,
    given: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    rest: Iterable[Tensor | None],
    channel_dim: int,
) -> Over | None:
    """Where the result of a call goes whose map was ``given``, and is ``x`` behind a norm that had to be called.

    Operators of ``ops`` write over x if it lies in memory as they would lay out their own result, apart from the
    shortcut. Unasked they alone do, and not on a GPU, whose memory comes from torch's allocator, which keeps it.
    """
    if not inplace:
        return None
    directly = (
        x is given
        and ops is operators.native
        and type(x) is Tensor
        and autograd.is_plain()
        and torch._C._len_torch_dispatch_stack() == 0
        and x.is_contiguous(memory_format=output_format(x, channel_dim))
        and (shortcut is None or _is_apart(shortcut, x))
    )
    if inplace is True:
        return Over(given, True, directly)
    kept = autograd.wants_gradient(x, shortcut, *rest) or shares_memory(x)
    return Over(given, False, True) if directly and x.device.type == "cpu" and not kept else None


def put(y: Tensor, target: Over | None) -> Tensor:
    """``y`` over the map of ``target``, if it is not there yet.

    Raises:
        ValueError: it was asked for, and a gradient flows through y, by a cell's state.
    """
    if target is None or y is target.map:
        return y
    if target.asked:
        check(target.map, y, ())
        return target.map.copy_(y)
    return y


def _is_apart(shortcut: Tensor, x: Tensor) -> bool:
    """Whether the two have the same dtype, as one operator takes them, and no memory in common."""
    return shortcut.dtype == x.dtype and shortcut.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def is_fresh(result: Tensor, module: nn.Module) -> bool:
    """Whether nobody but its caller has the ``result`` of ``module``: a convolution that no hook looks at.

    Not where a graph is traced: who runs it may ask for any of its values.
    """
    if type(result) is not Tensor or type(module) not in _CONVOLUTIONS or torch.compiler.is_compiling():
        return False
    return not (module._forward_hooks or nn.modules.module._global_forward_hooks)


def tail(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(h', c', mean, var)`` of the operator ``tail``, whose y is written over ``x``; no gradient is recorded."""
    with autograd.below_autograd():
        h, c, _, mean, var, _ = operators.native_into["tail"](x, *args, x)
    _written(x)
    return h, c, mean, var


def rescale(x: Tensor, *args: object) -> Tensor:
    """The operator ``rescale`` over ``x``; no gradient is recorded."""
    with autograd.below_autograd():
        operators.native_into["rescale"](x, *args, x)
    return _written(x)


def norm_rescale(
    x: Tensor, scale: Tensor, shortcut: Tensor | None, normed: autograd_norm.Normed, channel_dim: int, relu: bool
) -> Tensor:
    """``autograd_norm.rescale`` over ``x``; no gradient is recorded."""
    args = (scale, shortcut, normed.tables, *normed.tokens, normed.gamma, normed.beta, channel_dim, relu, False)
    with autograd.below_autograd():
        operators.native_into["norm_rescale"](x, *args, x)
    return _written(x)


def _written(x: Tensor) -> Tensor:
    """``x``, after telling autograd that it has other values than those that somebody may have saved."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x
