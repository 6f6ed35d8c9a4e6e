"""The module: parameters, initialisation, state dict, copies."""

import copy
import io
import pickle

import pytest
import torch

import dia_kernels as dk


@pytest.mark.parametrize(
    ("channels", "reduction", "count"),
    [(16, 4, 776), (32, 4, 2832), (64, 4, 10784), (128, 4, 42048), (256, 4, 166016), (512, 4, 659712)],
)
def test_parameter_counts_are_those_of_the_paper(channels, reduction, count):
    layer = dk.SharedAttention(channels, reduction, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == count


def test_a_stacked_layer_adds_its_plain_linears():
    one, two = (dk.SharedAttention(16, num_layers=k, device="meta") for k in (1, 2))
    numbers = [sum(p.numel() for p in layer.parameters()) for layer in (one, two)]
    assert numbers[1] - numbers[0] == 8 * 16 * 16 + 8 * 16


@pytest.mark.parametrize(("channels", "bottleneck"), [(256, 12), (512, 25), (1024, 51), (2048, 102)])
def test_the_bottleneck_is_a_floor_division(channels, bottleneck):
    assert dk.SharedAttention(channels, 20, device="meta").input_reduce_weight.shape == (bottleneck, channels)


def test_the_state_dict_is_stable():
    shapes = {name: tuple(t.shape) for name, t in dk.SharedAttention(8, 3, num_layers=2).state_dict().items()}
    first = {"reduce_weight": (2, 8), "reduce_bias": (2,), "expand_weight": (32, 2), "expand_bias": (32,)}
    second = {"weight_l1": (32, 8), "bias_l1": (32,)}
    assert shapes == {
        f"{path}_{name}": shape
        for part in (first, second)
        for path in ("input", "hidden")
        for name, shape in part.items()
    }


def test_initial_values_are_those_of_linear():
    torch.manual_seed(0)
    layer = dk.SharedAttention(64, 4)
    for path in ("input", "hidden"):
        for part, inputs in (("reduce", 64), ("expand", 16)):
            for kind in ("weight", "bias"):
                values, bound = getattr(layer, f"{path}_{part}_{kind}"), inputs**-0.5
                assert values.abs().max() <= bound
                # The largest of n uniform values falls below 0.7 of the bound with probability 0.7^n <= 0.4 %.
                assert values.abs().max() >= 0.7 * bound


@pytest.mark.parametrize("move", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same(move):
    layer, x = dk.SharedAttention(8), torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x)[0], move(layer)(x)[0])


def test_a_checkpoint_loads_strictly():
    layer, other, x = dk.SharedAttention(8), dk.SharedAttention(8), torch.randn(2, 8, 3, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(layer(x)[0], other(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_are_cast_to_the_compute_dtype(dtype):
    layer, x = dk.SharedAttention(8).to(dtype), torch.randn(2, 8, 3, 3)
    y, (h, c) = layer(x)
    y.sum().backward()
    assert (y.dtype, h.dtype, c.dtype) == (torch.float32,) * 3
    assert all(p.grad.dtype == dtype for p in layer.parameters())


def test_no_state_is_a_state_of_zeros():
    layer, x, zero = dk.SharedAttention(8).double(), torch.randn(2, 8, 3, 3).double(), torch.zeros(2, 8).double()
    without, given = layer(x), layer(x, (zero, zero))
    # The hidden path is summed in another order: 8 terms, 4 sqrt(n) ulp.
    bound = 4 * 8**0.5 * torch.finfo(torch.float64).eps
    for a, b in zip((without[0], *without[1]), (given[0], *given[1]), strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


def test_the_text_of_a_layer_names_what_differs_from_the_default():
    assert repr(dk.SharedAttention(8)) == "SharedAttention(8, reduction=4)"
    assert repr(dk.SharedAttention(8, 2, output="tanh", num_layers=2)) == (
        "SharedAttention(8, reduction=2, output='tanh', num_layers=2)"
    )
