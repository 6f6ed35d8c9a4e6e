"""The operators as torch sees them: schemas, fakes, strides, mutation, compilation and export."""

import pytest
import torch
from torch.library import opcheck

import dia_kernels as dk
from dia_kernels import operators


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


MAPS = {
    "contiguous": (1, lambda: torch.randn(2, 8, 3, 5)),
    "channels_last": (1, lambda: channels_last(torch.randn(2, 8, 3, 5))),
    "channels_last_3d": (1, lambda: channels_last(torch.randn(2, 8, 3, 2, 4))),
    "one_dimension": (1, lambda: torch.randn(2, 8, 7)),
    "sliced": (1, lambda: torch.randn(2, 9, 3, 10)[:, 1:, :, ::2]),
    "transposed": (1, lambda: torch.randn(8, 2, 3, 5).transpose(0, 1)),
    "expanded": (1, lambda: torch.randn(2, 8, 1, 1).expand(2, 8, 3, 5)),
    "tokens": (-1, lambda: torch.randn(2, 15, 8)),
    "no_samples": (1, lambda: torch.randn(0, 8, 3, 5)),
    "one_position": (1, lambda: torch.randn(2, 8, 1, 1)),
}


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(dk.SharedAttention(8, 3).lstm_parameters())


def table(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape[0], 8)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(kind, full):
    channel_dim, make = MAPS[kind]
    x, weights = make(), parameters()
    optional = (make(), table(x), table(x)) if full else (None, None, None)
    opcheck(operators.step, (x, *optional, *weights, channel_dim, full, not full, True))
    frozen = [w.detach() for w in weights]
    y, _, new_c, tables = operators.step(x, *optional, *frozen, channel_dim, full, not full, True)
    incoming = (make(), table(x), table(x)) if full else (make(), None, None)
    opcheck(
        operators.step_backward,
        (
            *incoming,
            x,
            y if full else None,
            *optional[1:],
            new_c,
            tables,
            *frozen[::2],
            channel_dim,
            full,
            not full,
            True,
            full,
            full,
            True,
        ),
    )
    opcheck(operators.pool, (x, channel_dim))
    opcheck(operators.rescale, (x, table(x), optional[0], channel_dim, full))
    opcheck(operators.rescale_backward, (make(), x, table(x), y if full else None, channel_dim, True, True, full))
    if kind != "expanded":
        opcheck(operators.step_, (x.clone(), *optional, *frozen, channel_dim, full, not full))


def test_step_in_place_says_that_it_writes():
    x = torch.randn(2, 8, 3, 5)
    before = x._version
    with torch.no_grad():
        dk.SharedAttention(8, 3)(x, inplace=True)
    assert x._version == before + 1


class SixBlocks(torch.nn.Module):
    """Six residual blocks of a stage that share one attention."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = dk.SharedAttention(8, 2, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for _ in range(6):
            x, state = self.attention(x, state, shortcut=x, activation="relu")
        return x


def test_six_blocks_compile_whole_once_and_give_the_same_gradients():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = SixBlocks()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(3, 8, 5, 5, requires_grad=True)
    for _ in range(5):
        model.zero_grad()
        compiled(x).sum().backward()
    assert counter.frame_count == 1
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for a, p in zip(ours, model.parameters(), strict=True):
        assert torch.equal(a, p.grad)


def test_a_dynamic_batch_compiles_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(SixBlocks(), backend=counter, fullgraph=True, dynamic=True)
    for n in (2, 3, 5, 7):
        assert compiled(torch.randn(n, 8, 5, 5)).shape == (n, 8, 5, 5)
    assert counter.frame_count == 1


def test_inductor_keeps_the_layout_and_the_bits():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = SixBlocks(), channels_last(torch.randn(2, 8, 5, 5))
    with torch.no_grad():
        eager, compiled = model(x), torch.compile(model, fullgraph=True)(x)
    assert compiled.stride() == eager.stride()
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_operator(strict):
    program = torch.export.export(SixBlocks(), (torch.randn(2, 8, 5, 5),), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("dia_kernels.step.default") == 6


def test_export_of_the_reference_is_plain_aten():
    program = torch.export.export(SixBlocks(backend="reference"), (torch.randn(2, 8, 5, 5),))
    assert not any("dia_kernels" in str(node.target) for node in program.graph.nodes)


def test_the_gradient_of_a_compiled_transform_is_right():
    torch._dynamo.reset()
    model = dk.SharedAttention(8, 2, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)

    def slope(x):
        return torch.func.grad(lambda x: model(x)[0].square().sum())(x)

    torch.testing.assert_close(torch.compile(slope, backend="aot_eager", fullgraph=True)(x), slope(x))
