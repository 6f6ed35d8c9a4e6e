"""Fixtures of all tests: the implementations of the step that exist here, and global settings restored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dia_kernels import autograd, operators

BACKENDS = ("reference", "fallback", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> str | None:
    """The ``backend`` argument for each implementation of the step.

    ``reference`` is plain ATen with PyTorch's own gradients, ``fallback`` the operators' reference
    kernels (what a machine without the native library runs), ``cpu`` the native library.
    """
    if request.param == "reference":
        return "reference"
    if request.param == "cpu":
        if operators.library_error is not None:
            pytest.skip(f"no native kernels here: {operators.library_error}")
        return "cpu"
    for name, (kernel, _fake) in operators._KERNELS.items():
        monkeypatch.setattr(operators, name, kernel)
    for function, name in (
        (autograd.Pool, "pool"),
        (autograd.Rescale, "rescale"),
        (autograd.RescaleBackward, "rescale_backward"),
    ):
        monkeypatch.setattr(function, "forward", staticmethod(operators._KERNELS[name][0]))
    return None


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for tests of many small maps, which more threads only slow down; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
