"""Attention placed by hand, by hooks on a network's own modules: what ``share_attention`` has to agree with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dia_kernels import sharing

#: Of each stage the modules whose result (or, with "< " before the name, whose argument) attention rescales, in order.
Places = Sequence[Sequence[str]]


class Hooked(nn.Module):
    """``model`` with each of ``units`` called at the places of its stage."""

    def __init__(self, model: nn.Module, units: Sequence[nn.Module], places: Places) -> None:
        super().__init__()
        self.model, self.units = model, nn.ModuleList(units)
        for unit, names in zip(units, places, strict=True):
            carried: dict[str, Any] = {}
            for place, name in enumerate(names):

                def attend(x: Tensor, unit=unit, carried=carried, first=place == 0) -> Tensor:
                    y, carried["state"] = unit(x, None if first else carried["state"])
                    return y

                module = model.get_submodule(name.removeprefix("< "))
                if name.startswith("< "):
                    module.register_forward_pre_hook(lambda _, args, attend=attend: attend(args[0]))
                else:
                    module.register_forward_hook(lambda _, args, y, attend=attend: attend(y))

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


def hook(plain: nn.Module, shared: nn.Module, places: Places) -> Hooked:
    """``plain`` with copies of the units of ``shared``, at ``places``."""
    units = [copy.deepcopy(shared.get_submodule(stage.attention)) for stage in sharing.report(shared).stages]
    return Hooked(plain, units, places)


def pair(model: nn.Module, places: Places, share: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, Hooked]:
    """The network that ``share`` makes of ``model``, and a copy with the same units hooked in."""
    plain = copy.deepcopy(model)
    shared = share(model)
    return shared, hook(plain, shared, places)


def tensors(result: Any) -> list[Tensor]:
    """Every tensor in a network's result."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [t for key in sorted(result) for t in tensors(result[key])]
    if isinstance(result, (list, tuple)):
        return [t for item in result for t in tensors(item)]
    return []


def loss_of(result: Any) -> Tensor:
    return sum(t.square().mean() for t in tensors(result) if t.is_floating_point())  # type: ignore[return-value]


def assert_same(shared: nn.Module, hooked: Hooked, call: Callable[[nn.Module], Any], training: bool) -> None:
    """The same results; in training also the same gradients of every parameter, and the same buffers after it.

    In float64: both sum the same values, in other orders.
    """
    results = []
    for model in (shared, hooked):
        model.train(training)
        torch.manual_seed(1)
        results.append(call(model))
        if training:
            loss_of(results[-1]).backward()
    for found, expected in zip(*(tensors(result) for result in results), strict=True):
        assert_close(found.detach(), expected.detach(), "result")
    if not training:
        return
    of_shared = dict(shared.named_parameters())
    stages = sharing.report(shared).stages
    units = [p for stage in stages for p in shared.get_submodule(stage.attention).parameters()]
    for ours, theirs in zip(units, hooked.units.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, "attention")
    for name, parameter in hooked.model.named_parameters():
        assert (parameter.grad is None) == (of_shared[name].grad is None), name
        if parameter.grad is not None:
            assert_close(of_shared[name].grad, parameter.grad, name)
    buffers = dict(shared.named_buffers())
    for name, buffer in hooked.model.named_buffers():
        assert_close(buffers[name], buffer, name)


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.shape == expected.shape, name
    if expected.is_floating_point() and expected.numel() > 0:
        size = expected.abs().max().item()
        assert (found - expected).abs().max().item() <= 1e-8 * size + 1e-12, name
    else:
        assert torch.equal(found, expected), name
