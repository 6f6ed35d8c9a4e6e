"""``share_attention``: any residual network becomes one whose stages share attention, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..attention import create_attention
from ..cells import check_positive
from . import blocks, preserve
from .blocks import Candidate, Pattern, Traced
from .errors import SharingError
from .report import Block, Report, Stage
from .rewriting import (
    ATTENTION,
    EXTRA_NORM,
    Adapted,
    Adapter,
    Recipe,
    Role,
    class_of,
    is_converted,
    rewrite,
    source_of,
)
from .tails import Tail, drops_samples, module_of

#: A cell's name (``dia_kernels.attention.CELLS``), or what makes a cell or an attention module of C channels.
CellSpec = str | Callable[[int], nn.Module]
_REPORT = "_dia_kernels_report"


def share_attention(
    model: nn.Module,
    cell: CellSpec = "lstm",
    reduction: int = 4,
    *,
    existing: Literal["keep", "replace", "error"] = "keep",
    extra_norm: Literal["batch"] | None = None,
    min_blocks: int = 1,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern = (),
    init: Literal["default", "preserve"] = "default",
    adapters: Mapping[type[nn.Module], Adapter] | None = None,
    per_block: bool = False,
    backend: str | None = None,
    dry_run: bool = False,
) -> Any:
    """Gives each stage of a residual network one attention unit that all its blocks share, in place.

    A block's tail, ``act(norm(z) + shortcut)``, becomes ``act(norm(z) * h + shortcut)`` in one fused call
    (arXiv:1905.10671, section 3). Load plain weights before. How blocks and stages are found: docs/sharing.md.

    Args:
        model: any network; blocks are found by tracing each module's own forward.
        cell: name of a cell, or a function that makes a ``Cell`` or an attention module of a number of channels.
        reduction: r of the cell's bottleneck.
        existing: attention that blocks have at their tails already (SE, ECA, ...): ``"keep"`` it before the shared
            one, ``"replace"`` it, or ``"error"``.
        extra_norm: ``"batch"`` puts a batch norm before attention where no norm ends the branch, as the authors do in
            pre-activation networks.
        min_blocks: stages of fewer blocks are left alone.
        include: patterns of block names (``"layer4.*"``) or classes; None for every block that is found. A block
            with several tails (a transformer's) has to be named; each of its tails then calls attention in turn.
        exclude: patterns or classes of blocks to leave alone.
        init: ``"default"``; or ``"preserve"``, the network computes what it did before: attention begins as a
            constant, which the layer before it is divided by.
        adapters: by class, how blocks that cannot be traced call attention.
        per_block: every block has a unit of its own, as SE has.
        backend: of the attention; None for the best one here.
        dry_run: change nothing, return the report.

    Returns:
        ``model`` itself, or the report of a dry run; ``sharing.report(model)`` returns that of a converted one.

    Raises:
        SharingError: no tails found, already converted, a block's sibling cannot be traced, several tails in the only
            blocks there are, a name is taken, existing attention with ``"error"``, a network that ``"preserve"``
            cannot keep.
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    _check(model, reduction, existing, extra_norm, min_blocks, init)
    include = None if include is None else _patterns("include", include)
    exclude = _patterns("exclude", exclude)
    adapters = adapters or {}
    if not (isinstance(adapters, Mapping) and all(isinstance(a, Adapter) for a in adapters.values())):
        raise TypeError(f"adapters: expected a dict of an Adapter for each class, got {adapters!r}")
    found = blocks.find(model, include=include, exclude=exclude, replace=existing == "replace", adapters=adapters)
    _check_siblings(found)
    owners = blocks.owners(model, found.candidates)
    more = blocks.called_with_more(owners, found.candidates)
    found.left.update(more)
    found.candidates = [c for c in found.candidates if c.name not in more]
    runs = [[c] for c in found.candidates] if per_block else blocks.stages(model, owners, found.candidates)
    for run in runs:
        if len(run) < min_blocks:
            found.left.update({c.name: f"its stage has {len(run)} of at least {min_blocks} blocks" for c in run})
    runs = [run for run in runs if len(run) >= min_blocks]
    if not runs:
        raise SharingError(_nothing(found))
    _check_blocks(runs, existing, extra_norm)
    name = cell if isinstance(cell, str) else getattr(cell, "__name__", type(cell).__name__)
    report = Report(name, [], found.rejected, found.untraceable, found.left, existing)
    # Nothing is drawn for a dry run.
    with torch.device("meta") if dry_run else nullcontext():
        units = [_unit(run, cell, reduction, backend) for run in runs]
    report.stages = [
        _described(run, unit, extra_norm is not None, reduction) for run, unit in zip(runs, units, strict=True)
    ]
    if dry_run:
        return report
    for run, unit in zip(runs, units, strict=True):
        _like_block(unit, run[0].module)
    # All that can fail comes first: an error leaves the network as it was.
    changes = [
        _change(candidate, unit, Role(place == 0, place == len(run) - 1), extra_norm is not None)
        for run, unit in zip(runs, units, strict=True)
        for place, candidate in enumerate(run)
    ]
    if init == "preserve":
        _check_preservable(changes)
        preserve.hold(list(zip(runs, units, strict=True)))
    for change in changes:
        _convert(change)
    object.__setattr__(model, _REPORT, report)
    return model


def report(model: nn.Module) -> Report:
    """What ``share_attention`` did to ``model``.

    Raises:
        ValueError: it was not converted.
    """
    found = getattr(model, _REPORT, None)
    if found is None:
        raise ValueError("model: expected a network that share_attention has converted")
    return found


# --- checks -----------------------------------------------------------------------------------------------------


def _patterns(name: str, patterns: Iterable[Pattern] | Pattern) -> tuple[Pattern, ...]:
    if isinstance(patterns, (str, type)):
        return (patterns,)
    found = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if not all(isinstance(pattern, (str, type)) for pattern in found):
        raise TypeError(f"{name}: expected patterns of names or classes, got {patterns!r}")
    return found


def _check(model: object, reduction: int, existing: str, extra_norm: str | None, min_blocks: int, init: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_positive("reduction", reduction)
    for name, value, known in (
        ("existing", existing, ("keep", "replace", "error")),
        ("extra_norm", extra_norm, (None, "batch")),
        ("init", init, ("default", "preserve")),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    check_positive("min_blocks", min_blocks)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise SharingError(f"model: convert the network before {type(model).__name__} wraps it")
    converted = [name for name, module in model.named_modules() if is_converted(module)]
    if converted:
        raise SharingError(f"model: already converted: {converted[0]} and {len(converted) - 1} other blocks")


def _check_siblings(found: blocks.Found) -> None:
    """A block of a class that is converted, but cannot be traced itself, would shorten its stage in silence."""
    classes = {type(c.module) for c in found.candidates}
    for name, module in found.untraceable_modules.items():
        if type(module) in classes:
            raise SharingError(
                f"{name}: cannot be traced ({found.untraceable[name]}), but other blocks of its class "
                f"{type(module).__name__} can: its stage would be shorter without a word; exclude the class, or give "
                "an adapter"
            )


def _check_blocks(runs: list[list[Candidate]], existing: str, extra_norm: str | None) -> None:
    for candidate in (c for run in runs for c in run):
        for attribute in (ATTENTION, EXTRA_NORM) if extra_norm else (ATTENTION,):
            if hasattr(candidate.module, attribute):
                raise SharingError(
                    f"{candidate.name}: has an attribute {attribute!r} already, where attention would go"
                )
        if existing == "error" and isinstance(candidate.how, Traced) and candidate.how.graphs[0][1][0].attention:
            raise SharingError(
                f"{candidate.name}: has attention at its tail already; say existing='keep' or existing='replace'"
            )


def _nothing(found: blocks.Found) -> str:
    reasons = [f"{name}: {reason}" for name, reason in found.left.items()]
    reasons += [f"{name or '(the network)'}: {'; '.join(why)}" for name, why in found.rejected.items()]
    reasons += [f"{name or '(the network)'}: cannot be traced: {why}" for name, why in found.untraceable.items()]
    text = "model: found no residual blocks whose tails could share attention"
    return text + ("" if not reasons else ":\n  " + "\n  ".join(reasons[:8])) + ("\n  ..." if len(reasons) > 8 else "")


# --- the conversion -----------------------------------------------------------------------------------------------


def _unit(run: list[Candidate], cell: CellSpec, reduction: int, backend: str | None) -> nn.Module:
    first = run[0]
    calls = sum(1 if isinstance(c.how, Adapter) else len(c.how.graphs[0][1]) for c in run)
    try:
        return create_attention(
            cell, first.channels, reduction, blocks=calls, spatial=blocks.rank(first.module),
            channel_dim=first.channel_dim, backend=backend,
        )  # fmt: skip
    except ValueError as error:  # one narrow stage of many, most likely
        raise ValueError(f"{error}; at {first.name}, which share_attention's exclude would leave alone") from error


def _like_block(unit: nn.Module, block: nn.Module) -> None:
    """Puts ``unit`` where ``block`` is, in its dtype and mode."""
    like = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(0))
    unit.to(device=like.device, dtype=like.dtype).train(block.training)


def _described(run: list[Candidate], unit: nn.Module, extra_norm: bool, reduction: int) -> Stage:
    width = run[0].channels // reduction if hasattr(unit, "reduction") else None
    return Stage(
        blocks=tuple(_described_block(c, extra_norm) for c in run),
        channels=run[0].channels,
        width=width,
        parameters=sum(p.numel() for p in unit.parameters()),
        attention=f"{run[0].name}.{ATTENTION}".lstrip("."),
    )


def _described_block(candidate: Candidate, extra_norm: bool) -> Block:
    kind = type(candidate.module).__name__
    if isinstance(candidate.how, Adapter):
        return Block(candidate.name, kind, (), ("by an adapter",))
    tail = candidate.how.graphs[0][1][0]
    root = candidate.module
    fused: list[str] = []
    apart: list[str] = []
    if tail.norm is not None or extra_norm:
        fused.append("norm")
    else:
        apart.append(f"no norm: its branch ends in {_called(root, tail)}")
    drops = tail.drops(root)
    others = [type(module_of(root, d)).__name__ for d in drops if not drops_samples(module_of(root, d))]  # type: ignore[arg-type]
    if others or len(drops) > 1:
        apart.append(f"shortcut apart: {', '.join(others) or 'two drops'} between")
    else:
        fused.append("shortcut")
        if tail.relu is not None:
            fused.append("relu")
        if drops:
            fused.append("stochastic depth")
    there = None if tail.attention is None else _called(root, tail, tail.attention)
    return Block(candidate.name, kind, tuple(fused), tuple(apart), there)


def _called(root: nn.Module, tail: Tail, node: object = None) -> str:
    node = tail.x if node is None else node
    module = module_of(root, node)  # type: ignore[arg-type]
    return type(module).__name__ if module is not None else str(getattr(node, "name", node))


@dataclass(frozen=True)
class _Change:
    """What happens to a block.

    Attributes:
        begins: whether it registers the unit; the others hold a link.
        norm: the extra norm that it gets, or None.
        replaced: children that are nothing from now on.
    """

    name: str
    block: nn.Module
    unit: nn.Module
    begins: bool
    new_class: type[nn.Module]
    norm: nn.Module | None
    replaced: set[str]


def _change(candidate: Candidate, unit: nn.Module, role: Role, extra_norm: bool) -> _Change:
    block, base = candidate.module, type(candidate.module)
    norm: nn.Module | None = None
    replaced: set[str] = set()
    if isinstance(candidate.how, Adapter):
        recipe = Recipe(base, Adapted(candidate.how, role), None)
    else:
        if extra_norm and candidate.how.graphs[0][1][0].norm is None:
            norm = _extra_norm(candidate)
        sources = []
        for graph, of_graph in candidate.how.graphs:
            replaced |= rewrite(block, graph, of_graph, role, extra_norm)
            sources.append(source_of(graph))
        recipe = Recipe(base, sources[0], sources[1] if len(sources) > 1 else None)
    return _Change(candidate.name, block, unit, role.first, class_of(recipe), norm, replaced)


def _check_preservable(changes: list[_Change]) -> None:
    for change in changes:
        if change.norm is not None:
            raise SharingError(f"init: 'preserve' cannot keep what the extra norm of {change.name} changes")


def _convert(change: _Change) -> None:
    block = change.block
    if change.begins:
        setattr(block, ATTENTION, change.unit)
    else:
        # Registered in every block, functional_call would leave plain tensors in place of parameters.
        object.__setattr__(block, ATTENTION, change.unit)
    if change.norm is not None:
        block.add_module(EXTRA_NORM, change.norm)
    for target in change.replaced:
        parent, _, name = target.rpartition(".")
        setattr(block.get_submodule(parent), name, nn.Identity())
    block.__class__ = change.new_class


def _extra_norm(candidate: Candidate) -> nn.Module:
    block = candidate.module
    like = next(block.parameters())
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[blocks.rank(block) - 1](candidate.channels)
    return norm.to(like.device, like.dtype).train(block.training)
