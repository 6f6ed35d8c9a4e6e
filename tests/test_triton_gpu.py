"""The Triton backend on a GPU. Imports nothing but torch, triton, pytest and the library, for a bare machine."""

from __future__ import annotations

import copy

import pytest
import torch
from test_cuda import DTYPES, SHAPES, maps
from torch import nn
from two_blocks import assert_as_accurate, captured, errors, results

from dia_kernels import SharedAttention, backends, models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.missing("triton") is not None, reason=f"no Triton: {backends.missing('triton')}"),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch", "running"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype, norm, channels_last):
    """Each result errs at most twice as much as eager PyTorch in the same dtype, plus an ulp of the largest value."""
    torch.manual_seed(0)
    attention = SharedAttention(shape[1], 4, backend="triton").cuda()
    module = None if norm == "none" else nn.BatchNorm2d(shape[1]).cuda().train(norm == "batch")
    of, _ = errors(attention, module, *maps(shape, dtype, channels_last))
    assert_as_accurate([of], dtype)


def test_the_same_bits_every_time():
    attention = SharedAttention(128, 4, backend="triton").cuda()
    module = nn.BatchNorm2d(128).cuda()
    x, s = maps((16, 128, 16, 16), torch.bfloat16, True)
    first = results(attention, copy.deepcopy(module), x, s)
    for _ in range(19):
        for name, value in results(attention, copy.deepcopy(module), x, s).items():
            assert torch.equal(value, first[name]), name


def test_a_captured_graph():
    attention = SharedAttention(64, 4, backend="triton").cuda().requires_grad_(False)
    module = nn.BatchNorm2d(64).cuda().requires_grad_(False)
    x, s = (t.detach() for t in maps((8, 64, 16, 16), torch.float32, True))

    def call() -> torch.Tensor:
        return attention(x, shortcut=s, activation="relu", norm=module)[0]

    graph, y = captured(call)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y.clone(), call())


def test_sizes_alone_compile_nothing_anew():
    from dia_kernels.backends.triton import kernels

    attention = SharedAttention(64, 4, backend="triton").cuda().requires_grad_(False)
    kinds = (kernels.reduce, kernels.spread, kernels.gates)

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kinds for cache in kernel.device_caches.values())

    for side in (48, 64, 80):  # too large for a program a sample
        for samples in (2, 3, 5):
            attention(torch.randn(samples, 64, side, side, device="cuda").contiguous(memory_format=torch.channels_last))
            if (side, samples) == (48, 2):
                first = compiled()
    assert compiled() == first


def test_a_compiled_network_is_the_eager_one():
    torch.manual_seed(0)
    network = models.create("resnet20", num_classes=4, attention="dia", backend="triton").cuda().eval()
    images = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        expected = network(images)
        found = torch.compile(network, fullgraph=True)(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
