"""Which backends exist here, and why one does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import autograd, autograd_tail, operators


@dataclass(frozen=True)
class Backend:
    """An implementer of the operators, for tensors on one type of device; ``missing()`` says why it is not here."""

    device: str
    operators: operators.Operators
    missing: Callable[[], str | None] = lambda: None


_backends: dict[str, Backend] = {"cpu": Backend("cpu", operators.native, lambda: operators.library_error)}


def names() -> tuple[str, ...]:
    """Names that the ``backend`` argument takes."""
    return (*_backends, "reference")


def missing(name: str) -> str | None:
    """None if backend ``name`` can run here, else the sentence that says why it cannot."""
    return None if name == "reference" else _backends[name].missing()


def add(name: str, device: str, kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Makes ``kernels`` a backend for tensors on ``device``: an implementation for each name in ``operators.SCHEMAS``.

    They have a set of operators to themselves, with the gradients of all others. Where a kernel is missing, the
    reference stands in.

    Raises:
        ValueError: there is such a backend, or no such operator.
    """
    if name in names():
        raise ValueError(f"name: there is a backend {name!r} already")
    unknown = kernels.keys() - operators.SCHEMAS.keys()
    if unknown:
        raise ValueError(f"kernels: there are no operators {', '.join(sorted(unknown))}")
    added = operators.Operators(f"_{name}")
    for operator, kernel in kernels.items():
        operators.library.impl(operator + added.suffix, kernel, torch._C._dispatch_key_for_device(device))
    autograd.register(added)
    autograd_tail.register(added)
    _backends[name] = Backend(device, added)


def check(backend: str | None, device: torch.device) -> None:
    """Raises unless ``backend`` is None or can serve tensors on ``device``.

    Raises:
        ValueError: an unknown name, or a backend for another device.
        RuntimeError: the backend is missing here; the message says why.
    """
    if backend is None or backend == "reference":
        return
    if backend not in _backends:
        raise ValueError(f"backend: expected None or one of {', '.join(names())}, got {backend!r}")
    found = _backends[backend]
    if device.type != found.device:
        raise ValueError(f"backend: {backend!r} serves {found.device} tensors, x is on {device}")
    reason = found.missing()
    if reason is not None:
        raise RuntimeError(f"backend: {backend!r} is missing here: {reason}")


def operators_of(backend: str | None) -> operators.Operators:
    """The operators behind ``backend``, which ``check`` has accepted; None: the native ones, for every device."""
    return operators.native if backend is None else _backends[backend].operators
