"""Random problems for the step: inputs, parameters and incoming gradients, and the ways to solve them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from accuracy import assert_accurate, formula
from torch import Tensor

from dia_kernels import LSTMParameters, functional

LEAVES = ("x", "shortcut", "h", "c", *LSTMParameters._fields)

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """One step and the gradients that come in. Tensors other than ``x`` and ``parameters`` may be None."""

    x: Tensor
    shortcut: Tensor | None
    h: Tensor | None
    c: Tensor | None
    parameters: LSTMParameters
    dy: Tensor | None
    dh: Tensor | None
    dc: Tensor | None
    channel_dim: int = 1
    relu: bool = True
    output: str = "sigmoid"

    @property
    def terms(self) -> int:
        """Terms of the longest sum: positions, samples, or the four gates of all channels."""
        channels = self.x.shape[self.channel_dim]
        positions = self.x[0].numel() // channels if len(self.x) else 0
        return max(positions, len(self.x), 4 * channels)

    def leaves(self) -> Tensors:
        """The tensors that are there, by name: new leaves on the same memory, with the same strides."""
        named = zip(LEAVES, (self.x, self.shortcut, self.h, self.c, *self.parameters), strict=True)
        return {name: t.detach().requires_grad_() for name, t in named if t is not None}

    def double(self) -> Problem:
        """The same problem with every tensor in float64."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        wide = {name: t.double() for name, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **wide, parameters=LSTMParameters(*(p.double() for p in self.parameters)))


def lstm_parameters(
    channels: int, bottleneck: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LSTMParameters:
    """Parameters that keep every pre-activation near 1, so that each gate matters."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((bottleneck, channels), (bottleneck,), (4 * channels, bottleneck), (4 * channels,)) * 2
    draws = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return LSTMParameters(*((t / t.shape[1] ** 0.5 if t.ndim == 2 else t / 2).to(dtype) for t in draws))


def tail_arguments(t: dict[str, Tensor], mean: Tensor | None, var: Tensor | None, relu: bool) -> list:
    """The arguments of the operator ``tail`` from tensors by their names, on (N, C, *spatial), without a mask."""
    parameters = [t[name] for name in LSTMParameters._fields]
    norm = (t["gamma"], t["beta"], mean, var, 1e-5)
    return [t["z"], t["shortcut"], t["h"], t["c"], *norm, *parameters, 1, relu, False, False]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the contract says about state and parameters: float64 for float64 maps, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_problem(
    shape: Sequence[int],
    bottleneck: int,
    *,
    dtype: torch.dtype = torch.float32,
    channel_dim: int = 1,
    shortcut: bool = True,
    state: bool = True,
    relu: bool = True,
    output: str = "sigmoid",
    seed: int = 0,
    view: Callable[[Tensor], Tensor] = lambda t: t,
) -> Problem:
    """A random problem; ``view`` gives x its layout and must keep shape and values."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(*size: int, like: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(like)

    n, channels, table = shape[0], shape[channel_dim], compute_dtype(dtype)
    x = draw(*shape, like=dtype) + 0.25
    h, c = (draw(n, channels, like=table).sigmoid(), draw(n, channels, like=table)) if state else (None, None)
    problem = Problem(
        x=view(x),
        shortcut=draw(*shape, like=dtype) if shortcut else None,
        h=h,
        c=c,
        parameters=lstm_parameters(channels, bottleneck, table, seed),
        dy=draw(*shape, like=dtype),
        dh=draw(n, channels, like=table),
        dc=draw(n, channels, like=table),
        channel_dim=channel_dim,
        relu=relu,
        output=output,
    )
    return away_from_kink(problem) if shortcut and relu else problem


def away_from_kink(problem: Problem) -> Problem:
    """Moves the shortcut where the sum before the ReLU is within 1/32 of zero.

    The gradient jumps there, and rounding alone decides on which side a value falls: two correct
    implementations need not agree. 1/16 is far more than bfloat16 rounds such a shortcut.
    """
    before = run_forward(formula_step, replace(problem, relu=False).double())["y"]
    step = torch.where(before < 0, -1 / 16, 1 / 16)
    moved = torch.where(before.abs() < 1 / 32, problem.shortcut + step.to(problem.shortcut.dtype), problem.shortcut)
    return replace(problem, shortcut=moved)


Step = Callable[..., tuple[Tensor, Tensor, Tensor]]


def formula_step(problem: Problem, x: Tensor, shortcut: Tensor | None, h: Tensor, c: Tensor, parameters) -> tuple:
    """The formula in the compute dtype of x: the truth if x is float64, else eager PyTorch."""
    table = compute_dtype(x.dtype)
    if h is None:
        h = c = torch.zeros(x.shape[0], x.shape[problem.channel_dim], dtype=table)
    return formula(
        x, shortcut, h, c, parameters,
        channel_dim=problem.channel_dim, relu=problem.relu, output=problem.output, dtype=table,
    )  # fmt: skip


def library_step(backend: str | None, inplace: bool = False) -> Step:
    """``functional.step`` on ``backend`` as a function of the same arguments as ``formula_step``."""

    def step(problem: Problem, x, shortcut, h, c, parameters):
        y, (h, c) = functional.step(
            x,
            parameters,
            None if h is None else (h, c),
            shortcut=shortcut,
            activation="relu" if problem.relu else None,
            output=problem.output,
            channel_dim=problem.channel_dim,
            inplace=inplace,
            backend=backend,
        )
        return y, h, c

    return step


def _call(step: Step, problem: Problem, tensors: Tensors) -> Tensors:
    get = tensors.get
    parameters = LSTMParameters(*(tensors[name] for name in LSTMParameters._fields))
    results = step(problem, get("x"), get("shortcut"), get("h"), get("c"), parameters)
    return dict(zip("yhc", results, strict=True))


def run_forward(step: Step, problem: Problem) -> Tensors:
    """y, h and c without gradients."""
    with torch.no_grad():
        return _call(step, problem, {name: leaf.detach() for name, leaf in problem.leaves().items()})


def run(step: Step, problem: Problem) -> Tensors:
    """y, h, c, and ``d<name>`` for the gradient of every tensor that the problem has."""
    leaves = problem.leaves()
    results = _call(step, problem, leaves)
    incoming = dict(zip("yhc", (problem.dy, problem.dh, problem.dc), strict=True))
    used = [name for name, gradient in incoming.items() if gradient is not None]
    gradients = torch.autograd.grad(
        [results[name] for name in used], list(leaves.values()), [incoming[name] for name in used], allow_unused=True
    )
    found = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {name: t.detach() for name, t in results.items()} | found


@cache
def _solutions(problem: Problem) -> tuple[Tensors, Tensors]:
    """Eager's results and the truth: the same for every backend, and untouched by an autocast around."""
    with torch.autocast("cpu", enabled=False):
        return run(formula_step, problem), run(formula_step, problem.double())


def assert_contract(backend: str | None, problems: Sequence[Problem]) -> None:
    """Holds results and gradients of several draws of one problem to the accuracy contract."""
    found = [run(library_step(backend), problem) for problem in problems]
    eager, truth = zip(*(_solutions(problem) for problem in problems), strict=True)
    assert found[0].keys() == truth[0].keys()
    for name in truth[0]:
        stacked = (torch.stack([draw[name] for draw in draws]) for draws in (found, truth, eager))
        assert_accurate(*stacked, name, problems[0].terms)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values, where two NaN at one place count as equal."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and (torch.equal(a.nan_to_num(), b.nan_to_num()))
    )
