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

#: Unasked no smaller map is written over: its own memory would come warm from the heap (glibc maps larger ones anew),
#: and to look for who reads x takes longer than to get it.
LEAST_BYTES = 128 << 10
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def checked(inplace: object) -> Inplace:
    """The argument ``inplace``.

    Raises:
        ValueError: it is none of True, False and "auto".
    """
    if isinstance(inplace, str) and inplace == "auto":
        return "auto"
    if inplace not in (False, True):
        raise ValueError(f'inplace: expected True, False or "auto", got {inplace!r}')
    return bool(inplace)


def worth_asking(inplace: Inplace, x: Tensor, norm_is_called: bool) -> Inplace:
    """``inplace``, or False where ``"auto"`` comes to nothing by the map alone: asked first, as it costs least.

    A norm that is called by itself may keep the map, and makes another. On a GPU memory comes from torch's allocator,
    which keeps it.
    """
    if inplace != "auto":
        return inplace
    if norm_is_called or torch.compiler.is_compiling():
        return False
    is_free = x.device.type == "cpu" and x.nbytes >= LEAST_BYTES and not autograd.wants_gradient(x)
    return "auto" if is_free else False


def unless_kept(inplace: Inplace, x: Tensor, shortcut: Tensor | None, rest: Iterable[Tensor | None]) -> Inplace:
    """``inplace``, or False where ``"auto"`` meets a gradient that is to flow through one of these.

    Raises:
        ValueError: ``inplace=True`` meets one, or what ``check`` looks for beside.
    """
    if inplace is True:
        check(x, shortcut, rest)
        return True
    return False if autograd.wants_gradient(x, shortcut, *rest) else inplace


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


class Target(NamedTuple):
    """The map that a result is written over.

    ``asked``: by ``inplace=True``, not only allowed. ``directly``: an operator writes it there, not a copy.
    """

    map: Tensor
    asked: bool
    directly: bool


def target(
    inplace: Literal[True, "auto"],
    ops: operators.Operators | None,
    given: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    channel_dim: int,
) -> Target | None:
    """Where the result of a call goes whose map was ``given``, and is ``x`` behind a norm that was called by itself.

    Operators of ``ops`` write over x if it lies in memory as they would lay out their own result, apart from the
    shortcut. Unasked they alone do.
    """
    directly = (
        x is given
        and ops is operators.native
        and operators.library_error is None
        and type(x) is Tensor
        and autograd.is_plain()
        and not _is_watched()
        and x.is_contiguous(memory_format=output_format(x, channel_dim))
        and (shortcut is None or (shortcut.dtype == x.dtype and _is_apart(shortcut, x)))
    )
    asked = inplace is True
    return Target(given, asked, directly) if asked or directly else None


def _is_watched() -> bool:
    """Whether a mode sees every operation, and may keep what one returned."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_torch_function_mode_enabled()


def _is_apart(shortcut: Tensor, x: Tensor) -> bool:
    """Whether the memory that the two lie in is not in part the same."""
    a, b = shortcut.untyped_storage(), x.untyped_storage()
    first, second = a.data_ptr(), b.data_ptr()
    return first + a.nbytes() <= second or second + b.nbytes() <= first


def put(y: Tensor, over: Target) -> Tensor:
    """``y`` over the map of ``over``, if it is not there yet.

    Raises:
        ValueError: it was asked for, and a gradient flows through y, by a norm that is a function.
    """
    if y is over.map:
        return y
    if over.asked:
        check(over.map, y, ())
        return over.map.copy_(y)
    return y


def between(convolution: nn.Module, attention: nn.Module) -> Inplace:
    """``"auto"`` where ``attention`` alone gets the result of ``convolution``, else False; asked before that is called.

    Whoever has a hook on either, or on all modules, gets it too.
    """
    if type(convolution) not in _CONVOLUTIONS or torch.compiler.is_compiling():
        return False
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return False
    return "auto" if _is_unseen(convolution) and _is_unseen(attention) else False


def _is_unseen(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


# --- calls that record no gradient ---------------------------------------------------------------------


def tail(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(h', c', mean, var)`` of the operator ``tail``, whose y is written over ``x``."""
    with autograd.below_autograd():
        h, c, _, mean, var, _ = operators.native_into["tail"](x, *args, x)
    _written(x)
    return h, c, mean, var


def rescale(x: Tensor, *args: object) -> Tensor:
    """The operator ``rescale`` over ``x``."""
    with autograd.below_autograd():
        operators.native_into["rescale"](x, *args, x)
    return _written(x)


def norm_rescale(
    x: Tensor, scale: Tensor, shortcut: Tensor | None, normed: autograd_norm.Normed, channel_dim: int, relu: bool
) -> Tensor:
    """``autograd_norm.rescale`` over ``x``."""
    args = (scale, shortcut, normed.tables, *normed.tokens, normed.gamma, normed.beta, channel_dim, relu, False)
    with autograd.below_autograd():
        operators.native_into["norm_rescale"](x, *args, x)
    return _written(x)


def _written(x: Tensor) -> Tensor:
    """``x``, after telling autograd that it has other values than those that somebody may have saved."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x
