"""How many channels a value in a block's graph has, and in which dimension: told by the layers that made it.

No shapes are known here, so what cannot be told for sure is not told.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from .tracing import traced_result

#: By module of their class: layers of PyTorch's that leave the channels as they are.
_KEEPING = ("activation", "dropout", "pooling", "upsampling", "padding", "channelshuffle")
#: Functions and methods that do, by name.
_ELEMENTWISE = {
    *("relu", "relu_", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "leaky_relu", "elu"),
    "mish",
    *("mul", "imul", "mul_", "add", "iadd", "add_", "sub", "isub", "sub_", "truediv", "div", "div_", "neg"),
    *("contiguous", "float", "half", "to", "type", "type_as", "clone", "clamp", "clamp_"),
    *("dropout", "dropout2d", "dropout3d", "drop_path", "batch_norm", "group_norm", "layer_norm", "instance_norm"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "interpolate"),
}  # fmt: skip
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Unknown(Exception):
    """Why the channels cannot be told."""


@dataclass(frozen=True)
class Width:
    """``count`` channels in dimension ``dim``, 1 or -1."""

    count: int
    dim: int


@dataclass(frozen=True)
class _Input:
    """As many as the graph's input has, after permutations of its dimensions, the last one first."""

    permutations: tuple[tuple[int, ...], ...] = field(default=())


def width_of(root: nn.Module, node: fx.Node) -> Width:
    """Of ``node`` in a graph of ``root``.

    Raises:
        Unknown: with the reason.
    """
    found = _width(root, node)
    if isinstance(found, _Input):
        raise Unknown("no norm, convolution or linear tells how many channels it has")
    return found


def _width(root: nn.Module, node: fx.Node) -> Width | _Input:
    if node.op == "placeholder":
        return _Input()
    if node.op == "call_module":
        child = root.get_submodule(str(node.target))
        found = _of_module(child)
        return found if isinstance(found, Width) else _permuted(_width(root, _source(node)), found.permutations)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_function" and node.target in (torch.cat, torch.concat):
        return _of_parts(root, node)
    if node.op == "call_function" and node.target in (*_CONVOLUTIONS, F.linear):
        return _of_weight(root, node)
    if name == "permute":
        dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return _permuted(_width(root, _source(node)), (tuple(dims),))  # type: ignore[arg-type]
    if node.target is operator.getitem and node.args[1] == 0 and _is_self_attention(root, _source(node)):
        return _width(root, _source(node))
    if node.op == "get_attr" or name not in _ELEMENTWISE:
        raise Unknown(f"nothing tells how many channels are behind {name}")
    return _width(root, _source(node))


def _source(node: fx.Node) -> fx.Node:
    """The map that ``node`` changes: of several the oldest, as x is in x * gate(x)."""
    sources = [n for n in node.all_input_nodes if not is_constant(n)]
    if not sources:
        raise Unknown(f"nothing tells how many channels are behind {node.name}")
    return min(sources, key=list(node.graph.nodes).index)


def is_constant(node: fx.Node) -> bool:
    """Whether the value is a parameter's, or made of parameters alone."""
    inputs = node.all_input_nodes
    return node.op == "get_attr" or (bool(inputs) and all(is_constant(n) for n in inputs))


def _is_self_attention(root: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), nn.MultiheadAttention)


def _of_parts(root: nn.Module, node: fx.Node) -> Width:
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    widths = [_width(root, part) for part in parts if isinstance(part, fx.Node)]  # type: ignore[union-attr]
    if not all(isinstance(w, Width) and w.dim == dim for w in widths) or len(widths) != len(parts):  # type: ignore[arg-type]
        raise Unknown("nothing tells how many channels are behind a concatenation")
    return Width(sum(w.count for w in widths if isinstance(w, Width)), widths[0].dim)  # type: ignore[union-attr]


def _of_weight(root: nn.Module, node: fx.Node) -> Width:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
        raise Unknown(f"nothing tells how many channels are behind {node.name}")
    owner, _, name = str(weight.target).rpartition(".")
    return Width(len(getattr(root.get_submodule(owner), name)), -1 if node.target is F.linear else 1)


def _permuted(found: Width | _Input, permutations: Sequence[tuple[int, ...]]) -> Width | _Input:
    """After ``permutations``, the last one first."""
    if isinstance(found, _Input):
        return _Input((*permutations, *found.permutations))
    dim = found.dim
    for dims in reversed(permutations):
        place = list(dims).index(dim % len(dims))
        if place not in (1, len(dims) - 1):
            raise Unknown("its channels are neither in dimension 1 nor the last")
        dim = 1 if place == 1 else -1
    return Width(found.count, dim)


def _of_module(module: nn.Module) -> Width | _Input:
    """Of a module's result."""
    width = _of_layer(module)
    if width is not None:
        return width
    if type(module).__name__ == "Permute":
        return _Input((tuple(module.dims),))  # type: ignore[arg-type]
    if type(module).__module__.startswith("torch.nn.modules."):
        kind = type(module).__module__.rpartition(".")[2]
        if type(module) is nn.Identity or kind in _KEEPING:
            return _Input()
        if not isinstance(module, nn.Sequential):
            raise Unknown(f"nothing tells how many channels are behind {type(module).__name__}")
    found = traced_result(module)
    if found is None:
        raise Unknown(f"nothing tells how many channels are behind {type(module).__name__}")
    return _width(module, found[1])


def _of_layer(layer: nn.Module) -> Width | None:
    if isinstance(layer, nn.modules.conv._ConvNd):
        return Width(layer.out_channels, 1)
    if isinstance(layer, nn.Linear):
        return Width(layer.out_features, -1)
    if isinstance(layer, nn.MultiheadAttention):
        return Width(layer.embed_dim, -1)
    if isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return Width(layer.num_features, 1)
    if isinstance(layer, nn.GroupNorm):
        return Width(layer.num_channels, 1)
    if isinstance(layer, nn.LayerNorm):
        return Width(layer.normalized_shape[-1], 1 if type(layer).__name__.endswith("2d") else -1)
    if type(layer).__name__ == "FrozenBatchNorm2d":
        return Width(len(layer.get_buffer("weight")), 1)
    return None
