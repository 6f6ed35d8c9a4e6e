"""The tail of a residual block in its graph: the addition that closes it, and what can be fused with it.

An addition of two tensors closes a block if both come from one place (the fork), and one of them, the residual side, by
way of more convolutions than the other, the shortcut.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from .. import norms
from .tracing import Untraceable, trace, traced_result
from .widths import Unknown, is_constant, width_of

#: Of these a branch is made; more of them make the residual side.
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
#: Methods that leave a tensor's values in their order.
_RESHAPING = ("view", "reshape", "unsqueeze", "squeeze", "flatten")
_SHAPE_METHODS = ("size", "dim", "ndimension", "numel", "stride")
_SHAPE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_GATES = ("sigmoid", "sigmoid_", "hardsigmoid", "softmax", "Sigmoid", "Hardsigmoid", "Softmax", "Softmax2d")
_POOLINGS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
#: Names of modules that drop a whole sample's branch, and scale what is left: torchvision's, timm's and others'.
_STOCHASTIC_DEPTHS = ("StochasticDepth", "DropPath", "DropConnect")


class Rejected(Exception):
    """Why an addition is no tail that attention can join."""


@dataclass
class Tail:
    """One tail, as nodes of the block's graph.

    Attributes:
        x: what attention rescales: before the drops, before the norm if that is folded.
        shortcut: the other operand of the addition.
        addition: the sum itself.
        relu: the ReLU behind it, if the sum has no other user.
        norm: the folded norm; None where there is none, or where attention's input is no norm's result.
        passed: what lies between x and the sum, in order: stochastic depth, dropout, nothing at all.
        attention: attention that is already there, right before the drops; ``x`` is its result.
        channels, channel_dim: of x.
        strided: whether the shortcut changes the positions, as at the beginning of a stage.
        made: what x is proportional to, a value of each channel: back over permutations, ReLU, drops, pooling, and
            products with a constant.
        scale: name of the parameter that ``made`` was multiplied by, a value of each channel (a layer scale), or None.
    """

    x: fx.Node
    shortcut: fx.Node
    addition: fx.Node
    relu: fx.Node | None
    norm: fx.Node | None
    passed: list[fx.Node]
    attention: fx.Node | None
    channels: int
    channel_dim: int
    strided: bool
    made: fx.Node
    scale: str | None

    def drops(self, root: nn.Module) -> list[fx.Node]:
        """Of ``passed`` what is not nothing."""
        return [node for node in self.passed if type(module_of(root, node)) is not nn.Identity]


def module_of(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The child that ``node`` calls."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _name(node: fx.Node) -> str:
    """Of the function or method that ``node`` calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


# --- where values come from --------------------------------------------------------------------------------


def _is_shape(node: fx.Node) -> bool:
    """Whether the value is a size or the like, through which no data flows."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return False


def _ancestors(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Of each node the nodes that its data come from, and itself; parameters are none of them."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        sources = set() if _is_shape(node) or node.op == "get_attr" else set(node.all_input_nodes)
        found[node] = {node}.union(*(found[source] for source in sources)) if sources else {node}
        if _is_shape(node) or node.op == "get_attr":
            found[node] = set()
    return found


def _is_addition(node: fx.Node) -> bool:
    called = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return (
        called and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and "alpha" not in node.kwargs
    )


def _multiplies(node: fx.Node) -> bool:
    called = (node.op == "call_function" and node.target in _PRODUCTS) or (
        node.op == "call_method" and node.target in ("mul", "mul_")
    )
    return called and len(node.args) == 2


def _is_product(node: fx.Node) -> bool:
    return _multiplies(node) and all(isinstance(a, fx.Node) for a in node.args)


def _weighted(root: nn.Module, nodes: set[fx.Node]) -> int:
    """Convolutions and linears in ``nodes``."""
    count = 0
    for node in nodes:
        module = module_of(root, node)
        if module is not None:
            count += sum(isinstance(child, WEIGHTED) for child in module.modules())
        elif node.op == "call_function" and node.target in _CONVOLUTIONS:
            count += 1
    return count


def _strides(root: nn.Module, nodes: set[fx.Node]) -> bool:
    """Whether anything in ``nodes`` takes only some positions."""
    for node in nodes:
        for child in (module_of(root, node) or nn.Identity()).modules():
            stride = getattr(child, "stride", 1)
            if any(s != 1 for s in (stride if isinstance(stride, (tuple, list)) else (stride,))):
                return True
    return False


def _is_pooled(root: nn.Module, operand: fx.Node, branch: set[fx.Node]) -> bool:
    """Whether every way to ``operand`` through ``branch`` passes a reduction to one position."""
    seen, waiting = set(), [operand]
    while waiting:
        node = waiting.pop()
        if node not in branch:
            return False  # back at the fork
        if node not in seen and not _pools(root, node):
            seen.add(node)
            waiting += [n for n in node.all_input_nodes if n.op != "get_attr" and not _is_shape(n)]
    return True


def _pools(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module_of(root, node)).__name__.startswith(("AdaptiveAvgPool", "AdaptiveMaxPool", "SelectAdaptive"))
    if node.op == "call_method" and node.target in ("view", "reshape"):
        return node.args[-2:] == (1, 1)
    name = _name(node)
    return name in ("mean", "amax") or name.startswith(("adaptive_avg_pool", "adaptive_max_pool"))


# --- tails -------------------------------------------------------------------------------------------------


def find(
    root: nn.Module, graph: fx.Graph, blocks: set[nn.Module], replace: bool = False
) -> tuple[list[Tail], list[str], bool]:
    """The tails of ``graph``, in order; why other additions are none; and whether one of those closes a block, too.

    Sequentials before a tail are taken apart, and children that return a tuple.

    Args:
        root: the module that ``graph`` is of.
        blocks: modules that are known to be residual blocks.
        replace: attention that is there already is to go: ``x`` is what it takes, not what it returns.
    """
    tails, reasons, closed = [], [], 0
    _take_tuples_apart(root, graph, blocks)
    additions = [node for node in graph.nodes if _is_addition(node)]
    ancestors = _ancestors(graph)
    for addition in additions:
        if not all(ancestors[operand] for operand in addition.args):
            continue  # of sizes, or of a parameter: nobody would look for a block there
        try:
            residual, shortcut, strided = _sides(root, graph, ancestors, addition, blocks)
            closed += 1
            tails.append(_tail(root, graph, addition, residual, shortcut, strided, replace))
        except Rejected as reason:
            reasons.append(f"{addition.name}: {reason}")
    return tails, reasons, closed > len(tails)


def _sides(
    root: nn.Module,
    graph: fx.Graph,
    ancestors: dict[fx.Node, set[fx.Node]],
    addition: fx.Node,
    blocks: set[nn.Module],
) -> tuple[fx.Node, fx.Node, bool]:
    """The residual operand, the shortcut, and whether the latter has a stride."""
    first, second = addition.args
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    common = ancestors[first] & ancestors[second]
    if not common:
        raise Rejected("its operands have nothing in common")
    fork = [node for node in graph.nodes if node in common][-1]
    if any(user.op == "call_function" and user.target is operator.getitem for user in fork.users):
        raise Rejected("its operands come out of one tuple or dict")
    # Between the fork and an operand: what comes from the fork.
    between = [{node for node in ancestors[o] - common if fork in ancestors[node]} for o in (first, second)]
    counts = [_weighted(root, nodes) for nodes in between]
    if counts[0] == counts[1]:
        raise Rejected(f"both operands pass {counts[0]} convolutions: neither is the shortcut")
    of_residual, of_shortcut = between if counts[0] > counts[1] else between[::-1]
    residual, shortcut = (first, second) if counts[0] > counts[1] else (second, first)
    if min(counts) > 1:
        raise Rejected(f"the shortcut has {min(counts)} convolutions")
    if any(_is_addition(node) for node in of_shortcut):
        raise Rejected("there is an addition in the shortcut")
    called = [module for node in of_residual | of_shortcut if (module := module_of(root, node)) is not None]
    if any(child in blocks for module in called for child in module.modules()):
        raise Rejected("a branch holds residual blocks itself")
    if addition.users and all(_is_gate(root, user) for user in addition.users):
        raise Rejected("its sum is a gate")
    if residual in of_shortcut or len(residual.users) > 1:
        raise Rejected("the residual branch is used elsewhere, too")
    if _is_pooled(root, residual, of_residual):
        raise Rejected("the residual side is no map: it is pooled to one position")
    return residual, shortcut, _strides(root, of_shortcut)


def _tail(
    root: nn.Module,
    graph: fx.Graph,
    addition: fx.Node,
    residual: fx.Node,
    shortcut: fx.Node,
    strided: bool,
    replace: bool,
) -> Tail:
    place = addition.args.index(shortcut)
    x, passed = _before_drops(root, graph, residual)
    attention = x if _is_attention(root, x) else None
    below = x if attention is None else _taken_apart(root, graph, _gated_by(attention))
    try:
        width = width_of(root, below)
    except Unknown as reason:
        raise Rejected(str(reason)) from reason
    if replace:
        x = below
    norm = x if _folds(root, x) else None
    made = _made_by(root, graph, x, width.count)
    users = list(addition.users)
    # What a gate takes may be the shortcut as well, and has been taken apart then.
    shortcut = addition.args[place]  # type: ignore[assignment]
    return Tail(
        x=x,
        shortcut=shortcut,
        addition=addition,
        relu=users[0] if len(users) == 1 and _is_relu(root, users[0]) else None,
        norm=norm,
        passed=passed,
        attention=attention,
        channels=width.count,
        channel_dim=width.dim,
        strided=strided,
        made=made,
        scale=_layer_scale(root, made, width.count),
    )


def _made_by(root: nn.Module, graph: fx.Graph, x: fx.Node, channels: int) -> fx.Node:
    """``Tail.made``."""
    node = x
    while len(node.users) == 1 and _keeps_proportions(root, node, channels):
        node = _taken_apart(root, graph, next(n for n in node.all_input_nodes if not is_constant(n)))
    return node


def _keeps_proportions(root: nn.Module, node: fx.Node, channels: int) -> bool:
    """Whether the value is divided when the argument is, by a positive value of each channel; not of a layer scale."""
    module = module_of(root, node)
    if isinstance(module, nn.AlphaDropout):
        return False  # what it drops is not zero
    if module is not None:
        return drops_samples(module) or isinstance(module, (nn.ReLU, nn.Identity, *_POOLINGS, *_DROPOUTS))
    if _multiplies(node):
        constants = [a for a in node.args if not isinstance(a, fx.Node) or is_constant(a)]
        return len(constants) == 1 and _factor(root, node, channels) is None
    return _name(node) == "permute" or _is_relu(root, node)


def _layer_scale(root: nn.Module, x: fx.Node, channels: int) -> str | None:
    """``Tail.scale``: the product is written out in the block, or is what a child of it returns."""
    module = module_of(root, x)
    if module is None:
        return _factor(root, x, channels)
    found = None if type(module).__module__.startswith("torch.nn.") else traced_result(module)
    name = None if found is None else _factor(module, found[1], channels)
    return None if name is None else f"{x.target}.{name}"


def _factor(root: nn.Module, product: fx.Node, channels: int) -> str | None:
    """Name of the one parameter of ``channels`` values that ``product`` has for a factor."""
    names = []
    for factor in product.args if _is_product(product) else ():
        while isinstance(factor, fx.Node) and _is_reshaped(factor):
            factor = factor.args[0]
        if isinstance(factor, fx.Node) and factor.op == "get_attr":
            owner, _, name = str(factor.target).rpartition(".")
            value = getattr(root.get_submodule(owner), name)
            if isinstance(value, nn.Parameter) and value.numel() == channels:
                names.append(str(factor.target))
    return names[0] if len(names) == 1 else None


def _is_reshaped(node: fx.Node) -> bool:
    """Whether the value is that of the first argument, in another shape."""
    if node.op == "call_method":
        return node.target in _RESHAPING
    if node.target is not operator.getitem:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(each is None or each is Ellipsis or each == slice(None) for each in index)


def _gated_by(attention: fx.Node) -> fx.Node:
    """What the attention that is there takes: its argument, or of a product written out the older factor."""
    return min((a for a in attention.args if isinstance(a, fx.Node)), key=list(attention.graph.nodes).index)


def source(node: fx.Node) -> fx.Node:
    """What ``node``, a call of a module or of a product with a parameter, takes its map from."""
    return next(a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr")


def _before_drops(root: nn.Module, graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Back over Identity, dropout and stochastic depth, which are returned in order."""
    passed: list[fx.Node] = []
    while True:
        node = _taken_apart(root, graph, node)
        module = module_of(root, node)
        if module is None or len(node.args) != 1 or len(node.users) != 1:
            return node, passed
        if not (drops_samples(module) or isinstance(module, (*_DROPOUTS, nn.Identity))):
            return node, passed
        passed.insert(0, node)
        node = source(node)


def drops_samples(module: nn.Module) -> bool:
    """Whether ``module`` is stochastic depth: one factor for all values of a sample."""
    return type(module).__name__ in _STOCHASTIC_DEPTHS


def _taken_apart(root: nn.Module, graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The last call within the child that ``node`` calls, whose own calls stand in the graph then.

    Done to what ends in a call of a child of its own: a Sequential, or a module like it.
    """
    module = module_of(root, node)
    while module is not None and len(node.args) == 1 and not node.kwargs:
        of_child = _ends_in_a_call(module)
        if of_child is None:
            break
        value = _written_out(graph, node, of_child)
        assert isinstance(value, fx.Node)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
        node = value
        module = module_of(root, node)
    return node


def _ends_in_a_call(module: nn.Module) -> fx.Graph | None:
    """The graph of ``module`` if it is one of a single argument that ends in a call of a child; else None."""
    if isinstance(module, (*WEIGHTED, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return None
    graph = _graph_within(module)
    return graph if graph is not None and getattr(_returned(graph), "op", "") == "call_module" else None


def _take_tuples_apart(root: nn.Module, graph: fx.Graph, blocks: set[nn.Module]) -> None:
    """Writes out what children do that return a tuple, as a pre-activation branch that returns its shortcut as well.

    Not those that hold blocks or additions of their own, which would close a block here again.
    """
    waiting = list(graph.nodes)
    while waiting:
        node = waiting.pop()
        module = module_of(root, node)
        if module is None or node.kwargs or [isinstance(a, fx.Node) for a in node.args] != [True]:
            continue
        if not all(_takes_one(user) for user in node.users):
            continue
        of_child = None if any(child in blocks for child in module.modules()) else _graph_within(module)
        if of_child is None or not _is_tuple(_returned(of_child)) or any(_is_addition(n) for n in of_child.nodes):
            continue
        before = set(graph.nodes)
        values = _written_out(graph, node, of_child)
        assert isinstance(values, (tuple, list))
        for user in list(node.users):
            value = values[user.args[1]]
            assert isinstance(value, fx.Node)
            user.replace_all_uses_with(value)
            graph.erase_node(user)
        graph.erase_node(node)
        waiting += [n for n in graph.nodes if n not in before]


def _takes_one(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int)


def _is_tuple(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(each, fx.Node) for each in value)


def _graph_within(module: nn.Module) -> fx.Graph | None:
    """The graph of ``module`` with calls of its children, if it may stand in its parent's: of a single argument."""
    if module._forward_hooks or module._forward_pre_hooks or next(module.children(), None) is None:
        return None
    try:
        graph = trace(module)
    except Untraceable:
        return None
    return graph if sum(n.op == "placeholder" for n in graph.nodes) == 1 else None


def _returned(graph: fx.Graph) -> object:
    return next(node for node in graph.nodes if node.op == "output").args[0]


def _written_out(graph: fx.Graph, node: fx.Node, of_child: fx.Graph) -> object:
    """Puts ``of_child``, the graph of the child that ``node`` calls, before ``node``; returns its result."""
    places = {next(n for n in of_child.nodes if n.op == "placeholder"): node.args[0]}
    with graph.inserting_before(node):
        return graph.graph_copy(_prefixed(of_child, str(node.target)), places)  # type: ignore[arg-type]


def _prefixed(graph: fx.Graph, prefix: str) -> fx.Graph:
    """``graph`` as its module's parent sees it."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{prefix}.{node.target}"
    return graph


def _folds(root: nn.Module, node: fx.Node) -> bool:
    module = module_of(root, node)
    return module is not None and norms.folds(module) and len(node.args) == 1 and len(node.users) == 1


def _is_relu(root: nn.Module, node: fx.Node) -> bool:
    return (
        type(module_of(root, node)) is nn.ReLU
        or (node.op == "call_function" and node.target in _RELUS)
        or (node.op == "call_method" and node.target in ("relu", "relu_"))
    )


def _is_gate(root: nn.Module, node: fx.Node) -> bool:
    """Whether the value is between 0 and 1, a factor of some map and none itself."""
    module = module_of(root, node)
    return (type(module).__name__ if module is not None else _name(node)) in _GATES


def _is_attention(root: nn.Module, node: fx.Node) -> bool:
    """Whether the value is x times a gate that parameters make of x: by a child, or written out in the block."""
    module = module_of(root, node)
    if module is None:
        return _is_gated(root, node, node.graph)
    if isinstance(module, WEIGHTED):
        return False
    found = traced_result(module)
    return found is not None and _is_gated(module, found[1], found[0], whole=True)


def _is_gated(root: nn.Module, node: fx.Node, graph: fx.Graph, whole: bool = False) -> bool:
    """``whole``: and x is the graph's input."""
    if not _is_product(node):
        return False
    ancestors = _ancestors(graph)
    for x, gate in (node.args, node.args[::-1]):
        assert isinstance(x, fx.Node)
        assert isinstance(gate, fx.Node)
        if whole and x.op != "placeholder":
            continue
        made_of_x = x in ancestors[gate]
        if made_of_x and _weighted(root, ancestors[gate] - ancestors[x]) > 0:
            return True
    return False
