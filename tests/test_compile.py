"""The step under torch.compile and torch.export: whole graphs, no needless recompiles, right gradients."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad

from dia_kernels import SharedAttention, models

BLOCKS = 6


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Stage(nn.Module):
    """Blocks that share one attention module, each with its own 1x1 convolution."""

    def __init__(self, blocks: int = BLOCKS, **options) -> None:
        super().__init__()
        self.attention = SharedAttention(8, 2, **options)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(blocks))

    def forward(self, x):
        state = None
        for convolution in self.convolutions:
            x, state = self.attention(convolution(x), state, shortcut=x, activation="relu")
        return x, state


def gradients(stage, model, x):
    y, (h, c) = model(x)
    return torch.autograd.grad(y.square().sum() + h.sum() + c.sum(), list(stage.parameters()))


def assert_same_up_to_order(found, expected):
    """Equal but for the order of additions, which a compiler may change: float32, sums of some 500 terms."""
    for a, b in zip(found, expected, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_six_blocks_are_one_graph_with_eager_gradients(memory_format, layers):
    stage = Stage(num_layers=layers)
    compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 8, 6, 6).contiguous(memory_format=memory_format)
    y, expected = compiled(x)[0], stage(x)[0]
    assert_same_up_to_order([y], [expected])
    assert y.stride() == expected.stride()
    assert_same_up_to_order(gradients(stage, compiled, x), gradients(stage, stage, x))


def test_the_gradient_of_the_map_under_compile():
    stage = Stage(2)
    compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 8, 6, 6, requires_grad=True)
    (found,) = torch.autograd.grad(compiled(x)[0].square().sum(), x)
    (expected,) = torch.autograd.grad(stage(x)[0].square().sum(), x)
    assert_same_up_to_order([found], [expected])


@pytest.mark.parametrize("frozen", ["attention", "convolutions"])
def test_frozen_parts_get_no_gradient_under_compile(frozen):
    stage = Stage(2)
    getattr(stage, frozen).requires_grad_(False)
    expected = [p.requires_grad for p in stage.parameters()]
    compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(3, 8, 6, 6))[0].sum().backward()
    assert [p.grad is not None for p in stage.parameters()] == expected


def test_training_compiles_once():
    stage, counter = Stage(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stage, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        compiled(torch.randn(3, 8, 6, 6))[0].sum().backward()
        optimizer.step()
    assert counter.frame_count == 1


def test_a_dynamic_batch_compiles_once():
    stage, counter = Stage(2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stage, backend=counter, fullgraph=True)
    for samples in (3, 4, 5, 7, 13):  # from 16 on convolutions compile anew, whatever stands behind them
        x = torch.randn(samples, 8, 6, 6)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same_up_to_order(gradients(stage, compiled, x), gradients(stage, stage, x))
    assert counter.frame_count == 1


def test_dynamic_positions_compile_once():
    stage, counter = Stage(2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stage, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((3, 8, 6, 7), (4, 8, 9, 5), (5, 8, 12, 11)):
            x = torch.randn(size)
            assert_same_up_to_order([compiled(x)[0]], [stage(x)[0]])
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_whole_network_trains_as_one_graph_of_any_batch_and_size():
    """Norms folded in, three stages, float64: the same losses and weights as eager, after steps of other shapes."""
    network, counter = models.create("resnet20", 10, attention="dia").double(), CompileCounterWithBackend("aot_eager")
    eager = copy.deepcopy(network)
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (network, eager)]
    for size in ((2, 3, 12, 8), (3, 3, 8, 12), (5, 3, 16, 20)):
        x = torch.randn(size, dtype=torch.float64)
        losses = []
        for net, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            loss = net(x).logsumexp(1).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    assert (
        len([g for g in counter.graphs if len(g.graph.nodes) > 0]) == 1
    )  # a module's compilation leaves an empty one too
    for (name, found), expected in zip(network.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_inductor_trains_and_serves():
    stage = Stage(2)
    compiled = torch.compile(stage, fullgraph=True)
    x = torch.randn(3, 8, 6, 6)
    assert_same_up_to_order(gradients(stage, compiled, x), gradients(stage, stage, x))
    with torch.no_grad():
        assert_same_up_to_order([compiled(x)[0]], [stage(x)[0]])


def test_in_place_under_compile():
    attention = SharedAttention(8, 2).requires_grad_(False)

    def block(x):
        return attention(x * 2, shortcut=x, activation="relu", inplace=True)[0]

    x = torch.randn(3, 8, 6, 6)
    assert torch.equal(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))
    before = x.clone()
    expected, _ = attention(before)
    compiled = torch.compile(lambda x: attention(x, inplace=True)[0], backend="aot_eager", fullgraph=True)
    compiled(x)
    assert torch.equal(x, expected)


def test_autocast_under_compile():
    stage = Stage(2)
    x = torch.randn(3, 8, 6, 6)

    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, (h, c) = model(x)
        return y, h, c

    found, expected = run(torch.compile(stage, backend="aot_eager", fullgraph=True)), run(stage)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert_same_up_to_order(found[1:], expected[1:])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiling_a_functional_gradient(backend):
    stage = Stage(2, backend=backend)
    parameters = {name: p.detach() for name, p in stage.named_parameters()}
    x = torch.randn(3, 8, 6, 6)

    def loss(parameters, x):
        return functional_call(stage, parameters, (x,))[0].square().sum()

    found = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)(parameters, x)
    expected = torch.autograd.grad(loss(dict(stage.named_parameters()), x), list(stage.parameters()))
    assert list(found) == list(parameters)
    assert_same_up_to_order(found.values(), expected)


# --- export -------------------------------------------------------------------------------------------


def library_operators(program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "dia_kernels" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_export_keeps_the_operators_and_every_gradient(mode, strict):
    stage = Stage(3)
    stage.train(mode == "train")
    x = torch.randn(3, 8, 6, 6)
    program = torch.export.export(stage, (x,), strict=strict)
    assert library_operators(program) == ["dia_kernels.step.default"] * 3
    module = program.module()
    exported = dict(module.named_parameters())
    found = torch.autograd.grad(module(x)[0].square().sum(), [exported[name] for name, _ in stage.named_parameters()])
    expected = torch.autograd.grad(stage(x)[0].square().sum(), list(stage.parameters()))
    assert_same_up_to_order(found, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_reference_is_plain_aten(strict):
    stage = Stage(2, backend="reference")
    x = torch.randn(3, 8, 6, 6)
    program = torch.export.export(stage, (x,), strict=strict)
    assert library_operators(program) == []
    decomposed = program.run_decompositions().graph
    calls = {str(node.target) for node in decomposed.nodes if node.op == "call_function"} - {str(operator.getitem)}
    assert all(call.startswith("aten.") for call in calls), calls
    assert_same_up_to_order([program.module()(x)[0]], [stage(x)[0]])


def test_export_with_a_dynamic_batch():
    stage = Stage(2)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(stage, (torch.randn(3, 8, 6, 6),), dynamic_shapes=({0: batch},))
    for samples in (2, 5, 11):
        x = torch.randn(samples, 8, 6, 6)
        assert torch.equal(program.module()(x)[0], stage(x)[0])


def test_an_exported_program_survives_a_file(tmp_path):
    stage = Stage(2)
    x = torch.randn(3, 8, 6, 6)
    torch.export.save(torch.export.export(stage, (x,)), tmp_path / "stage.pt2")
    assert torch.equal(torch.export.load(tmp_path / "stage.pt2").module()(x)[0], stage(x)[0])
