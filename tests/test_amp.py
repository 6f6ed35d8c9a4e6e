"""Mixed precision: the table of docs/amp.md, whole networks under autocast, the gradient scaler."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dia_kernels import SharedAttention, models

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
PAGE = Path(__file__).parents[1] / "docs" / "amp.md"


def rows() -> list[tuple[str, ...]]:
    lines = PAGE.read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("| autocast |")) + 2
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append(tuple(re.findall(r"[\w-]+", line)))
    return found


def dtype_of(name: str) -> torch.dtype | None:
    return None if name in ("none", "-") else getattr(torch, name)


def name_of(t: torch.Tensor | None) -> str:
    return "-" if t is None else str(t.dtype).removeprefix("torch.")


def found_dtypes(
    device: str, folded: bool, backend: str | None, autocast: str, x: str, shortcut: str, weights: str, state: str
) -> tuple[str, ...]:
    """The right half of a row."""

    def leaf(*size: int, like: str) -> torch.Tensor:
        return torch.rand(size, device=device).to(dtype_of(like)).requires_grad_()

    attention = SharedAttention(8, 4, backend=backend).to(device, dtype_of(weights))
    norm = nn.BatchNorm2d(8).to(device, dtype_of(weights)) if folded else None
    z, s = leaf(3, 8, 5, 4, like=x), leaf(3, 8, 5, 4, like=shortcut)
    given = None if state == "none" else (leaf(3, 8, like=state), leaf(3, 8, like=state))
    around = (
        contextlib.nullcontext() if autocast == "off" else torch.autocast(device_type=device, dtype=dtype_of(autocast))
    )
    with around:
        y, (h, c) = attention(z, given, norm=norm, shortcut=s, activation="relu")
    (y.sum() + h.sum() + c.sum()).backward()
    parameters = [*attention.parameters(), *(norm.parameters() if norm is not None else ())]
    (of_weights,) = {name_of(p.grad) for p in parameters}
    of_state = {name_of(t.grad) for t in given} if given else {"-"}
    assert h.dtype == c.dtype
    assert len(of_state) == 1
    return name_of(y), name_of(h), name_of(z.grad), name_of(s.grad), of_weights, of_state.pop()


def test_the_table_has_every_mix_that_autocast_makes():
    mixes = {(row[0], row[3]) for row in rows()}
    assert {(cast, w) for cast in ("float16", "bfloat16") for w in ("float32", "bfloat16")} <= mixes
    assert len(rows()) == len(set(rows())) == 18


@pytest.mark.parametrize("row", rows(), ids=" ".join)
@pytest.mark.parametrize("folded", [False, True], ids=["step", "tail"])
def test_every_row_of_the_table(backend, folded, row):
    assert found_dtypes("cpu", folded, backend, *row[:5]) == row[5:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("row", rows(), ids=" ".join)
@pytest.mark.parametrize("folded", [False, True], ids=["step", "tail"])
def test_every_row_of_the_table_on_a_gpu(folded, row):
    assert found_dtypes("cuda", folded, None, *row[:5]) == row[5:]


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return models.create("resnet20", 10, attention="dia").to(device)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_no_map_of_a_network_is_promoted(device, cast, weights):
    net = network(device).to(weights)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()  # PyTorch's own norms refuse a float16 map beside bfloat16 weights
    seen = []
    for module in net.modules():
        if isinstance(module, SharedAttention):
            module.register_forward_hook(
                lambda _, args, result: seen.append((args[0].dtype, result[0].dtype, result[1][0].dtype))
            )
    with torch.autocast(device, dtype=cast):
        logits = net(torch.randn(2, 3, 16, 16, device=device))
    logits.float().logsumexp(1).sum().backward()
    assert len(seen) == 9
    assert set(seen) == {(cast, cast, torch.float32)}
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_network_under_autocast_errs_no_more_than_the_reference_there(device, cast):
    """Against float64, over four draws; twice, as a step's contract says of a step, and more than zero."""
    ours = network(device)
    reference, truth = copy.deepcopy(ours), copy.deepcopy(ours).double()
    for net in (reference, truth):
        for module in net.modules():
            if isinstance(module, SharedAttention):
                module.backend = "reference"
    errors = {"ours": [], "reference": []}
    for seed in range(4):
        x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)
        expected = truth(x.double())
        for name, net in (("ours", ours), ("reference", reference)):
            with torch.autocast(device, dtype=cast):
                found = net(x)
            errors[name].append(((found.double() - expected).abs().max() / expected.abs().max()).item())
    ours_mean, reference_mean = (sum(errors[name]) / 4 for name in ("ours", "reference"))
    assert 0 < ours_mean <= 2 * reference_mean


@pytest.mark.parametrize("device", DEVICES)
def test_the_scaler_skips_a_step_that_overflows_and_goes_on(device):
    net = network(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**28)  # far more than float16 holds
    images = torch.randn(8, 3, 8, 8, device=device)
    labels = torch.arange(8, device=device)
    scales, losses, before = [], [], [p.detach().clone() for p in net.parameters()]
    for _ in range(24):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = nn.functional.cross_entropy(net(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        if len(scales) == 1:
            assert scales == [2.0**27]
            assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert scales[-1] == scales[-2] < 2.0**27
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.isfinite().all() for p in net.parameters())
