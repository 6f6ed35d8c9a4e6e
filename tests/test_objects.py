"""Modules as objects: copies, files, averages, other processes, meta device, compiled copies, parametrized weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from residual_networks import compute, plain
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dia_kernels import CELLS, SharedAttention, create_attention, share_attention
from dia_kernels.models import Options, ResNet

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 8
MODULES: dict[str, Callable[[], nn.Module]] = {
    **{cell: lambda cell=cell: create_attention(cell, CHANNELS, 2, blocks=2) for cell in CELLS},
    "stacked": lambda: SharedAttention(CHANNELS, 2, num_layers=2),
    "the reference": lambda: SharedAttention(CHANNELS, 2, backend="reference"),
    "network": lambda: ResNet(14, options=Options("dia")),
    "converted": lambda: share_attention(plain(), reduction=2),
    "converted, a cell with statistics": lambda: share_attention(plain(), "srm"),
}


@pytest.fixture(params=MODULES)
def make(request) -> Callable[[], nn.Module]:
    return MODULES[request.param]


def input_of(module: nn.Module) -> Tensor:
    """A batch of images for a network, of maps for an attention module; no channel's mean is near 0."""
    inner = module.module if isinstance(module, AveragedModel) else module
    channels = 3 if isinstance(inner, (ResNet, nn.Sequential)) else CHANNELS
    offsets = torch.linspace(-2, 2, channels).view(-1, 1, 1)
    return torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(1)) + offsets


def result(module: nn.Module, x: Tensor | None = None) -> Tensor:
    y = module(input_of(module) if x is None else x)
    return y[0] if isinstance(y, tuple) else y


def train(module: nn.Module) -> None:
    """One step that moves every parameter, and the buffers in training."""
    result(module).square().mean().backward()
    with torch.no_grad():
        for p in module.parameters():
            p.sub_(0.1 * p.grad)
            p.grad = None


def shares_its_unit(module: nn.Module) -> bool:
    """Of a converted network: whether the blocks of a stage hold one unit."""
    return module[1][0].attention is module[1][2].attention is not module[3][0].attention


# --- copies and files --------------------------------------------------------------------------------------------


def through_a_file(module: nn.Module) -> nn.Module:
    memory = io.BytesIO()
    torch.save(module, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_a_file}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_computes_the_same_and_is_its_own(make, way):
    module = make()
    train(module)
    other = COPIES[way](module)
    assert type(other) is type(module)
    assert list(other.state_dict()) == list(module.state_dict())
    expected = result(module.eval())
    assert torch.equal(result(other.eval()), expected)
    train(other)
    assert torch.equal(result(module), expected)
    assert not torch.equal(result(other), expected)
    if isinstance(module, nn.Sequential):
        assert shares_its_unit(other)


def test_a_state_dict_loads_as_weights_alone(make):
    module, other = make(), make()
    train(module)
    memory = io.BytesIO()
    torch.save(module.state_dict(), memory)
    memory.seek(0)
    other.load_state_dict(torch.load(memory, weights_only=True))
    assert torch.equal(result(other.eval()), result(module.eval()))


def test_safetensors(make, tmp_path):
    """Of a shared unit there is one copy, under one name."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    module = make()
    train(module)
    expected = result(module.eval())
    safetensors.save_file(module.state_dict(), tmp_path / "state.safetensors")
    other = make().eval()
    other.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(result(other), expected)
    safetensors.save_model(module, str(tmp_path / "model.safetensors"))
    other = make().eval()
    assert safetensors.load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(result(other), expected)
    kept = [t.untyped_storage().data_ptr() for t in module.state_dict().values()]
    assert len(kept) == len(set(kept))


def test_an_average_follows_parameters_and_buffers(make):
    module, decay = make(), 0.75
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        train(module)
        average.update_parameters(module)
        for name, tensor in module.state_dict().items():
            before = expected.get(name)
            if before is None or not tensor.is_floating_point():
                expected[name] = tensor.double()
            else:
                expected[name] = decay * before + (1 - decay) * tensor.double()
    found = average.module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7, msg=name)
    assert result(average.eval()).isfinite().all()
    assert not torch.equal(result(average), result(module.eval()))
    if isinstance(module, nn.Sequential):
        assert shares_its_unit(average.module)


@pytest.mark.parametrize("name", ["srm", "converted"])
def test_a_spawned_process_gets_the_module(name, tmp_path):
    module = MODULES[name]()
    x = input_of(module)
    torch.multiprocessing.spawn(compute, (module, x, str(tmp_path)), nprocs=1)
    result(module, x).square().sum().backward()
    found = torch.load(tmp_path / "0.pt")
    expected = [p.grad for p in module.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1:], expected, strict=True))


def test_memory_is_shared_and_moves(make):
    module = make()
    expected = result(copy.deepcopy(module).eval())
    module.share_memory()
    assert all(t.is_shared() for t in module.state_dict().values())
    assert torch.equal(result(module.eval()), expected)
    found = result(module.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # another order of sums in the convolutions


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_modules_of_another_dtype(make, dtype):
    module = make().eval()
    expected = result(copy.deepcopy(module).double(), input_of(module).double())
    module = module.to(dtype)
    y = result(module, input_of(module).to(dtype))
    assert y.dtype == dtype
    assert {t.dtype for t in module.state_dict().values() if t.is_floating_point()} == {dtype}
    size = expected.abs().max().item()
    # A few dozen roundings of weights and maps to the dtype, each of at most half an ulp.
    assert (y.double() - expected).abs().max() <= 32 * torch.finfo(dtype).eps * size


# --- without memory at first --------------------------------------------------------------------------------------


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        module = make()
    assert all(t.is_meta for t in module.state_dict().values())
    return module


def test_weights_are_assigned_to_a_module_of_the_meta_device(make):
    module, other = make(), on_meta(make)
    train(module)
    other.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    assert torch.equal(result(other.eval()), result(module.eval()))
    train(other.train())  # the shared unit learns as one
    train(module.train())
    assert torch.equal(result(other.eval()), result(module.eval()))


def test_empty_memory_is_filled_by_the_modules_themselves(make):
    """What a sharded start does: each module that holds a tensor resets its own."""
    torch.manual_seed(0)
    fresh = make()
    module = on_meta(make).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    for child in module.modules():
        if any(True for _ in child.parameters(recurse=False)) or any(True for _ in child.buffers(recurse=False)):
            child.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    for (name, buffer), expected in zip(module.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    for (name, p), like in zip(module.named_parameters(), fresh.named_parameters(), strict=True):
        if like[1].unique().numel() == 1:
            assert torch.equal(p, like[1]), name
        else:
            assert p.unique().numel() > 1, name
    assert result(module).isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_shapes_without_values(name):
    """A forward and a backward on the meta device, and on fake tensors."""
    module = on_meta(MODULES[name])
    expected = result(MODULES[name]())
    y = result(module, input_of(module).to("meta"))
    assert y.is_meta
    assert (y.shape, y.stride()) == (expected.shape, expected.stride())
    y.sum().backward()
    if name.startswith("converted"):
        return  # no module moves to another dtype or device among fake tensors, and a conversion moves its units
    with FakeTensorMode():
        module = MODULES[name]()
        assert result(module, torch.empty(input_of(module).shape)).stride() == expected.stride()


def test_initialisation_is_skipped():
    module = nn.utils.skip_init(SharedAttention, CHANNELS, 2)
    module.load_state_dict(SharedAttention(CHANNELS, 2).state_dict())
    assert result(module).isfinite().all()


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["lstm", "srm", "converted"])
def test_compiled_modules_and_their_copies(name, fresh_compiler):
    module = MODULES[name]().eval()
    keys = list(module.state_dict())
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    expected = result(compiled, input_of(module))
    assert list(compiled.state_dict()) == [f"_orig_mod.{key}" for key in keys]
    other = copy.deepcopy(compiled)
    assert torch.equal(result(other, input_of(module)), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.25)
    assert not torch.equal(result(other, input_of(module)), expected)
    assert torch.equal(result(compiled, input_of(module)), expected)
    fresh = MODULES[name]().eval()
    torch.compile(fresh, backend="eager").load_state_dict(compiled.state_dict())
    assert torch.equal(result(fresh), result(module))


def test_compiled_in_place_it_keeps_its_keys(fresh_compiler):
    module = MODULES["lstm"]()
    keys = list(module.state_dict())
    module.compile(backend="eager", fullgraph=True)
    expected = result(module)
    assert list(module.state_dict()) == keys
    assert torch.equal(result(pickle.loads(pickle.dumps(module))), expected)


# --- weights that are made of others --------------------------------------------------------------------------------


def spectral(module: nn.Module, name: str) -> None:
    parametrizations.spectral_norm(module, name)


def pruned(module: nn.Module, name: str) -> None:
    prune.l1_unstructured(module, name, 0.5)


@pytest.mark.parametrize(
    "change", [parametrizations.weight_norm, spectral, pruned], ids=["weight", "spectral", "prune"]
)
@pytest.mark.parametrize("name", ["input_reduce_weight", "hidden_expand_weight", "input_weight_l1"])
def test_parametrized_and_pruned_weights(name, change):
    """The values that the attribute has are those that count, and the gradient reaches what they are made of."""
    attention = SharedAttention(CHANNELS, 2, num_layers=2 if name.endswith("l1") else 1).double()
    like = copy.deepcopy(attention)
    change(attention, name)
    attention.eval()
    x, state = input_of(attention).double(), None
    if not name.endswith("l1"):
        state = tuple(torch.rand(2, len(x), CHANNELS, dtype=torch.float64))
    y, _ = attention(x, state)
    with torch.no_grad():
        getattr(like, name).copy_(getattr(attention, name))
    assert torch.equal(y, like(x, state)[0])
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
    made_of = [p for key, p in attention.named_parameters() if name in key]
    assert made_of
    assert all(p.grad.abs().max() > 0 for p in made_of)


def test_a_weight_that_nobody_made_is_missing_by_its_name():
    attention = SharedAttention(CHANNELS, 2)
    del attention.input_reduce_bias
    with pytest.raises(AttributeError, match="input_reduce_bias"):
        attention(torch.randn(2, CHANNELS, 4, 4))
