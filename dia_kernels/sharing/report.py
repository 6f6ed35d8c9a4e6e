"""What ``share_attention`` found and did, for a reader and for a program."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Block:
    """A residual block that got attention.

    Attributes:
        name: qualified, in the network.
        kind: name of its class.
        fused: of "norm", "shortcut", "relu", "stochastic depth": what one call computes beside attention.
        apart: what stays outside, and why.
        attention: class of attention that was there already, or None.
    """

    name: str
    kind: str
    fused: tuple[str, ...]
    apart: tuple[str, ...] = ()
    attention: str | None = None


@dataclass(frozen=True)
class Stage:
    """Blocks that share one attention unit.

    Attributes:
        blocks: in the order in which the state goes through them.
        channels: C.
        width: of the LSTM's bottleneck, C // reduction; None for other cells.
        parameters: that the unit has.
        attention: qualified name of the unit.
    """

    blocks: tuple[Block, ...]
    channels: int
    width: int | None
    parameters: int
    attention: str


@dataclass
class Report:
    """A conversion, done or only looked at.

    Attributes:
        cell: name of the cell.
        stages: that share attention.
        rejected: additions that close no block, by the name of their module, with the reasons.
        untraceable: modules whose forward is no graph, with the reasons.
        left: blocks that were found and left alone, with the reasons.
        existing: what was done with attention that was there: "keep" or "replace".
    """

    cell: str
    stages: list[Stage] = field(default_factory=list)
    rejected: dict[str, list[str]] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    existing: str = "keep"

    @property
    def blocks(self) -> int:
        return sum(len(stage.blocks) for stage in self.stages)

    @property
    def parameters(self) -> int:
        """That the network has more than before, but for attention that was replaced."""
        return sum(stage.parameters for stage in self.stages)

    def __str__(self) -> str:
        lines = [
            f"{self.cell}: {self.blocks} blocks in {len(self.stages)} stages, {self.parameters:,} parameters added"
        ]
        for stage in self.stages:
            width = "" if stage.width is None else f", m = {stage.width}"
            lines.append(f"  {stage.attention}: C = {stage.channels}{width}, {stage.parameters:,} parameters")
            for names, block in _alike(stage.blocks):
                text = f"    {names} ({block.kind}): fused {', '.join(block.fused) or 'nothing'}"
                text += "".join(f"; {reason}" for reason in block.apart)
                if block.attention is not None:
                    text += f"; its {block.attention} {'replaced' if self.existing == 'replace' else 'kept'}"
                lines.append(text)
        for title, found in (("left alone", self.left), ("untraceable", self.untraceable)):
            lines += [_line(title, name, reason) for name, reason in found.items()]
        for name, reasons in self.rejected.items():
            lines += [_line("no tail", name, reason) for reason in reasons]
        return "\n".join(lines)


def _line(title: str, name: str, reason: str) -> str:
    return f"  {title}: {name or '(the network itself)'}: {textwrap.shorten(reason, 110, placeholder=' ...')}"


def _alike(blocks: tuple[Block, ...]) -> list[tuple[str, Block]]:
    """Blocks in a row of which the same is to be said, under one name: first to last."""
    rows: list[list[Block]] = []
    for block in blocks:
        last = rows[-1][-1] if rows else None
        if last is not None and (last.kind, last.fused, last.apart, last.attention) == (
            block.kind, block.fused, block.apart, block.attention,
        ):  # fmt: skip
            rows[-1].append(block)
        else:
            rows.append([block])
    return [(row[0].name if len(row) == 1 else f"{row[0].name} to {row[-1].name}", row[0]) for row in rows]
