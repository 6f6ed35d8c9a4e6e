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
    worst, relative to the largest value that the tensor has in any draw: a tensor of one value is now and then
    close to 0. The README gives figures, and says what this reading of the contract lets pass.
    """

    def __init__(self, map_dtype: torch.dtype, longest_sum: int) -> None:
        self.map_dtype = map_dtype
        self.longest_sum = longest_sum
        #: By the tensor's name: max |ours - truth|, max |eager - truth|, and the truth whose largest value is largest.
        self.ours: dict[str, float] = {}
        self.eager: dict[str, float] = {}
        self.truth: dict[str, Tensor] = {}
        self.dtype: dict[str, torch.dtype] = {}

    def add(self, ours: Tensors, eager: Tensors, truth: Tensors) -> None:
        """Takes in the tensors of one draw, by the same names."""
        for name, true in truth.items():
            self.dtype[name] = ours[name].dtype
            if name not in self.truth or true.abs().max() > self.truth[name].abs().max():
                self.truth[name] = true
            for into, found in ((self.ours, ours), (self.eager, eager)):
                difference = (found[name].double() - true).abs().max().item()
                into[name] = max(into.get(name, 0.0), difference if math.isfinite(difference) else math.inf)

    def error(self, found: dict[str, float], name: str) -> float:
        """The error of tensor ``name`` in ``ours`` or ``eager``; infinite where that was not finite."""
        scale = self.truth[name].abs().max().item()
        if found[name] == 0.0:
            return 0.0
        return found[name] / scale if scale else math.inf

    def allowed(self, name: str) -> float:
        """The largest error that tensor ``name`` may have, by the contract above."""
        of_one = ulp(self.truth[name], self.dtype[name])
        if self.map_dtype == torch.float64:
            return 4.0 * math.sqrt(self.longest_sum) * of_one
        return 2.0 * self.error(self.eager, name) + of_one

    def breach(self) -> str | None:
        """None if every tensor keeps the contract, else a sentence about the first which does not."""
        for name in self.ours:
            found, allowed = self.error(self.ours, name), self.allowed(name)
            if math.isinf(found) or found > allowed:
                return f"{name}: error {found:.2e}, at most {allowed:.2e} allowed"
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
