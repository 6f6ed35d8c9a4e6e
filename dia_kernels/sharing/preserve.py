"""``init="preserve"``: a converted network computes what it computed before.

Attention begins as a constant (``make_constant`` of its cell): every scale is a value of each channel and block that
depends on no map. The layer that makes a block's x, its norm for the most part, is divided by it. From there
fine-tuning goes on where the pretrained network stood; the weights at zero learn, as their gradients are not zero.
Whether a layer's result is divided with its weights is tried on a copy: no list of classes could tell.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .blocks import Candidate, Traced, rank
from .errors import SharingError
from .tails import Tail, module_of
from .widths import Unknown, Width, width_of

#: A scale below this would blow up the layer before it.
_LEAST = 0.05
#: What a layer's result may be proportional to, beside its bias: the gain of one whose weights are standardised.
_FACTORS = ("weight", "gain")


def hold(pairs: list[tuple[list[Candidate], nn.Module]]) -> None:
    """Makes the unit of each run of blocks a constant, and divides what comes before it by that constant.

    Raises:
        SharingError: a block or a unit that this cannot be done to; nothing has been divided then.
    """
    divided = [(parameter, scale) for run, unit in pairs for parameter, scale in _divisions(run, unit)]
    _check_once(divided)
    for parameter, scale in divided:
        _divide(parameter, scale)


@torch.no_grad()
def _divide(parameter: Tensor, scale: Tensor) -> None:
    # Of a weight the first dimension; of a layer scale whatever dimension the channels are in.
    shape = (-1, *(1,) * (parameter.ndim - 1)) if parameter.shape[0] == len(scale) else parameter.shape
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
                what = _described(candidate.module, tail)
                raise SharingError(
                    f"init: 'preserve' divides what ends a branch, a norm, a convolution, a linear or a layer scale; "
                    f"that of {candidate.name} ends in {what}, which is proportional to none; "
                    "share_attention's exclude leaves such blocks alone"
                )
    try:
        unit.make_constant()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        name = type(getattr(unit, "cell", unit)).__name__
        raise SharingError(f"init: 'preserve' needs a cell that can begin as a constant: {name} cannot") from error
    scales = _scales(unit, run[0], len(makers))
    return [(parameter, scale) for made, scale in zip(makers, scales, strict=True) for parameter in made]


def _check_once(divided: list[tuple[Tensor, Tensor]]) -> None:
    if len({id(parameter) for parameter, _ in divided}) < len(divided):
        raise SharingError("init: 'preserve' cannot divide one layer by the scales of several blocks that share it")


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
        return [root.get_parameter(tail.scale)]
    if tail.norm is not None:
        norm = module_of(root, tail.norm)
        return [] if norm is None else _tensors(norm, "weight")
    layer = module_of(root, tail.made)
    if layer is None:
        return []
    try:
        width = width_of(root, tail.made)
    except Unknown:
        return []
    names = (name for name in _FACTORS if _is_proportional(layer, name, width, rank(root)))
    return next((_tensors(layer, name) for name in names), [])


def _described(root: nn.Module, tail: Tail) -> str:
    layer = module_of(root, tail.made)
    return tail.made.name if layer is None else f"{tail.made.target} ({type(layer).__name__})"


def _tensors(layer: nn.Module, factor: str) -> list[Tensor]:
    found = [getattr(layer, name, None) for name in (factor, "bias")]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


@torch.no_grad()
def _is_proportional(layer: nn.Module, factor: str, width: Width, rank: int) -> bool:
    """Whether ``layer`` gives proportional results for ``factor`` and its bias, channel by channel: tried on a copy.

    PyTorch's convolutions, linears and norms do; not with weights that are standardised or parametrised, and not with
    an activation within.
    """
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False  # they would see what is tried
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 2, width.count, dtype=torch.float64)
    try:
        tried = copy.deepcopy(layer).to("cpu", torch.float64).eval()
        for tensor in _tensors(tried, factor):
            tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64, generator=generator) - 0.5)
        x = torch.randn(_taken_by(tried, width, rank), dtype=torch.float64, generator=generator)
        before = tried(x.clone())
        for tensor in _tensors(tried, factor):
            _divide(tensor, scale)
        after = tried(x.clone()).movedim(width.dim, -1) * scale
    except Exception:  # whatever a layer of somebody's raises when it is called by itself
        return False
    return torch.allclose(after, before.movedim(width.dim, -1), rtol=1e-9, atol=1e-12)


def _taken_by(layer: nn.Module, width: Width, rank: int) -> tuple[int, ...]:
    """The shape of a small input of ``layer``, whose result has ``width``."""
    if isinstance(layer, nn.Linear):
        return (2, layer.in_features)
    if isinstance(layer, nn.modules.conv._ConvNd):
        reaches = zip(layer.kernel_size, layer.dilation, strict=True)
        return (2, layer.in_channels, *(2 + (kernel - 1) * dilation for kernel, dilation in reaches))
    positions = (4,) * rank
    return (2, width.count, *positions) if width.dim == 1 else (2, *positions, width.count)
