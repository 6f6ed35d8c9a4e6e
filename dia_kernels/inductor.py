"""How torch.compile's inductor runs our operators on a CPU: their maps go into buffers of its own.

By itself the inductor calls an operator as it is, and each of its results is fresh memory, which the system must first
fill: for maps that the C library maps anew each time (32 MB and more) that takes longer than the operator. What the
inductor allocates it uses again, as soon as nobody needs it. So an operator is lowered to its form that writes into
given maps (``operators``, ``<name>_into``); and where it is the last to read its shortcut, or else its map, over that.
On a GPU memory comes from torch's allocator, which keeps it, and there is nothing to gain.

The shortcut rather than the map, a convolution's result: so what a stage hands on stays where it is, and the memory of
a convolution is free again before the next one needs it, as the inductor has it in a network without attention. Over
the convolutions' results it would move from block to block, and the C library, whose heap it leaves in pieces, gives
memory back to the system that is wanted again at once.

Torch has a way of its own, overloads that are tagged ``out``; in 2.14 it fails where a result is not used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import takewhile
from operator import getitem
from typing import Any

import torch
import torch.fx

from .schemas import NAMESPACE, OVER, RESULT_MAPS

#: Where sizes of a buffer are symbols, convolutions behind it do not compile in torch 2.13 (2.11, 2.12 not tried).
_TAKES_SYMBOLS = torch.__version__ >= "2.14"  # a TorchVersion, which compares numbers
_ATEN = torch.ops.aten
#: What makes a map in memory of its own, and when it is called: pointwise ones the inductor puts off, but not beyond a
#: call that writes over what they read. (A norm in inference is made of them.)
_APART = (
    _ATEN.convolution.default,
    _ATEN.add.Tensor,
    _ATEN.sub.Tensor,
    _ATEN.mul.Tensor,
    _ATEN.relu.default,
)


def prepare() -> None:
    """Tells the inductor, once it is there: whoever does not compile does not wait for its import."""
    if "torch._inductor.lowering" in sys.modules:
        _register()


@cache
def _register() -> None:
    from torch._inductor import lowering

    for name, maps in RESULT_MAPS.items():
        operator, into = (getattr(torch.ops.dia_kernels, n).default for n in (name, f"{name}_into"))
        lower = partial(_lower, operator, into, maps, OVER.get(name, ()))
        lowering.register_lowering(operator, type_promotion_kind=None)(lower)


def _lower(operator: Callable, into: Callable, maps: dict[int, str], over: tuple[int, ...], *args: Any) -> Any:
    """Puts a call of ``operator`` into the inductor's graph, as one of ``into``."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    # The operator as it is. Where it only tells what its results look like, nobody uses it, and it does not run.
    results = _call(operator, *args)
    devices = {str(arg.get_device()) for arg in args if isinstance(arg, ir.IRNode)}
    if devices != {"cpu"} or V.graph.cpp_wrapper:
        return results
    all_results = list(results) if isinstance(results, (tuple, list)) else [results]
    sizes = [size for place in maps for size in all_results[place].get_size()]
    if not _TAKES_SYMBOLS and any(getattr(size, "free_symbols", None) for size in sizes):
        return results
    for place in maps:
        free = _free_argument(over, args, all_results[place])
        all_results[place] = _buffer(all_results[place]) if free is None else free
    # A map that is not wanted is an empty tensor of one dimension.
    given = [t if len(t.get_size()) > 1 else None for t in (all_results[place] for place in maps)]
    rest = _call(into, *args, *given)
    others = [place for place in range(len(all_results)) if place not in maps]
    for place, result in zip(others, rest if isinstance(rest, (tuple, list)) else [rest], strict=False):
        all_results[place] = result
    return tuple(all_results) if isinstance(results, (tuple, list)) else all_results[0]


def _free_argument(places: tuple[int, ...], args: tuple, result: Any) -> Any:
    """Of the arguments of the call at hand in ``places``, the last that may become ``result``; None if none may."""
    from torch._inductor.virtualized import V

    node = V.graph.current_node
    for place in reversed(places):
        if _is_free(node.args[place], node) and _lies_like(args[place], result):
            return args[place]
    return None


def _is_free(value: Any, node: torch.fx.Node) -> bool:
    """Whether ``value``, an argument of ``node``, has memory of its own, and nobody reads it afterwards."""
    if not isinstance(value, torch.fx.Node) or sum(arg is value for arg in node.args) > 1:
        return False
    if not _is_apart(value.args[0] if value.target is getitem else value):
        return False
    return all(_comes_before(user, node) for user in value.users if user is not node)


def _is_apart(node: Any) -> bool:
    """Whether the results of ``node`` share no memory with its arguments."""
    return node.target in _APART or getattr(node.target, "namespace", None) == NAMESPACE


def _comes_before(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    """Whether ``user`` has read its arguments before ``node``, and nobody else can read them through its results."""
    earlier = takewhile(lambda other: other is not node, node.graph.nodes)
    return _is_apart(user) and any(other is user for other in earlier)


def _lies_like(argument: Any, result: Any) -> bool:
    """Whether ``argument`` is a whole buffer, which lies in memory as ``result`` would."""
    from torch._inductor import ir

    if not isinstance(argument.data, ir.StorageBox) or not isinstance(argument.data.data, ir.Buffer):
        return False
    layouts = [t.get_layout() for t in (argument, result)]
    return layouts[0].size == layouts[1].size and layouts[0].stride == layouts[1].stride


def _call(operator: Callable, *args: Any) -> Any:
    from torch._inductor import lowering

    return lowering.fallback_handler(operator, add_to_fallback_set=False)(*args)


def _buffer(like: Any) -> Any:
    """Uninitialised memory with the layout of a result, which the inductor gives out and takes back."""
    from torch._inductor import lowering

    layout = like.get_layout()
    return lowering.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device=layout.device)
