"""Results written over their map: asked for, allowed, and not where somebody could still read the map."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

import dia_kernels as dk
from dia_kernels import create_attention, models, operators, overwriting, share_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    monkeypatch.setattr(overwriting, "LEAST_BYTES", 0)


needs_kernels = pytest.mark.skipif(operators.library_error is not None, reason=f"{operators.library_error}")
LAST = torch.channels_last
ATTENTIONS = (dk.SharedAttention, dk.CellAttention)
CELLS = ("lstm", "stacked", "dsu", "srm")


def make(cell: str, channels: int = 12, **options) -> nn.Module:
    stacked = {"num_layers": 2} if cell == "stacked" else {}
    return create_attention("lstm" if cell == "stacked" else cell, channels, 4, **stacked, **options).eval()


def norm_of(kind: str, channels: int = 12) -> nn.Module | None:
    if kind == "none":
        return None
    norm = nn.BatchNorm2d(channels).train(kind == "batch")
    nn.init.uniform_(norm.weight), nn.init.uniform_(norm.running_mean)
    if kind == "called":
        norm.register_forward_hook(lambda *_: None)
    return norm


def maps(layout: torch.memory_format = torch.contiguous_format, **options) -> list[Tensor]:
    return [torch.randn(3, 12, 5, 7, **options).contiguous(memory_format=layout) for _ in range(2)]


def overlapping(x: Tensor, _: Tensor) -> Tensor:
    """Two storages of the same memory."""
    return torch.from_numpy(x.numpy().reshape(-1)[:]).view(3, 12, 5, 7)


def called(attention, x, norm, **options) -> list[Tensor]:
    """Everything that a call leaves."""
    y, state = attention(x, norm=norm, activation="relu", **options)
    buffers = [] if norm is None else list(norm.buffers())
    return [y, *(state if isinstance(state, tuple) else []), *buffers]


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["none", "batch", "running", "called"])
@pytest.mark.parametrize("cell", CELLS)
def test_asked_for_it_is_done(cell, kind, scaled, layout, backend):
    attention, norm = make(cell, backend=backend), norm_of(kind)
    x, s = maps(layout)
    options = {"sample_scale": torch.rand(3) if scaled else None, "shortcut": s}
    with torch.no_grad():
        expected = called(attention, x, copy.deepcopy(norm), **options)
        own, version = x.clone(memory_format=torch.preserve_format), x._version
        found = called(attention, own, norm, inplace=True, **options)
    assert found[0] is own
    assert own._version > version
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["none", "batch", "running"])
@pytest.mark.parametrize("cell", CELLS)
def test_allowed_it_is_done_in_inference(cell, kind, mode, layout):
    attention, norm = make(cell), norm_of(kind)
    with mode():
        x, s = maps(layout)
        expected = called(attention, x.clone(memory_format=torch.preserve_format), copy.deepcopy(norm), shortcut=s)
        found = called(attention, x, norm, shortcut=s, inplace="auto")
    assert found[0] is x
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


#: Why y may not stand where x did, or why that would gain nothing.
REASONS = {
    "a gradient": {"x": lambda x: x.requires_grad_()},
    "a shortcut that is the map": {"shortcut": lambda x, s: x},
    "a shortcut of the same memory": {"shortcut": lambda x, s: x.view(-1).view(3, 12, 5, 7)},
    "a shortcut of a second storage": {"shortcut": overlapping},
    "a shortcut of another dtype": {"shortcut": lambda x, s: s.bfloat16()},
    "an expanded map": {"x": lambda x: x[:1].expand(3, 12, 5, 7)},
    "other strides": {"x": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)},
    "the reference": {"options": {"backend": "reference"}},
    "a norm that is called": {"kind": "called"},
    "a mode that sees all functions": {"around": lambda: torch.device("cpu")},
    "a small map": {"least": 1 << 20},
    "a view of larger rows": {"x": lambda x: nn.functional.pad(x, (0, 1))[..., :-1]},
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("cell", CELLS)
def test_allowed_it_is_not_done_where(cell, reason, monkeypatch):
    why = REASONS[reason]
    monkeypatch.setattr(overwriting, "LEAST_BYTES", why.get("least", 0))
    attention, norm = make(cell, **why.get("options", {})), norm_of(why.get("kind", "running"))
    x, s = maps()
    x = why.get("x", lambda x: x)(x)
    s = why.get("shortcut", lambda x, s: s)(x, s)
    before = x.clone()
    with torch.set_grad_enabled(reason == "a gradient"), why.get("around", nullcontext)():
        found = called(attention, x, copy.deepcopy(norm), shortcut=s, inplace="auto")
        expected = called(attention, x, norm, shortcut=s)
    assert torch.equal(x, before)
    assert found[0].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    for a, b in zip(found, expected, strict=True):  # the BLAS rounds by how its memory is aligned
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", ["lstm", "dsu"])
def test_a_state_or_a_scale_that_wants_a_gradient(cell):
    attention = make(cell).requires_grad_(False)
    x, s = maps()
    before = x.clone()
    state = torch.rand(3, 12, requires_grad=True), torch.rand(3, 12)
    scale = torch.rand(3, requires_grad=True)
    for options in ({"state": state}, {"sample_scale": scale}):
        y, _ = attention(x, shortcut=s, inplace="auto", **options)
        assert y.requires_grad
        assert torch.equal(x, before)
        norm = nn.BatchNorm2d(12).requires_grad_(False)
        for norm_or_none in (None, norm):
            with pytest.raises(ValueError, match=r"^inplace: expected False where a gradient"):
                attention(x, shortcut=s, inplace=True, norm=norm_or_none, **options)
        assert torch.equal(x, before)
        assert norm.num_batches_tracked == 0, "refused before anything is done"


@pytest.mark.parametrize("cell", ["lstm", "dsu"])
def test_a_norm_whose_gradient_goes_elsewhere(cell):
    """Its weight is another function's result, or a buffer that wants a gradient."""
    attention = make(cell).requires_grad_(False)
    x, before = (t := maps()[0]), t.clone()
    by_weight, by_bias = (norm_of("running").requires_grad_(False) for _ in range(2))
    by_buffer = FrozenBatchNorm2d(12)
    del by_weight.weight, by_bias.bias
    by_weight.weight, by_bias.bias = torch.rand(2, 12, requires_grad=True)
    by_buffer.weight.requires_grad_()
    for norm in (by_weight, by_bias, by_buffer):
        assert attention(x, norm=norm, inplace="auto")[0].requires_grad
        with pytest.raises(ValueError, match=r"^inplace: expected False where a gradient"):
            attention(x, norm=norm, inplace=True)
        assert torch.equal(x, before)


@pytest.mark.parametrize("true", [1, np.True_])
def test_what_is_true_is_true(true):
    x = maps()[0].transpose(2, 3)
    with torch.no_grad():
        assert make("lstm")(x, inplace=true)[0] is x
    with pytest.raises(ValueError, match=r"^inplace: expected False where a gradient"):
        make("lstm")(x, inplace=true)


def test_transforms_leave_the_map():
    attention = make("lstm").requires_grad_(False)
    x, t = maps(dtype=torch.float64)
    attention.double()
    before = x.clone()

    def call(x):
        return attention(x, inplace="auto", norm=(torch.ones(12).double(), torch.zeros(12).double()))[0]

    with torch.no_grad():
        torch.func.jvp(call, (x,), (t,))
        torch.func.vmap(call)(x[None])
    assert torch.equal(x, before)


def test_another_users_saved_map_is_noticed():
    """Autograd finds that a map has been written over which it has saved before."""
    attention, x = make("lstm"), torch.randn(2, 12, 3, 3, requires_grad=True)
    z = x * 2
    loss = (z * z).sum()
    with torch.no_grad():
        attention(z, norm=norm_of("running"), inplace="auto")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled():
    attention, norm = make("lstm"), norm_of("running")
    x, s = maps()

    def call(x):
        return attention(x, norm=norm, shortcut=s, activation="relu", inplace=True)[0]

    with torch.no_grad():
        expected = call(x.clone())
        found = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(found, expected)
    assert torch.equal(x, expected)


# --- networks -------------------------------------------------------------------------------------


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {name: models.create(name, num_classes=3, attention="dia") for name in ("resnet14", "resnet20bn", "wrn16_1")}
    made["without norms"] = models.create("resnet14", num_classes=3, attention="dia", norm=False)
    made["preresnet20"] = models.create("preresnet20", num_classes=3, attention="dsu")
    made["converted"] = share_attention(resnet18(num_classes=3), cell="lstm")
    return {name: network.eval() for name, network in made.items()}


IMAGES = (2, 3, 32, 32)


@needs_kernels
@pytest.mark.parametrize("name", networks())
def test_a_network_writes_over_what_its_convolutions_made(name, monkeypatch):
    network = networks()[name]
    blocks = sum(1 for module in network.modules() if hasattr(module, "attention") and hasattr(module, "conv2"))
    images, targets, target = torch.randn(IMAGES), [], overwriting.target
    with torch.no_grad():
        monkeypatch.setattr(overwriting, "target", lambda *args: targets.append(target(*args)) or targets[-1])
        found = network(images)
        assert [over is not None and over.directly for over in targets] == [True] * blocks
        assert blocks > 3
        monkeypatch.setattr(overwriting, "target", lambda *_: None)
        assert torch.equal(network(images), found)


def keeping(network: nn.Module, way: str) -> list[tuple[Tensor, Tensor]]:
    """What somebody has kept of an inference, and its values then."""
    kept, convolutions = [], [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    attentions = [m for m in network.modules() if isinstance(m, ATTENTIONS)]

    def keep(t):
        kept.append((t, t.clone()))

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.conv2d:
                keep(result)
            return result

    def keep_convolved(module, _, result):
        if module in convolutions:
            keep(result)

    around, hooks = nullcontext(), []
    if way == "behind each":
        hooks = [m.register_forward_hook(keep_convolved) for m in network.modules()]
    elif way == "behind all":
        hooks = [torch.nn.modules.module.register_module_forward_hook(keep_convolved)]
    elif way == "once":

        def once(module, _, result):
            keep(result)
            handles.pop(module).remove()

        handles = {module: module.register_forward_hook(once) for module in convolutions}
    elif way == "before attention":
        hooks = [m.register_forward_pre_hook(lambda _, args: keep(args[0])) for m in attentions]
    elif way == "behind attention":
        hooks = [m.register_forward_hook(lambda _, args, result: keep(args[0])) for m in attentions]
    elif way == "before all":
        every = torch.nn.modules.module.register_module_forward_pre_hook
        # (torchvision's ReLUs write over their maps by themselves.)
        hooks = [every(lambda m, args: keep(args[0]) if type(m) in (nn.BatchNorm2d, *ATTENTIONS) else None)]
    elif way == "a mode":
        around = Mode()
    elif way == "patched":
        for module in convolutions:

            def forward(x, own=module.forward):
                keep(result := own(x))
                return result

            module.forward = forward
    with torch.no_grad(), around:
        network(torch.randn(IMAGES))
    for hook in hooks:
        hook.remove()
    return kept


WAYS = ("behind each", "behind all", "once", "before attention", "behind attention", "before all", "a mode", "patched")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", networks())
def test_whoever_keeps_a_map_keeps_its_values(name, way):
    kept = keeping(networks()[name], way)
    assert len(kept) > 2
    for result, then in kept:
        assert torch.equal(result, then)


@pytest.mark.parametrize("attention", ["dia", "dsu"])
def test_a_hook_on_a_norm_that_is_none(attention):
    network, kept = models.create("resnet14", attention=attention, norm=False).eval(), []
    for name, module in network.named_modules():
        if name.endswith("bn2"):
            module.register_forward_hook(lambda _, __, result: kept.append((result, result.clone())))
    with torch.no_grad():
        network(torch.randn(IMAGES))
    assert len(kept) == 6, "each block calls it"
    assert all(torch.equal(result, then) for result, then in kept)


class ReadsItAgain(nn.Module):
    """A block that reads its convolution's result behind the tail."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.drop, self.path = nn.Dropout(0.1), StochasticDepth(0.1, "row")

    def forward(self, x):
        z = self.conv2(x)
        y = torch.relu(self.path(self.drop(self.bn2(z))) + x)
        return y * torch.sigmoid(z.mean((2, 3), keepdim=True))


def test_a_block_that_reads_its_convolution_again():
    network = share_attention(nn.Sequential(ReadsItAgain(), ReadsItAgain())).eval()
    x, _ = maps()
    expected = network(x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)


class Wrapped(nn.Module):
    """An attention of a user's own around the library's, without an argument ``inplace``."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x, state=None, *, shortcut=None, activation=None, norm=None):
        return self.attention(x, state, shortcut=shortcut, activation=activation, norm=norm)


def test_attention_of_ones_own_is_not_asked():
    network = models.create("resnet14", attention="dia").eval()
    images = torch.randn(IMAGES)
    with torch.no_grad():
        expected = network(images)
        for module in list(network.modules()):
            if isinstance(getattr(module, "attention", None), dk.SharedAttention):
                module.attention = Wrapped(module.attention)
        assert torch.equal(network(images), expected)


def test_a_traced_network_keeps_every_value():
    network = networks()["converted"]
    extractor = create_feature_extractor(network, ["layer1.0.conv2", "layer4.1.conv2", "fc"])
    images = torch.randn(IMAGES)
    with torch.no_grad():
        found = extractor(images)
        expected = {}
        for name in ("layer1.0.conv2", "layer4.1.conv2"):
            network.get_submodule(name).register_forward_hook(
                lambda _, __, result, name=name: expected.__setitem__(name, result)
            )
        expected["fc"] = network(images)
    for name, value in found.items():  # in the traced network norms are called by themselves
        torch.testing.assert_close(value, expected[name])


@needs_kernels
def test_a_network_whose_gradient_is_recorded_keeps_its_maps():
    network = networks()["resnet14"].double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: network(x), (images,), nondet_tol=0, fast_mode=True)
