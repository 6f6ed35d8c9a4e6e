"""Which backends exist here, and why one does not."""

from __future__ import annotations

import torch

from .. import operators

#: Names that the ``backend`` argument takes.
NAMES = ("cpu", "reference")


def missing(name: str) -> str | None:
    """None if backend ``name`` can run here, else the sentence that says why it cannot."""
    return None if name == "reference" else operators.library_error


def check(backend: str | None, device: torch.device) -> None:
    """Raises unless ``backend`` is None or can serve tensors on ``device``.

    Raises:
        ValueError: an unknown name, or a backend for another device.
        RuntimeError: the backend is missing here; the message says why.
    """
    if backend is None or backend == "reference":
        return
    if backend not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    if device.type != backend:
        raise ValueError(f"backend: {backend!r} serves {backend} tensors, x is on {device}")
    reason = missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend: {backend!r} is missing here: {reason}")
