"""The accuracy contract: the formula of the step in float64, and how far from it a result may be.

error = max |ours - truth| / max |truth|, one number a tensor. A result may have twice the error of
eager PyTorch in the same dtype, plus one ulp of max |truth|. For float64 maps truth and result have
the same precision, and the bound is 4 sqrt(n) ulp, n being the terms of the longest sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def formula(
    x: Tensor,
    shortcut: Tensor | None,
    h: Tensor,
    c: Tensor,
    w: tuple[Tensor, ...],
    *,
    channel_dim: int = 1,
    relu: bool = False,
    output: str = "sigmoid",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h', c')`` of one step by the published formula, with no code of the library.

    ``w`` holds Wx1, bx1, Wx2, bx2, Wh1, bh1, Wh2, bh2. All arithmetic is in ``dtype``; y is rounded
    to the dtype of x in the end.
    """
    Wx1, bx1, Wx2, bx2, Wh1, bh1, Wh2, bh2 = (t.to(dtype) for t in w)
    x_wide, h, c = x.to(dtype), h.to(dtype), c.to(dtype)
    channel_dim %= x.ndim
    spatial = [d for d in range(1, x.ndim) if d != channel_dim]
    p = x_wide.mean(spatial)
    u = (p @ Wx1.T + bx1).relu() @ Wx2.T + bx2 + (h @ Wh1.T + bh1).relu() @ Wh2.T + bh2
    C = x.shape[channel_dim]
    i, f, g, o = u[:, :C], u[:, C : 2 * C], u[:, 2 * C : 3 * C], u[:, 3 * C :]
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * (c.sigmoid() if output == "sigmoid" else c.tanh())
    y = x_wide * h.reshape([n if d in (0, channel_dim) else 1 for d, n in enumerate(x.shape)])
    if shortcut is not None:
        y = y + shortcut.to(dtype)
    if relu:
        y = y.relu()
    return y.to(x.dtype), h, c


def error(ours: Tensor, truth: Tensor) -> float:
    """max |ours - truth| / max |truth|; 0 for equal tensors, infinite where ours is not finite."""
    if ours.numel() == 0:
        return 0.0
    difference = (ours.double() - truth).abs().max().item()
    if difference == 0.0:
        return 0.0
    scale = truth.abs().max().item()
    return difference / scale if scale > 0.0 and math.isfinite(difference) else math.inf


def shrinkage(ours: Tensor, truth: Tensor) -> float:
    """Mean signed error away from zero, over max |truth|: what truncation shows and rounding does not."""
    return (((ours.double() - truth) * truth.sign()).mean() / truth.abs().max()).item()


def assert_accurate(ours: Tensor, truth: Tensor, eager: Tensor, name: str, terms: int) -> None:
    """Fails unless ``ours`` keeps the contract; ``terms`` are those of the longest sum behind it.

    All draws of one problem are stacked into one tensor first. In a single draw eager's error in a
    tensor of few values is now and then far below what rounding explains.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, expected {eager.dtype}"
    ulp = torch.finfo(ours.dtype).eps
    allowed = 4 * math.sqrt(terms) * ulp if ours.dtype == torch.float64 else 2 * error(eager, truth) + ulp
    found = error(ours, truth)
    assert found <= allowed, f"{name}: error {found:.2e}, allowed {allowed:.2e}"
    if ours.dtype in (torch.float16, torch.bfloat16) and ours.numel():
        _assert_unbiased(ours, truth, eager, name)


def _assert_unbiased(ours: Tensor, truth: Tensor, eager: Tensor, name: str) -> None:
    """Rounding to 16 bits errs independently in each value: the mean error is the spread / sqrt(count).

    Four standard deviations of that, and again twice what eager has.
    """
    if not truth.abs().max() > 0:
        return  # assert_accurate has found ours equal to zero
    spread = ((eager.double() - truth).square().mean().sqrt() / truth.abs().max()).item()
    allowed = 2 * (abs(shrinkage(eager, truth)) + 4 * spread / math.sqrt(ours.numel()))
    found = abs(shrinkage(ours, truth))
    assert found <= allowed, f"{name}: mean error {found:.2e}, allowed {allowed:.2e}"
