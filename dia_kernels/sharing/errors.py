"""The error of this package."""

from __future__ import annotations


class SharingError(ValueError):
    """A network cannot be converted as asked; the message says why, and what could be done. It is as it was."""
