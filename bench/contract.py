"""The accuracy that the fused step promises, and the check that it keeps the promise on one problem.

A time counts only if the result is right. The error of a tensor is max |ours - truth| / max |truth| with
the truth in float64. It may be twice that of eager PyTorch in the same dtype, plus one ulp of
max |truth|. For float64 maps the truth has the same dtype, so the bound is 4 sqrt(n) ulp, where n is
the number of terms of the longest sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def error(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth| / max |truth|; infinite where ``actual`` is not finite."""
    difference = (actual.double() - truth).abs().max().item()
    scale = truth.abs().max().item()
    if difference == 0.0:
        return 0.0
    return difference / scale if math.isfinite(difference) and scale else math.inf


def ulp(truth: Tensor, dtype: torch.dtype) -> float:
    """The distance between neighbours of max |truth| in ``dtype``, relative to max |truth|."""
    scale = truth.abs().max().item()
    if scale == 0.0:
        return 0.0
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale)) / scale


class Accuracy:
    """Errors of one implementation, the worst of each tensor over several random draws.

    In a single draw a tensor of few values is now and then far more exact in eager than is typical of
    eager, and a step as good as eager breaks the bound by luck. So ours and eager both count with their
    worst. The README gives figures, and says what this reading of the contract lets pass.
    """

    def __init__(self, map_dtype: torch.dtype, longest_sum: int) -> None:
        self.map_dtype = map_dtype
        self.longest_sum = longest_sum
        self.ours: dict[str, float] = {}
        self.eager: dict[str, float] = {}
        self.ulp: dict[str, float] = {}

    def add(self, ours: Tensors, eager: Tensors, truth: Tensors) -> None:
        """Takes in the tensors of one draw, by the same names."""
        for name, true in truth.items():
            self.ours[name] = max(self.ours.get(name, 0.0), error(ours[name], true))
            self.eager[name] = max(self.eager.get(name, 0.0), error(eager[name], true))
            self.ulp[name] = max(self.ulp.get(name, 0.0), ulp(true, ours[name].dtype))

    def allowed(self, name: str) -> float:
        """The largest error that tensor ``name`` may have, by the contract above."""
        if self.map_dtype == torch.float64:
            return 4.0 * math.sqrt(self.longest_sum) * self.ulp[name]
        return 2.0 * self.eager[name] + self.ulp[name]

    def breach(self) -> str | None:
        """None if every tensor keeps the contract, else a sentence about the first which does not."""
        for name, found in self.ours.items():
            if math.isinf(found) or found > self.allowed(name):
                return f"{name}: error {found:.2e}, at most {self.allowed(name):.2e} allowed"
        return None


def results(step: Callable[[], Sequence[Tensor]]) -> Tensors:
    """y and the new state of one step, without gradients."""
    with torch.no_grad():
        return {name: value.clone() for name, value in zip(("y", "h", "c"), step(), strict=True)}


def gradients(step: Callable[[], Sequence[Tensor]], leaves: Tensors, cotangents: Sequence[Tensor]) -> Tensors:
    """Results of one step (y alone, of a cell without a state), and its gradients by the names of the ``leaves``."""
    outputs = step()
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    named = {f"gradient of {name}": value for name, value in zip(leaves, found, strict=True)}
    names = ("y", "h", "c")[: len(outputs)]
    return {name: value.detach() for name, value in zip(names, outputs, strict=True)} | named


def away_from_kink(shortcut: Tensor, before_relu: Tensor) -> Tensor:
    """A shortcut that keeps the sum before the ReLU away from 0, given the sum with ``shortcut``.

    At 0 the gradient jumps, and rounding decides on which side an element falls: no two correct
    implementations would agree there. A sum nearer to 0 than 1/32 is moved away by 1/16, which is
    more than bfloat16 rounds a shortcut of the size used here.
    """
    near = before_relu.abs() < 1 / 32
    moved = shortcut + torch.where(before_relu < 0, -1 / 16, 1 / 16).to(shortcut.dtype)
    return torch.where(near, moved, shortcut)
