"""Less memory in training: blocks that are computed again in the backward pass instead of kept (arXiv:1604.06174).

``checkpoint(model)`` does it to the blocks or stages of a network, in place; ``checkpointed(function, ...)`` to one
call in one's own forward. Both are PyTorch's non-reentrant checkpointing, and the gradients equal those without it bit
for bit. Beyond it, the second pass sees every module as the first one saw it: a batch norm does not count a batch
twice, and parameters that ``torch.func.functional_call`` put in place stand there again. What is saved, and what it
costs: docs/memory.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from . import autograd, operators, sharing
from .models.parts import Block, Stage
from .sharing.rewriting import is_converted

#: Says of an operator's call whether its results are kept, as ``create_selective_checkpoint_contexts`` wants it.
Policy = Callable[..., CheckpointPolicy | bool]
#: What is kept of a block beside its inputs.
Save = Literal["everything", "convolutions", "nothing"] | Policy
#: Which modules are computed again: by name, by class, or the modules themselves.
What = Literal["block", "stage"] | type[nn.Module] | Iterable[nn.Module]

Network = TypeVar("Network", bound=nn.Module)

_SAVES = ("everything", "convolutions", "nothing")
#: Tensors that a policy keeps go through the caller's own saved_tensors_hooks, as all others do; torch 2.10 has no such
#: argument, and there they never do.
_HOOKS = "respect_saved_tensors_hooks"
_RESPECTFUL = {_HOOKS: True} if _HOOKS in inspect.signature(torch_checkpoint.checkpoint).parameters else {}


def keep_convolutions(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy behind ``save="convolutions"``: keeps results of convolutions and of this library's operators.

    Of the latter, y is the next block's input, which is kept anyway; the rest is small.
    """
    costly = operator is torch.ops.aten.convolution.default or operator.namespace == operators.NAMESPACE
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint(
    model: Network, what: What = "block", *, save: Save = "nothing", preserve_rng_state: bool = True
) -> Network:
    """Makes parts of ``model`` compute themselves again in the backward pass instead of keeping what it needs.

    Results, gradients and buffers are those without it, bit for bit. State-dict keys, classes and hooks stay; the
    setting goes along with ``copy.deepcopy`` and ``pickle``. Called again, it changes the setting;
    ``save="everything"`` ends it. Without gradients, inside ``torch.func`` transforms (which know no hooks on saved
    tensors), under ``torch.export`` and ``torch.fx``, the parts run as they would without it. Under ``torch.compile``
    the compiler recomputes them. ``nn.DataParallel`` is not supported.

    Args:
        model: a network of ``models.create``, one that ``share_attention`` has converted, or any other.
        what: ``"block"``: each residual block; its inputs, the map and the attention's state, are kept. ``"stage"``:
            each stage. Or a class of modules, or modules of ``model``.
        save: ``"nothing"`` beside the inputs; ``"convolutions"``: their results and those of attention, so that norms
            and activations between them are computed again; ``"everything"``: no checkpointing; or a policy of one's
            own for ``torch.utils.checkpoint.create_selective_checkpoint_contexts``, a function of a module for
            pickle's sake.
        preserve_rng_state: dropout draws the same numbers again. False saves a little time where there is none.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``save`` is none of these; there is no such part; a stage is no module of its own; a module whose
            ``forward`` was replaced on the instance.
        TypeError: an argument is of the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    _check_save(save)
    parts = _parts(model, what)
    for part in parts:
        if not isinstance(part.__dict__.get("forward", None), (_Recomputed, type(None))):
            raise ValueError(f"what: a {type(part).__name__} has a forward of its own on the instance")
    for part in parts:
        part.__dict__.pop("forward", None)
        if save != "everything":
            part.__dict__["forward"] = _Recomputed(part, save, preserve_rng_state)
    return model


def checkpointed(
    function: Callable[..., Any],
    *args: Any,
    save: Save = "nothing",
    preserve_rng_state: bool = True,
    modules: Iterable[nn.Module] = (),
    **kwargs: Any,
) -> Any:
    """``function(*args, **kwargs)``, computed again in the backward pass; for one's own forward.

    ``x, state = checkpointed(block, x, attention, state)``

    Args:
        function: a module, a module's method, or any function.
        args, kwargs: its arguments; tensors in them are kept.
        save, preserve_rng_state: see ``checkpoint``.
        modules: that ``function`` calls beside itself and those among ``args``, and whose buffers it may change.

    Returns:
        What ``function`` returns.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    if not callable(function):
        raise TypeError(f"function: expected a module or a function, got {type(function).__name__}")
    _check_save(save)
    roots = [getattr(function, "__self__", function), *modules]
    return _call(function, [r for r in roots if isinstance(r, nn.Module)], save, preserve_rng_state, args, kwargs)


class _Recomputed:
    """The ``forward`` of one module, on the instance."""

    def __init__(self, module: nn.Module, save: Save, preserve_rng_state: bool) -> None:
        self.module, self.save, self.preserve_rng_state = module, save, preserve_rng_state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = partial(type(self.module).forward, self.module)
        return _call(forward, [self.module], self.save, self.preserve_rng_state, args, kwargs)


def _check_save(save: object) -> None:
    if not callable(save) and save not in _SAVES:
        raise ValueError(f"save: expected one of {', '.join(map(repr, _SAVES))} or a policy, got {save!r}")


# --- which modules -------------------------------------------------------------------------------------------------


def _parts(model: nn.Module, what: What) -> list[nn.Module]:
    if isinstance(what, str):
        if what not in ("block", "stage"):
            raise ValueError(f'what: expected "block", "stage", a class or modules, got {what!r}')
        parts = _blocks(model) if what == "block" else _stages(model)
        if not parts:
            raise ValueError(
                f"what: found no {what} of models.create or share_attention in model; give a class, or modules"
            )
        return parts
    inside = list(model.modules())
    if isinstance(what, type):
        parts = [module for module in inside if isinstance(module, what)]
        if not parts:
            raise ValueError(f"what: model holds no {what.__name__}")
        return parts
    if not isinstance(what, Iterable):
        raise TypeError(f'what: expected "block", "stage", a class or modules, got {type(what).__name__}')
    parts = list(what)
    ids = {id(module) for module in inside}
    for part in parts:
        if not isinstance(part, nn.Module):
            raise TypeError(f"what: expected modules, got a {type(part).__name__}")
        if id(part) not in ids:
            raise ValueError(f"what: a {type(part).__name__} is no module of model")
    return parts


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Block) or is_converted(module)]


def _stages(model: nn.Module) -> list[nn.Module]:
    stages: list[nn.Module] = [module for module in model.modules() if isinstance(module, Stage)]
    return stages or _converted_stages(model)


def _converted_stages(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a stage each and nothing of another; of stages of one block, the block."""
    if not any(map(is_converted, model.modules())):
        return []
    runs = [[block.name for block in stage.blocks] for stage in sharing.report(model).stages]
    names = [_common_parent(run) for run in runs]
    for run, name in zip(runs, names, strict=True):
        if not name or names.count(name) > 1:
            raise ValueError(f'what: the stage of {run[0]} to {run[-1]} is no module of its own; take "block"')
    return [model.get_submodule(name) for name in names]


def _common_parent(names: list[str]) -> str:
    """The longest qualified name that all of ``names`` lie at or below."""
    paths = [name.split(".") for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


# --- the call ------------------------------------------------------------------------------------------------------


def _call(
    function: Callable[..., Any],
    roots: list[nn.Module],
    save: Save,
    preserve_rng_state: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if save == "everything" or not torch.is_grad_enabled() or autograd.transforms_active() or _is_traced(args):
        return function(*args, **kwargs)
    policy = None if save == "nothing" else keep_convolutions if save == "convolutions" else save
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if torch.compiler.is_compiling():
        # The compiler puts each change of a buffer at the end of the forward, once.
        if policy is not None:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    else:
        roots = roots + [a for a in args if isinstance(a, nn.Module)]
        options["context_fn"] = partial(_contexts, roots, policy)
        options |= _RESPECTFUL
    return torch_checkpoint.checkpoint(function, *args, **options, **kwargs)


def _is_traced(args: tuple[Any, ...]) -> bool:
    """Whether a graph is being made that is run without a backward pass, or by someone else's rules."""
    return autograd.is_exporting() or _has_proxy(args)


def _has_proxy(value: Any) -> bool:
    return type(value) is fx.Proxy or (type(value) is tuple and any(map(_has_proxy, value)))


def _contexts(
    roots: list[nn.Module], policy: Policy | None
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Those around the first pass and around the second; called right before the first."""
    first, second = (nullcontext(),) * 2 if policy is None else create_selective_checkpoint_contexts(policy)
    return first, _Replay(_reachable(roots), second)


def _reachable(roots: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """``roots`` and all below them; the attention of a converted block too, which is no child of it."""
    seen: set[nn.Module] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        waiting += [child for child in module._modules.values() if child is not None]
        waiting += [value for value in vars(module).values() if isinstance(value, nn.Module)]


class _Replay:
    """While it is entered, and ``inner`` within, modules have the parameters, buffers and mode of when it was made.

    A buffer is a copy of that time's: what the second pass writes into it is forgotten. (Batch norms told not to track
    would leave theirs alone too, but PyTorch's saves fewer tensors then, and the second pass has to save the same.)
    """

    def __init__(self, modules: Iterable[nn.Module], inner: AbstractContextManager[Any]) -> None:
        self._inner = inner
        self._then = [(m, m.training, dict(m._parameters), _copied(m._buffers)) for m in modules]
        self._now: list[tuple[nn.Module, bool, dict[str, Any], dict[str, Any]]] = []

    def __enter__(self) -> None:
        self._now = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m, *_ in self._then]
        # A graph that is kept is replayed again: what it starts from must not change.
        _set((m, training, parameters, _copied(buffers)) for m, training, parameters, buffers in self._then)
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            self._inner.__exit__(*error)
        finally:
            _set(self._now)
            self._now = []


def _copied(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    with torch.no_grad():
        return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


def _set(states: Iterable[tuple[nn.Module, bool, dict[str, Any], dict[str, Any]]]) -> None:
    for module, training, parameters, buffers in states:
        module.training = training
        module._parameters.update(parameters)
        module._buffers.update(buffers)
