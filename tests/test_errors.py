"""Bad input: one clear error that names the argument, and nothing changed."""

import functools
import re

import pytest
import torch
import torch.distributed.tensor

import dia_kernels as dk
from dia_kernels import autograd, backends, functional, operators


class Tagged(torch.Tensor):
    """A tensor subclass whose meaning no kernel knows."""


def attention(channels: int = 8, **options) -> dk.SharedAttention:
    torch.manual_seed(0)
    return dk.SharedAttention(channels, **options)


MAP = torch.ones(2, 8, 5, 5)
STATE = (torch.zeros(2, 8), torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("error", "names", "arguments"),
    [
        (ValueError, "x", {"x": torch.ones(2, 7, 5, 5)}),
        (ValueError, "x", {"x": torch.ones(2, 8)}),
        (ValueError, "x", {"x": torch.ones(2, 8, 2, 2, 2, 2)}),
        (TypeError, "x", {"x": torch.ones(2, 8, 5, 5, dtype=torch.int64)}),
        (TypeError, "x", {"x": [1.0]}),
        (TypeError, "x", {"x": MAP.as_subclass(Tagged)}),
        (ValueError, "input_reduce_weight", {"x": torch.ones(2, 8, 5, 5, device="meta")}),
        (TypeError, "state", {"state": torch.zeros(2, 8)}),
        (TypeError, "state", {"state": (STATE[0],)}),
        (ValueError, "state h", {"state": (torch.zeros(3, 8), torch.zeros(3, 8))}),
        (ValueError, "state c", {"state": (STATE[0], torch.zeros(2, 9))}),
        (TypeError, "state h", {"state": (torch.zeros(2, 8, dtype=torch.int64), STATE[1])}),
        (TypeError, "state h", {"state": (torch.zeros(2, 8, dtype=torch.float64), STATE[1])}),
        (ValueError, "state c", {"state": (STATE[0], torch.zeros(2, 8, device="meta"))}),
        (ValueError, "shortcut", {"shortcut": torch.ones(2, 8, 5, 4)}),
        (ValueError, "shortcut", {"shortcut": torch.ones(2, 8, 5, 5, device="meta")}),
        (TypeError, "shortcut", {"shortcut": torch.ones(2, 8, 5, 5, dtype=torch.int32)}),
        (TypeError, "shortcut", {"shortcut": MAP.as_subclass(Tagged)}),
        (TypeError, "x", {"x": MAP.to_sparse()}),
        (TypeError, "shortcut", {"shortcut": MAP.to_sparse()}),
        (TypeError, "state h", {"state": (STATE[0].to_sparse(), STATE[1])}),
        (ValueError, "activation", {"activation": "gelu"}),
        (TypeError, "norm", {"norm": (torch.ones(8),) * 3}),
        (TypeError, "norm", {"norm": (1.0, 0.0)}),
        (ValueError, "inplace", {"inplace": True}),
    ],
)
def test_a_wrong_argument_of_forward_is_named(error, names, arguments):
    with pytest.raises(error, match=rf"^{names}\b"):
        attention()(**({"x": MAP.clone()} | arguments))


@pytest.mark.parametrize(
    ("error", "names", "arguments"),
    [
        (ValueError, "channels", {"channels": 0}),
        (TypeError, "channels", {"channels": 8.0}),
        (ValueError, "reduction", {"reduction": 0}),
        (ValueError, "reduction", {"reduction": -4}),
        (ValueError, "reduction", {"reduction": 9}),
        (ValueError, "num_layers", {"num_layers": 0}),
        (ValueError, "output", {"output": "relu"}),
        (ValueError, "dropout", {"dropout": 1.0}),
        (ValueError, "channel_dim", {"channel_dim": 2}),
        (ValueError, "backend", {"backend": "abacus"}),
        (TypeError, "dtype", {"dtype": torch.int64}),
    ],
)
def test_a_wrong_argument_of_the_module_is_named(error, names, arguments):
    with pytest.raises(error, match=rf"^{names}\b"):
        dk.SharedAttention(**({"channels": 8} | arguments))


def test_a_distributed_tensor_is_named(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        x = distributed.tensor.distribute_tensor(MAP, mesh)
        with pytest.raises(TypeError, match=r"^x: expected a plain torch.Tensor, got the subclass DTensor"):
            attention()(x)
    finally:
        distributed.destroy_process_group()


def test_float64_parameters_with_a_lower_map_are_a_type_error():
    with pytest.raises(TypeError, match=r"^input_reduce_weight: float64"):
        attention(dtype=torch.float64)(MAP)


def test_a_parameter_of_another_shape_is_named():
    parameters = attention().lstm_parameters()._replace(hidden_expand_bias=torch.zeros(31))
    with pytest.raises(ValueError, match=r"^hidden_expand_bias: expected shape \(32,\)"):
        functional.step(MAP, parameters)


@pytest.mark.parametrize(
    ("error", "names", "arguments"),
    [
        (TypeError, "parameters", {"parameters": 3}),
        (TypeError, "parameters", {"parameters": (torch.ones(2, 8),) * 7}),
        (TypeError, "stacked", {"stacked": 3}),
        (TypeError, "stacked", {"stacked": [torch.ones(4)]}),
        (ValueError, "dropout", {"dropout": 7, "stacked": attention(num_layers=2).stacked_layers()}),
        (ValueError, "dropout", {"dropout": "a", "stacked": attention(num_layers=2).stacked_layers()}),
        (ValueError, "output", {"output": 3}),
        (TypeError, "norm", {"norm": (torch.ones(8),), "sample_scale": torch.ones(2)}),
    ],
)
def test_a_wrong_argument_of_the_function_is_named(error, names, arguments):
    good = {"x": MAP.clone(), "parameters": attention().lstm_parameters()}
    with pytest.raises(error, match=rf"^{names}\b"):
        functional.step(**(good | arguments))


def test_in_place_refuses_expanded_memory_and_leaves_it_alone():
    x = torch.ones(2, 8, 1, 1).expand(2, 8, 5, 5)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^inplace: x is an expanded tensor"):
        attention()(x, inplace=True)
    assert torch.equal(x, torch.ones(2, 8, 5, 5))


def test_in_place_refuses_gradients_and_leaves_the_map_alone():
    x = MAP.clone()
    with pytest.raises(ValueError, match=r"^inplace: expected False where a gradient is needed"):
        attention()(x, inplace=True)
    assert torch.equal(x, MAP)


def test_in_place_is_yes_no_or_auto():
    with pytest.raises(ValueError, match=r"^inplace: expected True, False or \"auto\", got 'yes'"):
        attention()(MAP, inplace="yes")


def test_a_backend_for_another_device_is_named():
    layer = attention(backend="cpu", device="meta")
    with pytest.raises(ValueError, match=r"^backend: 'cpu' serves cpu tensors"):
        layer(torch.ones(2, 8, 5, 5, device="meta"))


def test_a_named_backend_that_is_missing_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(operators, "library_error", "it was not built")
    assert backends.missing("cpu") == "it was not built"
    with pytest.raises(RuntimeError, match=r"^backend: 'cpu' is missing here: it was not built"):
        attention(backend="cpu")(MAP)


def test_a_state_from_an_earlier_pass_ends_in_an_error_that_says_so():
    layer, x = attention(), MAP.clone().requires_grad_()
    y, state = layer(x)
    y.sum().backward()
    y, _ = layer(x, state)
    with pytest.raises(RuntimeError, match="begin each forward pass") as caught:
        y.sum().backward()
    assert autograd._STALE_STATE in str(caught.value)


# --- the native operators, called directly ---------------------------------------------------------


@functools.cache
def operator_calls() -> dict[str, tuple]:
    """A good call of every operator, with every optional tensor there."""
    weights = [p.detach() for p in attention().lstm_parameters()]
    y, h, c, tables, _ = operators.native.step(MAP, MAP, *STATE, *weights, 1, True, False, True, False)
    gamma, beta, mean, var = torch.rand(4, 8).unbind()
    pooled = operators.native.norm_pool(MAP, gamma, beta, mean, var, 1e-5, 1, True, True, False)
    p, of_norm, _, _, variance, extreme, where, *_ = pooled
    statistics = (p, variance.clone(), variance, p.clone(), extreme, where)
    return {
        "step": (MAP, MAP, *STATE, *weights, 1, True, False, True, False),
        "step_": (MAP.clone(), MAP, *STATE, *weights, 1, True, False),
        "step_backward": (MAP, h, c, MAP, y, *STATE, c, tables, *weights[::2], 1, True, False, *(True,) * 4, False),
        "tail_tracking_": (
            MAP,
            MAP,
            *STATE,
            *torch.rand(2, 8),
            *(torch.rand(8) for _ in range(2)),
            torch.tensor(3),
            0.1,
            1e-5,
            *weights,
            1,
            True,
            False,
            False,
        ),
        "norm_pool": (MAP, gamma, beta, mean, var, 1e-5, 1, True, True, True),
        "norm_pool_tracking_": (MAP, gamma, beta, torch.rand(8), torch.rand(8), torch.tensor(3), 0.1, 1e-5, 1)
        + (True,) * 3,
        "norm_pool_backward": (MAP, torch.rand(3, 2, 8), *statistics, MAP, of_norm, gamma, 1, True, True),
        "norm_rescale": (MAP, STATE[0], MAP, of_norm, None, None, gamma, beta, 1, True, False),
        "norm_rescale_backward": (MAP, y, MAP, STATE[0], of_norm, gamma, beta, 1, True),
        "pool": (MAP, 1),
        "rescale": (MAP, STATE[0], MAP, 1, True),
        "rescale_backward": (MAP, MAP, STATE[0], y, 1, True, True, True),
    }


def good_call(name: str) -> list:
    """The arguments of a good call, which may be written over."""
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in operator_calls()[name]]


def with_wrong_size(t: torch.Tensor, dim: int, change: int) -> torch.Tensor:
    sizes = list(t.shape)
    sizes[dim] += change
    return torch.ones(sizes)


def wrong_calls():
    """(operator, index of the tensor that is wrong, what is wrong with it)."""
    for name, arguments in operator_calls().items():
        for index, value in enumerate(arguments):
            if not isinstance(value, torch.Tensor):
                continue
            # A map that no other differs from may have any size and dtype, but the channels of a norm; and statistics
            # may be wider.
            alone = name == "pool" or (name.startswith("norm_pool") and name != "norm_pool_backward" and index == 0)
            is_wide = value.dtype == torch.float64
            if name != "pool":
                dims = (1,) if alone else range(value.ndim)
                yield from ((name, index, (dim, change)) for dim in dims for change in (-1, 1))
            wrong = [torch.int32, torch.bool, torch.complex64]
            if not alone:
                statistics = name == "norm_pool" and index in (3, 4)
                wrong += [torch.float16, torch.float32 if is_wide else torch.float64][: 1 if statistics else 2]
            yield from ((name, index, dtype) for dtype in wrong)


@pytest.mark.skipif(operators.library_error is not None, reason=f"the native library: {operators.library_error}")
@pytest.mark.parametrize(("name", "index", "fault"), list(wrong_calls()))
def test_a_native_operator_refuses_a_wrong_tensor_and_writes_nothing(name, index, fault):
    arguments = good_call(name)
    good = arguments[index]
    arguments[index] = with_wrong_size(good, *fault) if isinstance(fault, tuple) else good.to(fault)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    with torch.no_grad(), pytest.raises(RuntimeError, match="dia_kernels: "):
        getattr(operators.native, name)(*arguments)
    for after, value in zip(arguments, before, strict=True):
        assert torch.equal(after, value) if isinstance(value, torch.Tensor) else after == value


def what_steps_left(count: int = 3) -> list[list[torch.Tensor]]:
    """Factors, tables and h of some steps of 2 samples, 8 channels and bottlenecks of 3 values."""
    sizes = (2 * (4 * 8 + 2 * 3),), (2 * (5 * 8 + 2 * 3),), (2, 8)
    return [[torch.rand(size) for _ in range(count)] for size in sizes]


@pytest.mark.skipif(operators.library_error is not None, reason=f"the native library: {operators.library_error}")
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("fault", [-1, 1, torch.float64, torch.int32, "rank", "device"])
def test_what_one_of_several_steps_left_is_wrong(which, step, fault):
    left = what_steps_left()
    good = left[which][step]
    if isinstance(fault, int):
        # Behind a tail's tables are those of its norm: they may be longer.
        left[which][step] = torch.ones(good.shape[0] + (-40 if which == 1 else fault), *good.shape[1:])
    elif isinstance(fault, torch.dtype):
        left[which][step] = good.to(fault)
    else:
        left[which][step] = good[None] if fault == "rank" else good.to("meta")
    with pytest.raises(RuntimeError, match=r"dia_kernels: (factors|tables|h)"):
        operators.native.parameter_gradients(*left, 3)


@pytest.mark.skipif(operators.library_error is not None, reason=f"the native library: {operators.library_error}")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda factors, tables, h: (factors[:2], tables, h, 3), "tables: expected as many as factors, 2, got 3"),
        (lambda factors, tables, h: (factors, tables, h[:2], 3), "h: expected as many as factors, 3, got 2"),
        (lambda factors, tables, h: ([], tables, h, 3), "factors: expected those of at least one step"),
        (lambda factors, tables, h: (factors, tables, h, 0), "bottleneck: expected"),
        (lambda factors, tables, h: (factors, tables, h, 1 << 40), "bottleneck: expected"),
        (lambda factors, tables, h: (factors, tables, h, 4), "factors: wrong sizes"),
    ],
)
def test_wrong_lists_of_what_steps_left(change, message):
    with pytest.raises(RuntimeError, match=re.escape(f"dia_kernels: {message}")):
        operators.native.parameter_gradients(*change(*what_steps_left()))


@pytest.mark.skipif(operators.library_error is not None, reason=f"the native library: {operators.library_error}")
def test_a_step_without_a_state_has_no_factors():
    arguments = good_call("step_backward")
    arguments[5] = arguments[6] = None
    arguments[-1] = True
    with pytest.raises(RuntimeError, match="dia_kernels: as_factors: expected a step with a state"):
        operators.native.step_backward(*arguments)


@pytest.mark.skipif(operators.library_error is not None, reason=f"the native library: {operators.library_error}")
@pytest.mark.parametrize("other", [0, 1, 5, 7, 11, 14])
def test_buffers_that_share_memory_are_refused(other):
    arguments = good_call("tail_tracking_")
    memory = arguments[other].reshape(-1)
    arguments[6] = memory[:8]
    before = memory.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="running_mean, running_var, batches: share memory"):
        operators.native.tail_tracking_(*arguments)
    assert torch.equal(memory, before)


@pytest.mark.skipif(operators.library_error is not None, reason=f"the native library: {operators.library_error}")
@pytest.mark.parametrize("name", list(operator_calls()))
def test_a_native_operator_refuses_a_wrong_channel_dim(name):
    arguments = good_call(name)
    arguments[next(k for k, a in enumerate(arguments) if type(a) is int)] = 2
    with torch.no_grad(), pytest.raises(RuntimeError, match="dia_kernels: channel_dim"):
        getattr(operators.native, name)(*arguments)
