"""A block whose tail calls attention: the graph with the tail replaced, as the forward of a subclass of its class.

``isinstance``, attributes, state-dict keys and hooks survive, as the object is the same. State goes along with the map:
the first block of a stage takes the map and returns (map, state), those in the middle take and return such a pair, the
last returns the map alone. So ``nn.Sequential`` and loops over blocks hand it on without knowing.
"""

from __future__ import annotations

import importlib
import linecache
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from torch import Tensor, fx, nn

from ..attention import inplace_between
from ..functional import State
from ..overwriting import Inplace
from .tails import Tail, drops_samples, module_of, source

#: Attributes that a converted block has.
ATTENTION, EXTRA_NORM = "attention", "attention_norm"
#: Attribute of a converted block's class.
RECIPE = "_dia_kernels_recipe"


@dataclass(frozen=True)
class Role:
    """Whether a block begins or ends its stage."""

    first: bool
    last: bool


@dataclass(frozen=True)
class Source:
    """A forward as Python text, and what the names in it mean."""

    text: str
    names: tuple[tuple[str, tuple[str, Any]], ...]

    @property
    def key(self) -> tuple:
        """Equal for sources that mean the same: the same text may call other functions of the same name."""
        return self.text, *((name, what if kind == "module" else id(what)) for name, (kind, what) in self.names)

    def function(self) -> Any:
        names = {name: _from_portable(value) for name, value in self.names}
        path = f"<dia_kernels.sharing {next(_numbers)}>"
        linecache.cache[path] = (len(self.text), None, self.text.splitlines(keepends=True), path)
        exec(compile(self.text, path, "exec"), names)
        return names["forward"]


_numbers = count()


def _portable(value: Any) -> Any:
    """What pickle can hold: modules and the like by their name."""
    return ("module", value.__name__) if isinstance(value, types.ModuleType) else ("value", value)


def _from_portable(value: tuple[str, Any]) -> Any:
    kind, what = value
    return importlib.import_module(what) if kind == "module" else what


# --- what the text of a rewritten block calls ---------------------------------------------------------------


def with_state(carried: Any) -> tuple[Tensor, State]:
    """The map and the state that the block before hands on.

    Raises:
        RuntimeError: the block was called with the map alone.
    """
    if type(carried) is not tuple or len(carried) != 2:
        raise RuntimeError(
            "this block stands in the middle of a stage and shares the stage's attention: it takes the pair "
            "(map, state) that the block before returns, not a map alone; call the stage from its first block on"
        )
    return carried


def sample_scale(drop: nn.Module, x: Tensor) -> Tensor | None:
    """The factor (N,) that stochastic depth draws for each sample; None where it drops nothing.

    ``drop`` draws it itself, of ones: the same random numbers as before.
    """
    if not drop.training or getattr(drop, "p", getattr(drop, "drop_prob", None)) == 0:
        return None
    return drop(x.new_ones((x.shape[0], 1))).view(-1)


def attend(
    attention: nn.Module, x: Tensor, state: State | None, inplace: Inplace = False, **options: Any
) -> tuple[Tensor, State]:
    """The stage's attention; ``inplace`` as ``inplace_between`` says.

    Tools that trace the network take the last node within a module for its result. What the shared unit does for any
    block would count as the first block's, which registers it; so under a trace its forward is called, not itself.
    """
    if isinstance(x, fx.Proxy):
        return attention.forward(x, state, **options)
    if inplace:
        options["inplace"] = inplace
    return attention(x, state, **options)


class Attend(Protocol):
    """The stage's attention, as an adapter's forward calls it."""

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        """``SharedAttention.forward`` without its state: the options are shortcut, activation, norm, sample_scale."""


@dataclass(frozen=True)
class Adapter:
    """How a block that cannot be traced calls attention; for ``share_attention(adapters={Class: Adapter(...)})``.

    Attributes:
        forward: ``forward(block, attend, *args, **kwargs)``, what the block's own forward computes with one or more
            ``attend(x, shortcut=..., activation=..., norm=...)`` in it. A function of a module, for pickle's sake.
        channels: of a block, C of the maps that it hands to ``attend``.
        channel_dim: of those maps.
        begins_stage: of a block, whether it may not go on with the state of the block before.
    """

    forward: Callable[..., Tensor]
    channels: Callable[[nn.Module], int]
    channel_dim: int = 1
    begins_stage: Callable[[nn.Module], bool] | None = None


class _Attending:
    def __init__(self, attention: nn.Module, state: State | None) -> None:
        self.attention, self.state, self.calls = attention, state, 0

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        y, self.state = attend(self.attention, x, self.state, **options)
        self.calls += 1
        return y


@dataclass(frozen=True)
class Adapted:
    """A forward by an adapter."""

    adapter: Adapter
    role: Role

    @property
    def key(self) -> tuple:
        return self.adapter, self.role

    def function(self) -> Callable[..., Any]:
        def forward(block: Any, carried: Any, *args: Any, **kwargs: Any) -> Any:
            x, state = (carried, None) if self.role.first else with_state(carried)
            attend = _Attending(getattr(block, ATTENTION), state)
            y = self.adapter.forward(block, attend, x, *args, **kwargs)
            if attend.calls == 0:
                raise RuntimeError(f"adapters: the forward given for {type(block).__name__} did not call attend")
            return y if self.role.last else (y, attend.state)

        return forward


# --- the graph ------------------------------------------------------------------------------------------------


def rewrite(root: nn.Module, graph: fx.Graph, tails: list[Tail], role: Role, extra_norm: bool) -> set[str]:
    """Makes ``graph`` that of the block with attention in its tails; returns the children that it calls no more.

    Those are what attention that is replaced consisted of.
    """
    before = _called(graph)
    kept = {str(tail.norm.target) for tail in tails if tail.norm is not None}
    kept |= {str(drop.target) for tail in tails for drop in tail.passed}
    kept |= {str(tail.relu.target) for tail in tails if tail.relu is not None}
    state: fx.Node | None = None
    if not role.first:
        carried, pair, x, state = _take_state(graph)
    for tail in tails:
        state = _attend(root, graph, tail, state, extra_norm)
    if not role.first:
        # Last of all: the tails know the argument, not what takes its place.
        carried.replace_all_uses_with(x, delete_user_cb=lambda user: user is not pair)
    if not role.last:
        output = next(node for node in graph.nodes if node.op == "output")
        output.args = ((output.args[0], state),)
    return before - _called(graph) - kept


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _take_state(graph: fx.Graph) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """Unpacks what the block before hands on, before anything else: that argument, the pair, the map, the state."""
    carried = next(node for node in graph.nodes if node.op == "placeholder")
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        pair = graph.call_function(with_state, (carried,))
    with graph.inserting_after(pair):
        x = graph.call_function(operator.getitem, (pair, 0))
    with graph.inserting_after(x):
        state = graph.call_function(operator.getitem, (pair, 1))
    carried.type = None
    return carried, pair, x, state


def _attend(root: nn.Module, graph: fx.Graph, tail: Tail, state: fx.Node | None, extra_norm: bool) -> fx.Node:
    drops = tail.drops(root)
    samples = [drop for drop in drops if drops_samples(module_of(root, drop))]  # type: ignore[arg-type]
    fusible = len(samples) == len(drops) <= 1
    with graph.inserting_before(tail.addition):
        options: dict[str, Any] = {}
        x = tail.x
        if tail.norm is not None:
            options["norm"] = graph.get_attr(str(tail.norm.target))
            x = source(tail.norm)
        elif extra_norm:
            options["norm"] = graph.get_attr(EXTRA_NORM)
        if fusible:
            options["shortcut"] = tail.shortcut
            if tail.relu is not None:
                options["activation"] = "relu"
            if samples:
                options["sample_scale"] = graph.call_function(sample_scale, (graph.get_attr(str(samples[0].target)), x))
        if x.op == "call_module" and len(x.users) == 1 + ("sample_scale" in options):
            with graph.inserting_before(x):  # a hook may be gone afterwards
                both = graph.get_attr(str(x.target)), graph.get_attr(ATTENTION)
                options["inplace"] = graph.call_function(inplace_between, both)
        pair = graph.call_function(attend, (graph.get_attr(ATTENTION), x, state), options)
        # The state first: tools take a module's last node for its output.
        new_state = graph.call_function(operator.getitem, (pair, 1))
        y = graph.call_function(operator.getitem, (pair, 0))
    erased: list[fx.Node | None] = []
    if fusible:
        (tail.relu or tail.addition).replace_all_uses_with(y)
        erased += [tail.relu, tail.addition, *reversed(tail.passed)]
    else:
        tail.passed[0].args = (y,)
        # They run before the addition, but maybe before the attention as well.
        for node in tail.passed:
            tail.addition.prepend(node)
    replaced = tail.attention if tail.attention is not tail.x else None
    for gone in erased:
        if gone is not None:
            graph.erase_node(gone)
    if replaced is not None:
        _erase_with_sources(graph, replaced, tail.x)
    if tail.norm is not None:
        graph.erase_node(tail.norm)  # which raises if anything still uses it: a norm called twice would count twice
    return new_state


def _erase_with_sources(graph: fx.Graph, node: fx.Node, last: fx.Node) -> None:
    """``node``, and what it alone is made of back to ``last``: a gate written out in a block."""
    made_of = [n for n in node.all_input_nodes if n is not last]
    graph.erase_node(node)
    for each in made_of:
        if not each.users and each.op != "placeholder":
            _erase_with_sources(graph, each, last)


# --- the class ------------------------------------------------------------------------------------------------


def source_of(graph: fx.Graph) -> Source:
    """``graph`` as text."""
    code = graph.python_code("self")
    names = {name: value for name, value in code.globals.items() if name in code.src}
    return Source(code.src, tuple((name, _portable(value)) for name, value in names.items()))


@dataclass(frozen=True)
class Recipe:
    """All that makes the class of a converted block: pickle holds this."""

    base: type[nn.Module]
    training: Source | Adapted
    evaluation: Source | None


_classes: dict[tuple, type[nn.Module]] = {}


def class_of(recipe: Recipe) -> type[nn.Module]:
    """The subclass of ``recipe.base`` with the rewritten forward; the same one for the same recipe."""
    key = (recipe.base, recipe.training.key, None if recipe.evaluation is None else recipe.evaluation.key)
    if key not in _classes:
        _classes[key] = _new_class(recipe)
    return _classes[key]


def _new_class(recipe: Recipe) -> type[nn.Module]:
    base = recipe.base
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_replicate_for_data_parallel": _refuse_replica,
        RECIPE: recipe,
    }
    if recipe.evaluation is None:
        members["forward"] = recipe.training.function()
    else:
        members["_forward_in_training"] = recipe.training.function()
        members["_forward_in_evaluation"] = recipe.evaluation.function()
        members["forward"] = _forward_by_mode
    return type(base.__name__, (base,), members)


def _forward_by_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
    return (self._forward_in_training if self.training else self._forward_in_evaluation)(*args, **kwargs)


def _refuse_replica(self: nn.Module) -> nn.Module:
    raise RuntimeError(
        "nn.DataParallel copies blocks one by one, and the copies would share the first device's attention; use "
        "nn.parallel.DistributedDataParallel"
    )


def _reduce(self: Any, protocol: Any) -> tuple:
    """The class is made here, so pickle gets what makes it."""
    return _rebuild, (getattr(type(self), RECIPE),), object.__reduce_ex__(self, 2)[2]


def _rebuild(recipe: Recipe) -> nn.Module:
    cls = class_of(recipe)
    return cls.__new__(cls)


def is_converted(module: nn.Module) -> bool:
    """Whether ``module`` is a block that shares attention."""
    return hasattr(type(module), RECIPE)
