"""Times one step of shared attention against its peers, interleaved, once it has been checked.

A ``Case`` is a shape, layout and dtype. ``compare`` takes a case and a mode and returns samples of every
implementation. The step is that of the usual block: a state is given, a shortcut is added, a ReLU follows.

Modes: ``forward`` records no gradients; ``training`` is forward and backward, with gradients of x,
shortcut, state and all parameters.

Implementations: ``copy`` (a copy of the map: what the memory can do), ``plain`` (the block without
attention), ``eager``, ``compile`` (the same code under torch.compile), ``fused`` (ours), and in forward
``eager_inplace`` and ``fused_inplace``, which write over x.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import contract
import torch
from timing import Call, Samples, clock_of, interleaved, rounded, undisturbed
from torch import Tensor
from unfused import EagerAttention, plain_tail

from dia_kernels import SharedAttention

REDUCTION = 4
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMPLEMENTATIONS = {
    "forward": ("copy", "plain", "eager", "compile", "fused", "eager_inplace", "fused_inplace"),
    "training": ("copy", "plain", "eager", "compile", "fused"),
}

#: Values to check a case on, in at most so many random draws.
CHECKED_VALUES, MAX_DRAWS = 2**24, 8

#: Host time is that of the same call on an empty batch (N = 0): checks, dispatch and allocation remain.
#: It has no part in the layout, so the contiguous one serves. Seconds to spend on it:
HOST_BUDGET = 0.5

#: Ideal traffic in maps: forward reads x and shortcut and writes y; backward reads dy, x and y and
#: writes the gradients of x and shortcut.
IDEAL_MAPS = {"forward": 3, "training": 3 + 5}


class Shape(NamedTuple):
    n: int
    c: int
    h: int
    w: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads a shape such as ``32x256x56x56``."""
        parts = text.split("x")
        if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"shape: expected four positive numbers as in 32x256x56x56, got {text!r}")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = (
    Shape(32, 256, 56, 56),
    Shape(32, 512, 28, 28),
    Shape(32, 1024, 14, 14),
    Shape(32, 2048, 7, 7),
    Shape(128, 64, 32, 32),
    Shape(128, 128, 16, 16),
    Shape(128, 256, 8, 8),
    Shape(1, 256, 56, 56),
    Shape(1, 64, 32, 32),
    Shape(1, 2048, 7, 7),
)
#: The shapes over which the project's targets are geometric means.
TARGET_SHAPES = SHAPES[:8]
QUICK_SHAPES = (Shape(128, 128, 16, 16), Shape(1, 64, 32, 32))


@dataclass(frozen=True)
class Case:
    shape: Shape
    layout: str
    dtype: str
    device: str = "cpu"

    @property
    def longest_sum(self) -> int:
        """Terms of the longest sum: over positions, over the rows of an expansion, or over samples."""
        n, c, h, w = self.shape
        return max(h * w, 4 * c, n)

    @property
    def draws(self) -> int:
        """Random draws to check: several where one has few values, see ``contract.Accuracy``."""
        parameters = 10 * self.shape.c**2 // REDUCTION
        return min(max(CHECKED_VALUES // (math.prod(self.shape) + parameters), 1), MAX_DRAWS)


@dataclass
class Block:
    """An attention unit at its place in a network: what comes in, and which gradients come back to it."""

    attention: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]]
    parameters: contract.Tensors
    x: Tensor
    shortcut: Tensor
    state: tuple[Tensor, Tensor]
    cotangents: tuple[Tensor, Tensor, Tensor]
    leaves: contract.Tensors = field(init=False)

    def __post_init__(self) -> None:
        h, c = self.state
        self.leaves = {"x": self.x, "shortcut": self.shortcut, "h": h, "c": c} | self.parameters
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """y, h and c of one step."""
        y, (h, c) = self.attention(self.x, self.state, shortcut=self.shortcut)
        return y, h, c

    def train(self) -> None:
        """Forward and backward into fresh gradients, as after ``optimizer.zero_grad()``."""
        forget_gradients(self.leaves.values())
        torch.autograd.backward(self.forward(), self.cotangents)


def forget_gradients(leaves: Collection[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def eager_block(case: Case, seed: int) -> Block:
    """The eager step on random data. The sum before its ReLU stays clear of 0, see ``away_from_kink``."""
    n, c, h, w = case.shape
    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(seed)

    def table() -> Tensor:
        return torch.rand(n, c, generator=generator).to(case.device, dtype)

    def feature_map() -> Tensor:
        drawn = torch.randn(n, c, h, w, generator=generator)
        return drawn.to(case.device, dtype, memory_format=LAYOUTS[case.layout])

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attention = EagerAttention(c, REDUCTION).to(case.device, dtype)
    parameters = {name.replace(".", "_"): parameter for name, parameter in attention.named_parameters()}
    x, state = feature_map(), (table(), table())
    block = Block(attention, parameters, x, feature_map(), state, (feature_map(), table(), table()))

    true = in_float64(block)
    with torch.no_grad():
        scale, _ = true.attention.cell(true.x, true.state)
        block.shortcut.copy_(contract.away_from_kink(block.shortcut, true.x * scale[..., None, None] + true.shortcut))
    return block


def in_float64(block: Block) -> Block:
    """The eager step on the same values in float64: the truth."""
    _, channels = block.state[0].shape
    attention = EagerAttention(channels, REDUCTION).to(block.x.device, torch.float64)
    parameters = {name.replace(".", "_"): parameter for name, parameter in attention.named_parameters()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(block.parameters[name])

    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.float64, copy=True)

    h, c = map(double, block.state)
    return Block(
        attention, parameters, double(block.x), double(block.shortcut), (h, c), tuple(map(double, block.cotangents))
    )


def fused_block(eager: Block) -> Block:
    """The fused step on the same values as the eager one."""
    bottleneck, channels = eager.parameters["input_reduce_weight"].shape
    attention = SharedAttention(channels, channels // bottleneck, device=eager.x.device, dtype=eager.x.dtype)
    attention.load_state_dict(eager.parameters)
    # The state is what the block before left, and ours leaves it in the compute dtype.
    state_dtype = torch.float64 if eager.x.dtype == torch.float64 else torch.float32
    h, c = (part.detach().to(state_dtype) for part in eager.state)
    dy, *dstate = eager.cotangents
    dh, dc = (part.to(state_dtype) for part in dstate)
    return Block(
        functools.partial(attention, activation="relu"),
        dict(attention.named_parameters()),
        eager.x,
        eager.shortcut,
        (h, c),
        (dy, dh, dc),
    )


def blocks_of(case: Case, mode: str, seed: int = 0) -> dict[str, Block]:
    """The eager and the fused implementations on the same values; in place on maps of their own."""
    eager = eager_block(case, seed)
    fused = fused_block(eager)
    blocks = {"eager": eager, "fused": fused}
    if mode == "forward":
        own_map = eager.x.detach().clone
        blocks["eager_inplace"] = replace(eager, attention=eager.attention.forward_inplace, x=own_map())
        blocks["fused_inplace"] = replace(
            fused, attention=functools.partial(fused.attention, inplace=True), x=own_map()
        )
    return blocks


def compiled_block(eager: Block) -> Block:
    """The eager step under torch.compile, which has forgotten earlier cases and so fixes this one's sizes."""
    torch._dynamo.reset()
    return replace(eager, attention=torch.compile(eager.attention, dynamic=False))


def faults(case: Case, mode: str) -> dict[str, str]:
    """Which of the fused implementations break the accuracy contract, and how."""

    def tensors(block: Block) -> contract.Tensors:
        if mode == "forward":
            return contract.results(block.forward)
        return contract.gradients(block.forward, block.leaves, block.cotangents)

    accuracy: dict[str, contract.Accuracy] = {}
    for seed in range(case.draws):
        blocks = blocks_of(case, mode, seed)
        eager, truth = tensors(blocks["eager"]), tensors(in_float64(blocks["eager"]))
        for name, block in blocks.items():
            if name.startswith("fused"):
                record = accuracy.setdefault(name, contract.Accuracy(DTYPES[case.dtype], case.longest_sum))
                record.add(tensors(block), eager, truth)
    found = {name: record.breach() for name, record in accuracy.items()}
    return {name: breach for name, breach in found.items() if breach is not None}


def calls_of(mode: str, blocks: dict[str, Block]) -> dict[str, Call]:
    """Every implementation as a function without arguments, in the order of ``IMPLEMENTATIONS``."""
    eager = blocks["eager"]
    x, shortcut, dy = eager.x, eager.shortcut, eager.cotangents[0]
    source = x.detach()
    target = torch.zeros_like(source)

    def train_plain() -> None:
        forget_gradients((x, shortcut))
        torch.autograd.backward(plain_tail(x, shortcut), dy)

    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "plain": (lambda: plain_tail(x, shortcut)) if mode == "forward" else train_plain,
    }
    for name, block in blocks.items():
        calls[name] = block.forward if mode == "forward" else block.train
    return {name: calls[name] for name in IMPLEMENTATIONS[mode] if name in calls}


@dataclass
class Comparison:
    """What was measured of one case in one mode. ``wrong`` says why an implementation has no samples."""

    case: Case
    mode: str
    seconds: Samples
    host_seconds: Samples
    wrong: dict[str, str]

    def record(self) -> dict[str, object]:
        """The comparison as plain data, for JSON."""
        return {
            "mode": self.mode,
            "shape": list(self.case.shape),
            "layout": self.case.layout,
            "dtype": self.case.dtype,
            "device": self.case.device,
            "reduction": REDUCTION,
            "map_bytes": math.prod(self.case.shape) * DTYPES[self.case.dtype].itemsize,
            "ideal_maps": IDEAL_MAPS[self.mode],
            "in_targets": self.case.shape in TARGET_SHAPES,
            "seconds": rounded(self.seconds),
            "host_seconds": rounded(self.host_seconds),
            "wrong": self.wrong,
        }


def sample(case: Case, mode: str, left_out: Collection[str], budget: float) -> Samples:
    """Samples of all implementations but those ``left_out``."""
    blocks = blocks_of(case, mode)
    if "compile" not in left_out:
        blocks["compile"] = compiled_block(blocks["eager"])
    calls = {name: call for name, call in calls_of(mode, blocks).items() if name not in left_out}
    with undisturbed():
        return interleaved(calls, budget, clock=clock_of(case.device))


def compare(case: Case, mode: str, *, without: Collection[str] = (), budget: float) -> Comparison:
    """Checks the fused implementations of one case in one mode, then times all that are right.

    Args:
        mode: ``forward`` or ``training``.
        without: implementations to leave out; ``compile`` takes seconds a case to compile.
        budget: seconds to spend on the samples; the check and compilation come on top.
    """
    with torch.set_grad_enabled(mode == "training"):
        wrong = faults(case, mode)
        left_out = {*without, *wrong}
        seconds = sample(case, mode, left_out, budget)
        host: Samples = {}
        if case.shape.n == 1 and case.layout == "contiguous" and case.device == "cpu":
            host = sample(replace(case, shape=case.shape._replace(n=0)), mode, left_out, HOST_BUDGET)
    return Comparison(case, mode, seconds, host, wrong)
