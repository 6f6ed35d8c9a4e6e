"""How torch.compile's inductor runs our operators on a CPU: their maps go into buffers of its own.

By itself the inductor calls an operator as it is, and each of its results is fresh memory, which the system must first
fill: for maps that the C library maps anew each time (32 MB and more) that takes longer than the operator. What the
inductor allocates it uses again, as soon as nobody needs it. So an operator is lowered to its form that writes into
given maps (``operators``, ``<name>_into``); and where it is the last to read a convolution's result, over that. On a
GPU memory comes from torch's allocator, which keeps it, and there is nothing to gain.

Torch has a way of its own, overloads that are tagged ``out``; in 2.14 it fails where a result is not used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import takewhile
from typing import Any

import torch
import torch.fx

from .schemas import NAMESPACE, OVER_FIRST, RESULT_MAPS

#: Where sizes of a buffer are symbols, convolutions behind it do not compile in torch 2.13 (2.11, 2.12 not tried).
_TAKES_SYMBOLS = torch.__version__ >= "2.14"  # a TorchVersion, which compares numbers


def prepare() -> None:
    """Tells the inductor, once it is there: whoever does not compile does not wait for its import."""
    if "torch._inductor.lowering" in sys.modules:
        _register()


@cache
def _register() -> None:
    from torch._inductor import lowering

    for name, maps in RESULT_MAPS.items():
        operator, into = (getattr(torch.ops.dia_kernels, n).default for n in (name, f"{name}_into"))
        lower = partial(_lower, operator, into, maps, name in OVER_FIRST)
        lowering.register_lowering(operator, type_promotion_kind=None)(lower)


def _lower(operator: Callable, into: Callable, maps: dict[int, str], over_first: bool, *args: Any) -> Any:
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
        over = over_first and _is_free(args[0], all_results[place])
        all_results[place] = args[0] if over else _buffer(all_results[place])
    # A map that is not wanted is an empty tensor of one dimension.
    given = [t if len(t.get_size()) > 1 else None for t in (all_results[place] for place in maps)]
    rest = _call(into, *args, *given)
    others = [place for place in range(len(all_results)) if place not in maps]
    for place, result in zip(others, rest if isinstance(rest, (tuple, list)) else [rest], strict=False):
        all_results[place] = result
    return tuple(all_results) if isinstance(results, (tuple, list)) else all_results[0]


def _is_free(first: Any, result: Any) -> bool:
    """Whether the first argument of the call at hand, a convolution's result, may become ``result``.

    Nobody may read it afterwards, and it has to lie in memory as the result would.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    node = V.graph.current_node
    made_by: Any = node.args[0]
    if made_by.target is not torch.ops.aten.convolution.default or sum(arg is made_by for arg in node.args) > 1:
        return False
    if not all(_comes_before(user, node) for user in made_by.users if user is not node):
        return False
    if not isinstance(first.data, ir.StorageBox) or not isinstance(first.data.data, ir.Buffer):
        return False
    layouts = [t.get_layout() for t in (first, result)]
    return layouts[0].size == layouts[1].size and layouts[0].stride == layouts[1].stride


def _comes_before(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    """Whether ``user``, before ``node``, is an operator of ours, whose results share no memory with its arguments."""
    ours = getattr(user.target, "namespace", None) == NAMESPACE
    return ours and any(earlier is user for earlier in takewhile(lambda other: other is not node, node.graph.nodes))


def _call(operator: Callable, *args: Any) -> Any:
    from torch._inductor import lowering

    return lowering.fallback_handler(operator, add_to_fallback_set=False)(*args)


def _buffer(like: Any) -> Any:
    """Uninitialised memory with the layout of a result, which the inductor gives out and takes back."""
    from torch._inductor import lowering

    layout = like.get_layout()
    return lowering.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device=layout.device)
