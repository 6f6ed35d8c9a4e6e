"""``init="preserve"``: a converted network computes what it computed before.

Attention begins as a constant (``make_constant`` of its cell): every scale is a value of each channel and block that
depends on no map. The layer that makes a block's x, its norm for the most part, is divided by it. From there
fine-tuning goes on where the pretrained network stood; the weights at zero learn, as their gradients are not zero.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .blocks import Candidate, Traced, rank
from .errors import SharingError
from .tails import WEIGHTED, Tail, module_of

#: A scale below this would blow up the layer before it.
_LEAST = 0.05


def hold(pairs: list[tuple[list[Candidate], nn.Module]]) -> None:
    """Makes the unit of each run of blocks a constant, and divides what comes before it by that constant.

    Raises:
        SharingError: a block or a unit that this cannot be done to; nothing has been divided then.
    """
    divided = [(parameter, scale) for run, unit in pairs for parameter, scale in _divisions(run, unit)]
    for parameter, scale in divided:
        # Of a matrix the rows; of a layer scale whatever dimension the channels are in.
        shape = (-1, *(1,) * (parameter.ndim - 1)) if parameter.shape[0] == len(scale) else parameter.shape
        with torch.no_grad():
            parameter.copy_((parameter.double() / scale.to(parameter.device).view(shape)).to(parameter.dtype))


def _divisions(run: list[Candidate], unit: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What is to be divided by which values (C,); ``unit`` is a constant thereafter."""
    makers = []
    for candidate in run:
        if not isinstance(candidate.how, Traced):
            raise SharingError(f"init: 'preserve' cannot see into {candidate.name}, which has an adapter")
        for tail in candidate.how.graphs[0][1]:
            makers.append(_divisible(candidate.module, tail))
            if not makers[-1]:
                raise SharingError(
                    f"init: 'preserve' divides the norm, convolution or layer scale that ends a branch; that of "
                    f"{candidate.name} ends in {tail.x.name}"
                )
    try:
        unit.make_constant()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        name = type(getattr(unit, "cell", unit)).__name__
        raise SharingError(f"init: 'preserve' needs a cell that can begin as a constant: {name} cannot") from error
    scales = _scales(unit, run[0], len(makers))
    return [(parameter, scale) for made, scale in zip(makers, scales, strict=True) for parameter in made]


@torch.no_grad()
def _scales(unit: nn.Module, of: Candidate, calls: int) -> list[Tensor]:
    """The scale (C,) of each of ``calls`` calls in turn, in float64."""
    wide = copy.deepcopy(unit).double().eval()
    places = (1,) * rank(of.module)
    shape = (1, of.channels, *places) if of.channel_dim == 1 else (1, *places, of.channels)
    ones = torch.ones(shape, dtype=torch.float64, device=next(unit.parameters()).device)
    state, scales = None, []
    for _ in range(calls):
        y, state = wide(ones, state)
        scales.append(y.view(-1))
    if min(scale.min().item() for scale in scales) < _LEAST:
        raise SharingError(
            f"init: 'preserve' would divide by less than {_LEAST}: the unit's biases were drawn that low; take another "
            "seed"
        )
    return scales


def _divisible(root: nn.Module, tail: Tail) -> list[Tensor]:
    """The tensors to which x is proportional, channel by channel."""
    if tail.norm is None and tail.scale is not None:
        owner, _, name = str(tail.scale.target).rpartition(".")
        return [getattr(root.get_submodule(owner), name)]
    layer = module_of(root, tail.x)
    affine = isinstance(layer, WEIGHTED) or tail.norm is not None
    if layer is None or not affine or getattr(layer, "weight", None) is None:
        return []
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return [] if transposed else [t for t in (layer.weight, layer.bias) if isinstance(t, Tensor)]
