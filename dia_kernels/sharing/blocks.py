"""Which modules of a network are residual blocks, and which of them follow each other in a stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import fx, nn

from . import tails
from .rewriting import Adapter
from .tails import WEIGHTED, Tail, module_of
from .tracing import Untraceable, mode, trace, trace_both

#: What ``include`` and ``exclude`` hold: patterns of qualified names (``layer4.*``), or classes.
Pattern = str | type[nn.Module]
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass
class Traced:
    """A block by its graphs: that in training and, where it differs, that in evaluation, with the tails of each."""

    graphs: list[tuple[fx.Graph, list[Tail]]]


@dataclass
class Candidate:
    """A residual block.

    Attributes:
        name: qualified, in the network.
        channels, channel_dim: of the maps at its tail.
        begins_stage: whether it cannot go on with the state of the block before.
        how: by its graphs, or by an adapter.
    """

    name: str
    module: nn.Module
    channels: int
    channel_dim: int
    begins_stage: bool
    how: Traced | Adapter


@dataclass
class Found:
    """Blocks in the network's order, and why other modules are none."""

    candidates: list[Candidate] = field(default_factory=list)
    rejected: dict[str, list[str]] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)
    untraceable_modules: dict[str, nn.Module] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def matches(patterns: Iterable[Pattern], name: str, module: nn.Module) -> bool:
    return any(fnmatchcase(name, p) if isinstance(p, str) else isinstance(module, p) for p in patterns)


def find(
    model: nn.Module,
    *,
    include: tuple[Pattern, ...] | None,
    exclude: tuple[Pattern, ...],
    replace: bool,
    adapters: Mapping[type[nn.Module], Adapter],
) -> Found:
    """The residual blocks of ``model``, deepest first, so that what holds blocks is known not to be one."""
    found, blocks = Found(), set()
    for name, module in reversed(list(model.named_modules())):
        named = include is not None and matches(include, name, module)
        if not _could_be(module) or (include is not None and not named):
            continue
        if matches(exclude, name, module):
            found.left[name] = "excluded"
            continue
        if type(module) in adapters:
            adapter = adapters[type(module)]
            begins = adapter.begins_stage is not None and adapter.begins_stage(module)
            found.candidates.append(
                Candidate(name, module, adapter.channels(module), adapter.channel_dim, begins, adapter)
            )
            blocks.add(module)
            continue
        candidate = _traced(found, name, module, blocks, replace, named)
        if candidate is not None:
            found.candidates.append(candidate)
            blocks.add(module)
    found.candidates.reverse()
    return found


def _could_be(module: nn.Module) -> bool:
    """Whether a branch with weights could be among its children; PyTorch's own modules are no blocks of anybody's."""
    return not type(module).__module__.startswith("torch.nn.") and any(
        isinstance(child, WEIGHTED) for child in module.modules() if child is not module
    )


def _traced(
    found: Found, name: str, module: nn.Module, blocks: set[nn.Module], replace: bool, named: bool
) -> Candidate | None:
    try:
        training, evaluation = trace_both(module)
    except Untraceable as reason:
        found.untraceable[name] = str(reason)
        found.untraceable_modules[name] = module
        return None
    graphs = []
    for graph, is_training in ((training, True), (evaluation, False)):
        if graph is not None:
            with mode(module, is_training):
                of_graph, reasons, more = tails.find(module, graph, blocks, replace)
            graphs.append((graph, of_graph))
            if reasons:
                found.rejected[name] = reasons
            if more and of_graph:
                found.left[name] = f"one of its tails cannot join: {reasons[-1]}"
                return None
    counts = {len(of_graph) for _, of_graph in graphs}
    if counts == {0}:
        return None
    of_training = graphs[0][1]
    if len(counts) > 1:
        found.left[name] = "its tails in training are not those in evaluation"
    elif len(of_training) > 1 and not named:
        found.left[name] = (
            f"{len(of_training)} tails in one block, as in transformers: no place for attention is known; to give "
            "each tail attention name the block in include"
        )
    elif len({(tail.channels, tail.channel_dim) for tail in of_training}) > 1:
        found.left[name] = "its tails have different numbers of channels"
    else:
        tail = of_training[0]
        return Candidate(name, module, tail.channels, tail.channel_dim, tail.strided, Traced(graphs))
    return None


def rank(block: nn.Module) -> int:
    """Number of spatial dimensions of the block's maps, as its convolutions tell; without any they are tokens."""
    return next((len(m.kernel_size) for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd)), 1)


# --- stages ---------------------------------------------------------------------------------------------------


#: Who calls blocks, by qualified name, with their graphs: None of what cannot be traced.
Owners = dict[str, fx.Graph | None]


def stages(model: nn.Module, owners: Owners, candidates: list[Candidate]) -> list[list[Candidate]]:
    """Runs of blocks that feed straight into each other, of one width."""
    before = _predecessors(model, owners)
    by_name = {c.name: c for c in candidates}
    runs: list[list[Candidate]] = []
    run_of: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        previous = by_name[before[candidate.name]] if before.get(candidate.name) in by_name else None
        joins = (
            previous is not None
            and not candidate.begins_stage
            and (previous.channels, previous.channel_dim) == (candidate.channels, candidate.channel_dim)
        )
        run = run_of[previous.name] if joins and previous is not None else []
        if not run:
            runs.append(run)
        run.append(candidate)
        run_of[candidate.name] = run
    return runs


def _predecessors(model: nn.Module, owners: Owners) -> dict[str, str]:
    """Of a block the module whose result goes to it, and nowhere else."""
    before: dict[str, str] = {}
    for owner, graph in owners.items():
        module = model.get_submodule(owner)
        chain = _chain(module) if type(module).forward is nn.Sequential.forward else _calls(module, graph)
        prefix = f"{owner}." if owner else ""
        before.update({prefix + after: prefix + first for first, after in chain})
    return before


def called_with_more(owners: Owners, candidates: list[Candidate]) -> dict[str, str]:
    """Of blocks that get more arguments than their graphs take, the reason to leave them alone."""
    by_name = {c.name: c for c in candidates}
    found = {}
    for owner, graph in owners.items():
        prefix = f"{owner}." if owner else ""
        for node in graph.nodes if graph is not None else ():
            candidate = by_name.get(f"{prefix}{node.target}") if node.op == "call_module" else None
            if candidate is not None and isinstance(candidate.how, Traced):
                taken = [n for n in candidate.how.graphs[0][0].nodes if n.op == "placeholder" and not n.args]
                if len(node.args) + len(node.kwargs) > len(taken):
                    found[candidate.name] = "it is called with more arguments than its graph takes"
    return found


def owners(model: nn.Module, candidates: list[Candidate]) -> Owners:
    """Who calls ``candidates``."""
    found: Owners = {}
    for owner in dict.fromkeys(_owner(model, c.name) for c in candidates):
        module = model.get_submodule(owner)
        try:
            with mode(module, True):
                found[owner] = trace(module)
        except Untraceable:
            found[owner] = None
    return found


def _owner(model: nn.Module, name: str) -> str:
    """Who calls the module ``name``: the nearest above it that has a forward."""
    owner = name.rpartition(".")[0]
    while isinstance(model.get_submodule(owner), _CONTAINERS):
        owner = owner.rpartition(".")[0]
    return owner


def _chain(module: nn.Module) -> Iterator[tuple[str, str]]:
    names = [name for name, _ in module.named_children()]
    return pairwise(names)


def _calls(module: nn.Module, graph: fx.Graph | None) -> Iterator[tuple[str, str]]:
    """Pairs of the modules that ``module`` calls, the one's result going to the other alone; none if none can tell."""
    if graph is None:
        return
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if module_of(module, node) is None or called.count(str(node.target)) != 1:
            continue
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and module_of(module, first) is not None and len(first.users) == 1:
            yield str(first.target), str(node.target)
