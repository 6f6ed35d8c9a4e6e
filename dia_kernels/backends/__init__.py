"""Which backends exist here, why one does not, and which of them serves a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import autograd, autograd_norm, autograd_tail, operators, reference
from . import triton


@dataclass(frozen=True)
class Backend:
    """An implementer of the operators, for tensors on one type of device.

    ``missing()`` says why it is not here; ``float64`` whether its kernels know that dtype (else the reference runs).
    """

    device: str
    operators: operators.Operators
    missing: Callable[[], str | None] = lambda: None
    float64: bool = True


def _cuda_missing() -> str | None:
    if operators.library_error is not None:
        return operators.library_error
    if not operators.library_has_cuda:
        return "the native library was built without CUDA (nvcc was not found, or DIA_KERNELS_BUILD=cpu)"
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


_backends: dict[str, Backend] = {
    "cpu": Backend("cpu", operators.native, lambda: operators.library_error),
    "cuda": Backend("cuda", operators.native, _cuda_missing, float64=False),
}


def names() -> tuple[str, ...]:
    """Names that the ``backend`` argument takes."""
    return (*_backends, "reference")


def missing(name: str) -> str | None:
    """None if backend ``name`` can run here, else the sentence that says why it cannot."""
    return None if name == "reference" else _backends[name].missing()


def add(
    name: str,
    device: str,
    kernels: Mapping[str, Callable[..., Any]],
    *,
    float64: bool = True,
    masked: Set[torch.dtype] = frozenset(),
    folds: bool = False,
    missing: Callable[[], str | None] = lambda: None,
) -> None:
    """Makes ``kernels`` a backend for tensors on ``device``: an implementation for each name in ``operators.SCHEMAS``.

    They have a set of operators to themselves, with the gradients of all others. A native library may implement some,
    under their names and ``_<name>``. Where a kernel is missing, the reference stands in; without ``float64`` for such
    maps too. ``masked``: dtypes of maps for which ``step``, ``tail`` and ``norm_rescale`` know ``keep_mask``.
    ``folds``: whether there are kernels of ``norm_pool``, ``norm_rescale`` and their gradients, so that it pays to fold
    a norm that comes before a cell of any kind. ``missing()`` says why the backend cannot run here.

    Raises:
        ValueError: there is such a backend, or no such operator.
    """
    if name in names():
        raise ValueError(f"name: there is a backend {name!r} already")
    unknown = kernels.keys() - operators.SCHEMAS.keys()
    if unknown:
        raise ValueError(f"kernels: there are no operators {', '.join(sorted(unknown))}")
    added = operators.Operators(f"_{name}")
    added.masked_dtypes[device] = frozenset(masked)
    added.folding_devices |= {device} if folds else set()
    for operator, kernel in kernels.items():
        operators.library.impl(operator + added.suffix, kernel, torch._C._dispatch_key_for_device(device))
    autograd.register(added)
    autograd_tail.register(added)
    autograd_norm.register(added)
    _backends[name] = Backend(device, added, missing, float64)


class _Around(threading.local):
    """The backend of the innermost ``use_backend`` around a call, in each thread.

    No ContextVar: dynamo reads those from torch 2.14 on only, and sets none. And no default of the class: dynamo's
    guards do not see that an attribute of the instance hides it later.
    """

    def __init__(self) -> None:
        self.backend: str | None = None


_around = _Around()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Has every call inside that names no backend of its own served by backend ``name``.

    ``with use_backend("reference"): torch.export.export(model, ...)`` exports plain ATen. A module's own ``backend``,
    or a call's, wins. Blocks nest; a function is decorated by it too. It holds for the thread that entered it, as
    ``torch.no_grad`` does, and no other. A function compiled by ``torch.compile`` is compiled anew for each
    backend that it is called under. Backward passes run on the backend of their forward pass, wherever they run; what
    activation checkpointing computes again asks anew, so there name the backend as the module's argument.

    Args:
        name: out of ``dia_kernels.backends.names()``. Each call checks whether it is here and serves the map's device.

    Raises:
        ValueError: an unknown name.
    """
    if name not in names():
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    before, _around.backend = _around.backend, name
    try:
        yield
    finally:
        _around.backend = before


def chosen(backend: str | None, device: torch.device) -> str | None:
    """The backend for a call that names ``backend``, on ``device``: that, else ``use_backend``'s, else None.

    Raises:
        ValueError: an unknown name, or a backend for another device.
        RuntimeError: the backend is missing here; the message says why.
    """
    if backend is None:
        backend = _around.backend
    if backend is None or backend == "reference":
        return backend
    if backend not in _backends:
        raise ValueError(f"backend: expected None or one of {', '.join(names())}, got {backend!r}")
    found = _backends[backend]
    if device.type != found.device:
        raise ValueError(f"backend: {backend!r} serves {found.device} tensors, x is on {device}")
    reason = found.missing()
    if reason is not None:
        raise RuntimeError(f"backend: {backend!r} is missing here: {reason}")
    return backend


def operators_of(backend: str | None, x: Tensor) -> operators.Operators:
    """The operators behind ``backend``, which ``chosen`` gave, for the map ``x``; None: the native ones."""
    if x.dtype == torch.float64:
        found = _backends.get(backend or x.device.type)
        if found is not None and not found.float64:
            return operators.plain
    if backend is not None:
        return _backends[backend].operators
    return _of_cuda if x.device.type == "cuda" else operators.native


def decompositions() -> dict[operators.Operator, Callable[..., Any]]:
    """The operators of every backend that a forward pass may hold, each with the reference that replaces it.

    For a program that was exported with them: ``program.run_decompositions(decompositions())`` leaves plain ATen. Only
    the in-place ``step_`` is not among them: export without ``inplace=True``.
    """
    table: dict[operators.Operator, Callable[..., Any]] = {}
    for ops in (operators.plain, *(backend.operators for backend in _backends.values())):
        table[ops.step] = autograd._reference_step
        table[ops.tail] = autograd_tail._reference_tail
        table[ops.pool] = reference.pool
        table[ops.rescale] = reference.rescale
    return table


add("triton", "cuda", triton.KERNELS, float64=False, missing=triton.missing)


def serving_cuda(native: bool, has_triton: bool) -> operators.Operators:
    """What serves CUDA tensors where nobody asks for a backend: the native library, else Triton, else the reference.

    The reference stands behind the native library's operators wherever that has no kernel.
    """
    return _backends["triton"].operators if has_triton and not native else operators.native


_of_cuda = serving_cuda(operators.library_has_cuda, triton.INSTALLED)
