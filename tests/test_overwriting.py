"""Results written over their map: asked for, allowed, and not where somebody could still read the map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from dia_kernels import create_attention, models, operators, overwriting, share_attention

pytestmark = pytest.mark.usefixtures("one_thread")

needs_kernels = pytest.mark.skipif(operators.library_error is not None, reason=f"{operators.library_error}")
LAST = torch.channels_last
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
    "a shortcut of another dtype": {"shortcut": lambda x, s: s.bfloat16()},
    "an expanded map": {"x": lambda x: x[:1].expand(3, 12, 5, 7)},
    "other strides": {"x": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)},
    "the reference": {"options": {"backend": "reference"}},
    "a norm that is called": {"kind": "called"},
    "a view of larger rows": {"x": lambda x: nn.functional.pad(x, (0, 1))[..., :-1]},
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("cell", CELLS)
def test_allowed_it_is_not_done_where(cell, reason):
    why = REASONS[reason]
    attention, norm = make(cell, **why.get("options", {})), norm_of(why.get("kind", "running"))
    x, s = maps()
    x = why.get("x", lambda x: x)(x)
    s = why.get("shortcut", lambda x, s: s)(x, s)
    before = x.clone()
    with torch.set_grad_enabled(reason == "a gradient"):
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
        with pytest.raises(ValueError, match=r"^inplace: expected False where a gradient"):
            attention(x, shortcut=s, inplace=True, **options)
        assert torch.equal(x, before)


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
    made["preresnet20"] = models.create("preresnet20", num_classes=3, attention="dsu")
    made["converted"] = share_attention(resnet18(num_classes=3), cell="lstm")
    return {name: network.eval() for name, network in made.items()}


IMAGES = (2, 3, 32, 32)


@needs_kernels
@pytest.mark.parametrize("name", networks())
def test_a_network_writes_over_what_its_convolutions_made(name, monkeypatch):
    network = networks()[name]
    blocks = sum(1 for module in network.modules() if hasattr(module, "attention") and hasattr(module, "conv2"))
    images, written = torch.randn(IMAGES), []
    with torch.no_grad():
        monkeypatch.setattr(overwriting, "_written", lambda x: written.append(x) or x)
        found = network(images)
        assert len(written) == blocks > 3
        monkeypatch.setattr(overwriting, "over", lambda *_: None)
        assert torch.equal(network(images), found)
    assert len(written) == blocks


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("name", networks())
def test_a_hook_keeps_what_it_was_given(name, everywhere):
    """A convolution's result that a hook has taken is not written over."""
    network, kept = networks()[name], []

    def keep(module, inputs, result):
        if isinstance(module, nn.Conv2d):
            kept.append((result, result.clone()))

    hooks = (
        [torch.nn.modules.module.register_module_forward_hook(keep)]
        if everywhere
        else [module.register_forward_hook(keep) for module in network.modules()]
    )
    try:
        with torch.no_grad():
            network(torch.randn(IMAGES))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(kept) > 10
    for result, then in kept:
        assert torch.equal(result, then)


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


def test_a_symbolically_traced_cell_keeps_every_value():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv2, self.attention = nn.Conv2d(12, 12, 1), make("dsu")

        def forward(self, x):
            z = self.conv2(x)
            allowed = "auto" if overwriting.is_fresh(z, self.conv2) else False
            return self.attention(z, shortcut=x, inplace=allowed)[0], z

    block = Block().eval()
    x, _ = maps()
    with torch.no_grad():
        _, z = symbolic_trace(block)(x)
        assert torch.equal(z, block.conv2(x))


@needs_kernels
def test_a_network_whose_gradient_is_recorded_keeps_its_maps():
    network = networks()["resnet14"].double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: network(x), (images,), nondet_tol=0, fast_mode=True)
