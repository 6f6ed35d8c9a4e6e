"""A block's own forward as a graph, its children as leaves: by torch.fx, of each module for itself.

A whole network need not be traceable for that. Arguments with a default keep it: the graph is that of a call without
them, and such a call is what the rewritten block insists on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


class Untraceable(Exception):
    """Why a module's forward is no graph: its flow depends on the values of tensors, for the most part."""


def require_default(value: Any, default: Any, name: str) -> None:
    """Called by rewritten blocks with every argument that their graph took for its default."""
    if value is not default and (type(value) is not type(default) or value != default):
        raise TypeError(
            f"{name}: this block was converted for calls without it (default {default!r}); exclude the block, or give "
            "an adapter"
        )


class _BlockTracer(fx.Tracer):
    """Children are leaves; what is called without being registered is traced through.

    Buffers are proxies too: a norm that counts its batches writes the count down, instead of counting the trace.
    """

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m, forward, args, kwargs):
        try:
            self.path_of_module(m)
        except NameError:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Proxies for what a call must give, the defaults of the rest; ``*args`` and ``**kwargs`` are empty."""
        positional: list[Any] = [self.root]
        keywords = {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value: Any = self.create_proxy("placeholder", name, _default(parameter), {})
            if parameter.default is not parameter.empty:
                self.create_proxy("call_function", require_default, (value, parameter.default, name), {})
                value = parameter.default
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                positional.append(value)
        return lambda *args: root_fn(*args, **keywords), positional


def _default(parameter: inspect.Parameter) -> tuple:
    return () if parameter.default is parameter.empty else (parameter.default,)


def trace(module: nn.Module) -> fx.Graph:
    """The graph of ``module.forward`` as it is now.

    Raises:
        Untraceable: with the reason.
    """
    forward = type(module).forward
    if forward is nn.Module.forward or "forward" in vars(module):
        raise Untraceable("it has no forward of its class's own")
    before = dict(vars(module))
    try:
        graph = _BlockTracer().trace(module)
        kept = [name for name, value in vars(module).items() if name not in before or before[name] is not value]
    except Exception as error:  # whatever the module's own code raises when it meets a Proxy
        reason = str(error).strip().splitlines()
        raise Untraceable(f"{type(error).__name__}: {reason[0] if reason else ''}") from error
    finally:
        # A forward that keeps something in its module has kept a Proxy.
        vars(module).clear()
        vars(module).update(before)
    if kept:
        raise Untraceable(f"it keeps {', '.join(kept)} in itself, which no graph does")
    return graph


def traced_result(module: nn.Module) -> tuple[fx.Graph, fx.Node] | None:
    """The graph of ``module`` and the node that it returns; None if it has no graph, or returns anything else."""
    try:
        graph = trace(module)
    except Untraceable:
        return None
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    return (graph, result) if isinstance(result, fx.Node) else None


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """``module`` and all below it in training or evaluation, each as it was thereafter."""
    before = [(child, child.training) for child in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for child, value in before:
            child.training = value


def trace_both(module: nn.Module) -> tuple[fx.Graph, fx.Graph | None]:
    """The graph in training; and that in evaluation, None if it is the same.

    Raises:
        Untraceable: either.
    """
    with mode(module, True):
        training = trace(module)
    with mode(module, False):
        evaluation = trace(module)
    same = training.python_code("self").src == evaluation.python_code("self").src
    return training, None if same else evaluation
