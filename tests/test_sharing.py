"""``share_attention``: its options, its errors, and what users do with a converted network."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import monai.networks.nets as monai
import pytest
import sharing_processes
import timm
import torch
import torchvision.models as vision
from hooked import assert_close, assert_same, hook, loss_of
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import dia_kernels
from dia_kernels import SharedAttention, sharing
from dia_kernels.sharing import Adapter, SharingError, share_attention
from dia_kernels.sharing.rewriting import Recipe, Source, class_of
from dia_kernels.sharing.tracing import traced_result
from dia_kernels.sharing.widths import Unknown, Width, width_of

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, channels: int = 6, stride: int = 1, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, 4, 3, stride, 1), nn.ReLU(), nn.Conv2d(4, channels, 1))
        self.norm = norm(channels)
        self.relu = nn.ReLU()
        self.down = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + self.down(x))


def small(*strides: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *(Block(stride=s) for s in strides or (1, 1, 2, 1)))


def names(model: nn.Module) -> list[list[str]]:
    return [[block.name for block in stage.blocks] for stage in sharing.report(model).stages]


# --- stages and options --------------------------------------------------------------------------------------------


def test_a_stage_begins_where_the_shortcut_has_a_stride():
    model = small(1, 1, 2, 1)
    assert share_attention(model, reduction=2) is model
    assert names(model) == [["1", "2"], ["3", "4"]]
    assert "1.attention.input_reduce_weight" in model.state_dict()
    assert not any(key.startswith(("2.attention", "4.attention")) for key in model.state_dict())
    assert model[1].attention is model[2].attention is not model[3].attention
    assert isinstance(model[1], Block)


def test_blocks_called_one_by_one_in_a_forward():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.last = Block()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            y = self.last(x)
            return x + y.mean()

    model = share_attention(Network(), reduction=2)
    # The last block's input goes elsewhere too, so the third block has to return a map.
    assert names(model) == [["blocks.0", "blocks.1", "blocks.2"], ["last"]]
    assert model(torch.randn(2, 6, 5, 5)).shape == (2, 6, 5, 5)


def test_blocks_that_nobody_can_follow_have_units_of_their_own():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                if x.sum() > 0:
                    x = block(x)
            return x

    model = share_attention(Network(), reduction=2)
    assert names(model) == [["blocks.0"], ["blocks.1"], ["blocks.2"]]
    assert model(torch.rand(2, 6, 5, 5)).shape == (2, 6, 5, 5)


def test_include_exclude_min_blocks():
    assert names(share_attention(small(), reduction=2, include="[12]")) == [["1", "2"]]
    assert names(share_attention(small(), reduction=2, exclude=["1", "3"])) == [["2"], ["4"]]
    model = share_attention(small(1, 1, 2), reduction=2, min_blocks=2)
    assert names(model) == [["1", "2"]]
    assert sharing.report(model).left == {"3": "its stage has 1 of at least 2 blocks"}
    assert names(share_attention(nn.Sequential(small(1), Block()), reduction=2, include=Block)) == [["0.1"], ["1"]]
    with pytest.raises(SharingError, match="excluded"):
        share_attention(small(), exclude=Block)


def test_a_network_that_is_one_block():
    torch.manual_seed(0)
    plain = Block().double()
    shared = share_attention(copy.deepcopy(plain), reduction=2)
    assert sharing.report(shared).stages[0].attention == "attention"
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_same(shared, hook(plain, shared, [["norm"]]), lambda model: model(x), training=True)


class Odd(nn.Module):
    """Additions of many kinds; ``how`` adds a branch of two convolutions to something."""

    def __init__(self, how: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
        self.two = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
        self.one, self.other = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda m, x: m.branch(x) + m.two(x), "the shortcut has 2 convolutions"),
        (lambda m, x: m.one(x) + m.other(x), "both operands pass 1 convolutions"),
        (lambda m, x: m.branch(x) + (x + torch.relu(x)), "there is an addition in the shortcut"),
        (lambda m, x: m.branch(m.pool(x)) + x, "pooled to one position"),
        (lambda m, x: (lambda y: (y + x) * y)(m.branch(x)), "is used elsewhere, too"),
        (lambda m, x: (lambda y: m.branch(y[0]) + y[1])(x.chunk(2, 1)), "come out of one tuple or dict"),
        (lambda m, x: torch.sigmoid(m.branch(x) + x) * x, "its sum is a gate"),
        (lambda m, x: m.branch(x).flatten(2) + x.flatten(2), "nothing tells how many channels are behind flatten"),
    ],
)
def test_additions_that_close_no_block(how, reason):
    model = nn.Sequential(Odd(how), Block())
    share_attention(model, reduction=2)
    assert names(model) == [["1"]]
    assert any(reason in why for why in sharing.report(model).rejected["0"])


class Activated(nn.Module):
    """Convolution behind an activation, which is returned, too."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.norm, self.conv, self.adds = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), adds

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.norm(x))
        return (self.conv(x) + x if self.adds else self.conv(x)), x


class PreActivated(nn.Module):
    """Whose shortcut comes out of its branch."""

    def __init__(self, adds: bool = False) -> None:
        super().__init__()
        self.begin = Activated(adds)
        self.end = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = self.begin(x)
        return self.end(y) + shortcut


def test_a_shortcut_out_of_the_branch():
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), PreActivated(), PreActivated()).double()
    shared = share_attention(copy.deepcopy(plain), reduction=2)
    assert names(shared) == [["1", "2"]]
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert_same(shared, hook(plain, shared, [["1.end", "2.end"]]), lambda model: model(x), training=True)


def test_a_child_that_returns_two_maps_stays_whole_with_a_hook():
    model = nn.Sequential(PreActivated(), Block())
    model[0].begin.register_forward_hook(lambda module, args, output: None)
    assert names(share_attention(model, reduction=2)) == [["1"]]


def test_a_child_that_returns_two_maps_of_a_pair_stays_whole():
    """What it is given is no one value of the graph."""
    model = nn.Sequential(OfPair(), Block())
    assert names(share_attention(model, reduction=2)) == [["1"]]


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, pair: tuple[Tensor, float]) -> tuple[Tensor, tuple[Tensor, float]]:
        return self.conv(pair[0]), pair


class OfPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.halves = Halves()

    def forward(self, x: Tensor) -> Tensor:
        y, pair = self.halves((x, 2.0))
        return y + pair[0]


class Fusion(nn.Module):
    """What is gated is the shortcut, too, and comes out of a child that is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.merge(x)
        return x + x * self.gate(x)


@pytest.mark.parametrize("existing", ["keep", "replace"])
def test_a_shortcut_that_is_gated(existing):
    plain = nn.Sequential(nn.Conv2d(3, 6, 1), Fusion()).double()
    shared = share_attention(copy.deepcopy(plain), reduction=2, existing=existing)
    assert names(shared) == [["1"]]
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    merged = plain[1].merge(plain[0](x))
    gated = merged * plain[1].gate(merged) if existing == "keep" else merged
    expected, _ = shared[1].attention(gated, shortcut=merged)
    assert_close(shared(x), expected, existing)


class Whole(PreActivated):
    """With no addition but that of the child which returns two maps."""

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.begin(x)[0])


def test_a_child_that_is_left_alone_is_not_converted_in_its_parent():
    model = nn.Sequential(Whole(adds=True), Block())
    assert names(share_attention(copy.deepcopy(model), reduction=2)) == [["0.begin"], ["1"]]
    assert names(share_attention(model, reduction=2, exclude="0.begin")) == [["1"]]


def test_a_block_that_keeps_something_in_itself():
    """A graph would not keep it: the block is left as it is, and nothing of the trace stays in it."""

    class Keeping(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.conv(x)
            return self.relu(self.norm(self.seen) + x)

    model = nn.Sequential(Keeping(), Block())
    share_attention(model, reduction=2)
    assert names(model) == [["1"]]
    assert sharing.report(model).untraceable == {"0": "it keeps seen in itself, which no graph does"}
    assert not hasattr(model[0], "seen")
    model(torch.randn(1, 6, 3, 3))
    assert isinstance(model[0].seen, Tensor)


def test_a_branch_that_holds_blocks_is_no_block():
    """The long skip over a stage."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(x) + x

    model = share_attention(Skipping(), reduction=2)
    assert names(model) == [["stage.0", "stage.1"]]
    assert sharing.report(model).rejected == {"": ["add: a branch holds residual blocks itself"]}


def test_per_block():
    model = share_attention(small(), "lstm", 2, per_block=True)
    assert names(model) == [["1"], ["2"], ["3"], ["4"]]
    assert len({id(model[k].attention) for k in (1, 2, 3, 4)}) == 4


def test_a_dry_run_changes_nothing():
    model = small()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    report = share_attention(model, reduction=2, dry_run=True)
    assert torch.equal(torch.rand(1), drawn)
    assert [type(m) for m in model.modules()] == classes
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert report.blocks == 4
    assert report.parameters == 2 * sum(p.numel() for p in SharedAttention(6, 2).parameters())
    assert "lstm: 4 blocks in 2 stages" in str(report)
    assert "1 to 2 (Block): fused norm, shortcut, relu" in str(report)
    share_attention(model, reduction=2)


def test_an_extra_norm_where_no_norm_ends_the_branch():
    model = timm.create_model("resnetv2_50", num_classes=3)
    share_attention(model, reduction=16, extra_norm="batch")
    block = model.stages[1].blocks[2]
    assert type(block.attention_norm) is nn.BatchNorm2d
    assert "stages.1.blocks.2.attention_norm.weight" in model.state_dict()
    places = [[f"stages.{s}.blocks.{i}.attention_norm" for i in range(n)] for s, n in enumerate((3, 4, 6, 3))]
    assert names(model) == [[place.rpartition(".")[0] for place in stage] for stage in places]
    assert model.train()(IMAGES).shape == (2, 3)
    assert block.attention_norm.num_batches_tracked == 1
    untouched = share_attention(vision.resnet18(), reduction=16, extra_norm="batch")
    assert not any("attention_norm" in key for key in untouched.state_dict())


def test_elementwise_dropout_before_the_addition_stays_outside():
    class Dropping(Block):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.dropout(self.norm(self.conv(x))) + x)

    torch.manual_seed(0)
    plain = nn.Sequential(Dropping(), Dropping()).double()
    shared = share_attention(copy.deepcopy(plain), reduction=2)
    assert "shortcut apart: Dropout between" in str(sharing.report(shared))
    hooked = hook(plain, shared, [["0.norm", "1.norm"]])
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_same(shared, hooked, lambda model: model(x), training=True)


class Moody(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + x
        return F.dropout(self.relu(y), 0.5, self.training)


def test_forwards_that_differ_between_training_and_evaluation():
    torch.manual_seed(0)
    plain = nn.Sequential(Moody(), Moody()).double()
    shared = share_attention(copy.deepcopy(plain), reduction=2)
    hooked = hook(plain, shared, [["0.norm", "1.norm"]])
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_same(shared, hooked, lambda model: model(x), training=False)
    assert_same(shared, hooked, lambda model: model(x), training=True)
    again = pickle.loads(pickle.dumps(shared.eval()))
    torch.testing.assert_close(again(x), shared(x))


def test_an_argument_with_a_default():
    class Conditional(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None, *rest: Any, gain: float = 1.0) -> Tensor:
            y = self.norm(self.conv(x))
            if mask is not None:
                y = y * mask
            return self.relu(y * gain + x)

    model = share_attention(nn.Sequential(Conditional(), Conditional()), reduction=2)
    x = torch.randn(2, 6, 5, 5)
    first = model[0](x, None, gain=1.0)
    assert type(first) is tuple
    with pytest.raises(TypeError, match="mask: this block was converted for calls without it"):
        model[0](x, torch.ones(1))
    with pytest.raises(TypeError, match="gain: this block was converted for calls without it"):
        model[0](x, gain=2.0)


@pytest.mark.parametrize("kind", ["frozen", "sync", "none"])
def test_other_norms(kind):
    def norm(channels: int) -> nn.Module:
        if kind == "frozen":
            made = FrozenBatchNorm2d(channels)
            made.running_mean.normal_()
            made.running_var.uniform_(0.5, 2)
            made.weight.uniform_(0.5, 2)
            return made
        return nn.SyncBatchNorm(channels) if kind == "sync" else nn.GroupNorm(2, channels)

    torch.manual_seed(0)
    plain = nn.Sequential(Block(norm=norm), Block(norm=norm)).double()
    shared = share_attention(copy.deepcopy(plain), reduction=2)
    assert ("fused norm" in str(sharing.report(shared))) == (kind != "none")
    hooked = hook(plain, shared, [["0.norm", "1.norm"]])
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_same(shared, hooked, lambda model: model(x), training=False)
    if kind != "sync":  # which wants a GPU in training
        assert_same(shared, hooked, lambda model: model(x), training=True)


def test_an_untraceable_block_with_an_adapter():
    adapters = {Branching: Adapter(adapted, channels=width)}
    torch.manual_seed(0)
    plain = nn.Sequential(Branching(), Branching(), Branching()).double()
    with pytest.raises(SharingError, match="0: cannot be traced"):
        share_attention(copy.deepcopy(plain))
    shared = share_attention(copy.deepcopy(plain), reduction=2, adapters=adapters)
    assert names(shared) == [["0", "1", "2"]]
    hooked = hook(plain, shared, [["0.norm", "1.norm", "2.norm"]])
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_same(shared, hooked, lambda model: model(x), training=True)
    again = pickle.loads(pickle.dumps(shared.eval()))
    torch.testing.assert_close(again(x), shared(x))


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.relu(self.norm(self.conv(x)) + x)


def width(block: nn.Module) -> int:
    return block.conv[2].out_channels


def adapted(block: Branching, attend: sharing.Attend, x: Tensor) -> Tensor:
    return attend(block.conv(x), shortcut=x, norm=block.norm, activation="relu")


def test_an_adapter_that_does_not_attend():
    adapters = {Branching: Adapter(lambda block, attend, x: x, channels=lambda block: 6)}
    model = share_attention(nn.Sequential(Branching()), reduction=2, adapters=adapters)
    with pytest.raises(RuntimeError, match="adapters: the forward given for Branching did not call attend"):
        model(torch.randn(1, 6, 3, 3))


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("cell", dia_kernels.CELLS)
def test_every_cell(cell, per_block):
    torch.manual_seed(0)
    plain = vision.resnet18(num_classes=3).double()
    shared = share_attention(copy.deepcopy(plain), cell, 16, per_block=per_block)
    blocks = [f"layer{s}.{i}.bn2" for s in (1, 2, 3, 4) for i in range(2)]
    places = [[name] for name in blocks] if per_block else [blocks[k : k + 2] for k in range(0, 8, 2)]
    hooked = hook(plain, shared, places)
    x = IMAGES.double()
    assert_same(shared, hooked, lambda m: m(x), training=True)
    assert_same(shared, hooked, lambda m: m(x), training=False)
    again = pickle.loads(pickle.dumps(shared))
    assert torch.equal(again(x), shared(x))


def test_a_cell_that_convolves_over_the_positions_of_volumes():
    torch.manual_seed(0)
    plain = monai.SegResNet(spatial_dims=3, init_filters=8, blocks_down=(1, 2), blocks_up=(1,)).double()
    shared = share_attention(copy.deepcopy(plain), "cbam")
    places = [["down_layers.0.1.conv2"], [f"down_layers.1.{i}.conv2" for i in (1, 2)], ["up_layers.0.0.conv2"]]
    x = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    assert_same(shared, hook(plain, shared, places), lambda m: m(x), training=True)


def test_a_users_own_cell():
    class Gate(dia_kernels.Cell):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(channels))

        def forward(self, pooled: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            state = pooled if state is None else state + pooled
            return torch.sigmoid(self.weight * state), state

    torch.manual_seed(0)
    plain = vision.resnet18(num_classes=3).double()
    shared = share_attention(copy.deepcopy(plain), Gate)
    assert str(sharing.report(shared)).startswith("Gate: 8 blocks in 4 stages")
    hooked = hook(plain, shared, [[f"layer{s}.{i}.bn2" for i in range(2)] for s in (1, 2, 3, 4)])
    assert_same(shared, hooked, lambda m: m(IMAGES.double()), training=True)


# --- attention that is there already -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seresnet50", "ecaresnet50d"])
def test_existing_attention_replaced(name):
    """As the network without it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, layers=(1, 2, 1, 1)).double()
    plain = copy.deepcopy(model)
    for block in plain.modules():
        if getattr(block, "se", None) is not None:
            block.se = None
    shared = share_attention(model, reduction=16, existing="replace")
    assert "replaced" in str(sharing.report(shared))
    assert not any(".se." in key for key in shared.state_dict())
    places = [[f"layer{s}.{i}.bn3" for i in range(n)] for s, n in enumerate((1, 2, 1, 1), 1)]
    hooked = hook(plain, shared, places)
    x = IMAGES.double()
    assert_same(shared, hooked, lambda m: m(x), training=False)
    assert_same(shared, hooked, lambda m: m(x), training=True)


class Gated(Block):
    """With attention that is written out in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.relu(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))) + x)


def test_attention_that_is_written_out():
    """Kept, the gate comes first; replaced, it is not computed any more and has no parameters."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    plain = nn.Sequential(Gated(), Gated()).double()
    kept = share_attention(copy.deepcopy(plain), reduction=2)
    gates = [plain[k].gate for k in range(2)]
    y, state = x, None
    for k in range(2):
        z = plain[k].norm(plain[k].conv(y))
        z, state = kept[0].attention(z * torch.sigmoid(gates[k](z.mean((2, 3), keepdim=True))), state)
        y = torch.relu(z + y)
    assert_close(kept(x).detach(), y.detach(), "kept")

    replaced = share_attention(copy.deepcopy(plain), reduction=2, existing="replace")
    assert not any("gate" in name for name, _ in replaced.named_parameters())
    for block in plain:
        block.forward = lambda x, block=block: Block.forward(block, x)
    assert_same(
        replaced, hook(plain.requires_grad_(), replaced, [["0.norm", "1.norm"]]), lambda m: m(x), training=False
    )


def test_the_same_text_with_another_function():
    """Two forwards that read alike, but whose names mean different functions, are two classes."""
    text = "def forward(self, x):\n    return function(x)\n"
    sources = [Source(text, (("function", ("value", f)),)) for f in (torch.sin, torch.cos, torch.sin)]
    sine, cosine, again = (class_of(Recipe(Block, source, None)) for source in sources)
    assert sine is again is not cosine
    assert torch.equal(cosine()(torch.zeros(1)), torch.ones(1))


def test_existing_attention_is_an_error_if_asked():
    with pytest.raises(SharingError, match=r"layer4.0: has attention at its tail already|layer1.0: has attention"):
        share_attention(timm.create_model("seresnet18"), existing="error")
    share_attention(vision.resnet18(), existing="error")


# --- transformers --------------------------------------------------------------------------------------------------


def transformer() -> nn.Module:
    return vision.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )


def test_a_transformer_only_if_asked():
    with pytest.raises(SharingError, match=r"2 tails in one block, as in transformers: .* name the block in include"):
        share_attention(transformer())
    torch.manual_seed(0)
    plain = transformer().double()
    shared = share_attention(copy.deepcopy(plain), reduction=2, include="encoder.layers.*")
    assert names(shared) == [["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]]
    unit = shared.encoder.layers[0].attention
    assert unit.channel_dim == -1
    places = [[f"encoder.layers.encoder_layer_{i}.{part}" for i in range(2) for part in ("dropout", "mlp")]]
    hooked = hook(plain, shared, places)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same(shared, hooked, lambda m: m(x), training=False)
    assert_same(shared, hooked, lambda m: m(x), training=True)


# --- errors --------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got list"):
        share_attention([])
    for options, message in (
        ({"existing": "drop"}, "existing: expected one of"),
        ({"extra_norm": "layer"}, "extra_norm: expected one of"),
        ({"init": "zero"}, "init: expected one of"),
        ({"min_blocks": 0}, "min_blocks: expected at least 1"),
        ({"cell": "gru"}, "cell: expected"),
        ({"backend": "tpu"}, "backend: expected"),
        (
            {"reduction": 7},
            "reduction: expected at most channels = 6, got 7 .*; at 1, which .* exclude would leave",
        ),
    ):
        model = small()
        with pytest.raises(ValueError, match=message):
            share_attention(model, **options)
        assert not any(sharing.rewriting.is_converted(m) for m in model.modules())
    for options, message in (
        ({"reduction": 2.0}, "reduction: expected an int"),
        ({"min_blocks": "a"}, "min_blocks: expected an int"),
        ({"include": 3}, "include: expected patterns of names or classes, got 3"),
        ({"exclude": [small()]}, "exclude: expected patterns of names or classes"),
        ({"adapters": 3}, "adapters: expected a dict of an Adapter for each class, got 3"),
        ({"adapters": {Block: lambda block, attend, x: x}}, "adapters: expected a dict of an Adapter"),
    ):
        with pytest.raises(TypeError, match=message):
            share_attention(small(), **options)
    with pytest.raises(SharingError, match="found no residual blocks"):
        share_attention(vision.vgg11())
    model = share_attention(small(), reduction=2)
    with pytest.raises(SharingError, match=r"already converted: 1 and 3 other blocks"):
        share_attention(model)
    with pytest.raises(ValueError, match="expected a network that share_attention has converted"):
        sharing.report(small())
    with pytest.raises(SharingError, match="convert the network before DataParallel wraps it"):
        share_attention(nn.DataParallel(small()))


def test_a_name_that_is_taken():
    model = small()
    model[2].attention = nn.Identity()
    with pytest.raises(SharingError, match="2: has an attribute 'attention' already"):
        share_attention(model, reduction=2)
    assert type(model[1]) is Block


def test_a_sibling_that_cannot_be_traced():
    class Odd(Block):
        def __init__(self, odd: bool) -> None:
            super().__init__()
            self.odd = odd

        def forward(self, x: Tensor) -> Tensor:
            if self.odd and x.sum() > 0:
                return x
            return self.relu(self.norm(self.conv(x)) + x)

    with pytest.raises(SharingError, match=r"1: cannot be traced .* Odd can: .* exclude the class, or give an adapter"):
        share_attention(nn.Sequential(Odd(False), Odd(True)), reduction=2)


def test_a_middle_block_called_without_the_state():
    model = share_attention(small(), reduction=2)
    with pytest.raises(RuntimeError, match=r"stands in the middle of a stage .* takes the pair \(map, state\)"):
        model[2](torch.randn(2, 6, 5, 5))


def test_data_parallel_is_refused():
    model = share_attention(small(), reduction=2)
    with pytest.raises(RuntimeError, match=r"use nn.parallel.DistributedDataParallel"):
        model[1]._replicate_for_data_parallel()


# --- what users do with a converted network ------------------------------------------------------------------------


@pytest.fixture
def converted() -> nn.Module:
    return share_attention(vision.resnet18(num_classes=5), reduction=16).eval()


def test_copies_pickles_and_checkpoints(converted):
    expected = converted(IMAGES)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(other(IMAGES), expected)
        assert other.layer1[1].attention is other.layer1[0].attention
        assert other.layer1[0].attention is not converted.layer1[0].attention
        assert type(other.layer1[1]) is type(converted.layer1[1])
        assert names(other) == names(converted)
    memory = io.BytesIO()
    torch.save(converted, memory)
    memory.seek(0)
    assert torch.equal(torch.load(memory, weights_only=False)(IMAGES), expected)
    fresh = share_attention(vision.resnet18(num_classes=5), reduction=16).eval()
    assert not torch.equal(fresh(IMAGES), expected)
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(fresh(IMAGES), expected)
    assert {k for k in converted.state_dict() if "attention" in k} == {
        f"layer{s}.0.attention.{name}" for s in (1, 2, 3, 4) for name in SharedAttention(4).state_dict()
    }


@pytest.mark.slow
def test_compiled_as_one_graph(converted):
    with torch.no_grad():
        expected = converted(IMAGES)
        found = torch.compile(converted, fullgraph=True, backend="aot_eager")(IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    trained = copy.deepcopy(converted).train()
    eager = copy.deepcopy(trained)
    loss_of(torch.compile(trained, fullgraph=True, backend="aot_eager")(IMAGES)).backward()
    loss_of(eager(IMAGES)).backward()
    for (name, ours), theirs in zip(trained.named_parameters(), eager.parameters(), strict=True):
        size = theirs.grad.abs().max().item()
        assert (ours.grad - theirs.grad).abs().max() <= 1e-3 * size + 1e-6, name


def test_exported(converted):
    exported = torch.export.export(converted, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), converted(IMAGES), rtol=1e-4, atol=1e-4)


def test_feature_extraction(converted):
    extractor = create_feature_extractor(converted, {"layer1": "a", "layer2.1": "b", "layer3.0": "c"})
    features = extractor(IMAGES)
    x = converted.maxpool(converted.relu(converted.bn1(converted.conv1(IMAGES))))
    a = converted.layer1(x)
    b = converted.layer2(a)
    c, _ = converted.layer3[0](b)
    for name, expected in (("a", a), ("b", b), ("c", c)):
        torch.testing.assert_close(features[name], expected, msg=name)


def test_timms_features():
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", features_only=True).double().eval()
    shared = share_attention(copy.deepcopy(plain), reduction=16)
    hooked = hook(plain, shared, [[f"layer{s}.{i}.bn2" for i in range(2)] for s in (1, 2, 3, 4)])
    assert len(shared(IMAGES.double())) == 5
    assert_same(shared, hooked, lambda m: m(IMAGES.double()), training=False)


@pytest.mark.parametrize("sequential", [False, True])
def test_activation_checkpointing(sequential):
    torch.manual_seed(0)
    model = share_attention(small(1, 1, 1), reduction=2).double()
    again = copy.deepcopy(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model(x).square().mean().backward()
    value = again[0](x)
    for block in list(again)[1:]:
        if sequential:
            value = torch.utils.checkpoint.checkpoint_sequential([block], 1, value, use_reentrant=False)
        else:
            value = torch.utils.checkpoint.checkpoint(block, value, use_reentrant=False)
    value.square().mean().backward()
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, name)


@pytest.mark.parametrize("run", [sharing_processes.run, sharing_processes.run_sharded])
def test_data_parallel(run, tmp_path):
    """DDP and FSDP2 in two processes: the mean of their gradients, and no parameter that is waited for in vain."""
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    alone = [sharing_processes.gradients(sharing_processes.network(), rank) for rank in range(2)]
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"gradients{rank}.pt").items():
            assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, name)


def test_functional_call(converted):
    parameters = {name: p.detach().clone() for name, p in converted.named_parameters()}
    expected = converted(IMAGES)
    found = torch.func.functional_call(converted, parameters, (IMAGES,))
    torch.testing.assert_close(found, expected)
    assert all(isinstance(p, nn.Parameter) for p in converted.parameters())


def test_a_detector_trains():
    torch.manual_seed(0)
    model = vision.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    plain = copy.deepcopy(model).double()
    shared = share_attention(model.double(), reduction=16)
    places = [[f"backbone.body.layer{s}.{i}.bn3" for i in range(n)] for s, n in enumerate((3, 4, 6, 3), 1)]
    hooked = hook(plain, shared, places)
    image = torch.rand(3, 64, 64, dtype=torch.float64)
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 50.0]], dtype=torch.float64),
        "labels": torch.tensor([1, 2]),
    }
    assert_same(shared, hooked, lambda m: m([image]), training=False)
    assert_same(shared, hooked, lambda m: m([image], [target]), training=True)


# --- init="preserve" -----------------------------------------------------------------------------------------------


def pretrained(model: nn.Module) -> nn.Module:
    """With weights and running statistics as if it had learned something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


NETWORKS = {
    "resnet18": lambda: vision.resnet18(num_classes=7),
    "resnet50": lambda: vision.resnet50(num_classes=7),
    "mobilenet_v3_small": lambda: vision.mobilenet_v3_small(num_classes=7),
    "efficientnet_b0": lambda: vision.efficientnet_b0(num_classes=7),
    "convnext_tiny": lambda: vision.convnext_tiny(num_classes=7),
    "regnet_y_400mf": lambda: vision.regnet_y_400mf(num_classes=7),
    "resnetv2_50": lambda: timm.create_model("resnetv2_50", num_classes=7),
}


@pytest.mark.parametrize("cell", ["lstm", pytest.param("lstm_tanh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pretrained_networks_output_is_preserved(name, cell):
    model = pretrained(NETWORKS[name]())
    wide = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, true = model(x), wide(x.double())
        found = share_attention(model, cell, reduction=8, init="preserve")(x)
        found_wide = share_attention(wide, cell, reduction=8, init="preserve")(x.double())
    # What rounding makes of the plain network in float32 bounds what can be asked for.
    rounding, size = (expected.double() - true).abs().max().item(), true.abs().max().item()
    assert (found_wide - true).abs().max().item() <= 1e-10 * size
    assert (found.double() - true).abs().max().item() <= 4 * rounding + 1e-6 * size


@pytest.mark.parametrize("cell", [c for c in dia_kernels.CELLS if not c.startswith("lstm")])
def test_preserved_with_another_cell(cell):
    """Also in training, where a norm within the cell has the batch's statistics."""
    model = pretrained(NETWORKS["resnet18"]()).double()
    expected = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    shared = share_attention(model, cell, reduction=8, init="preserve")
    for training in (True, False):
        found, true = shared.train(training)(x), expected.train(training)(x)
        assert (found - true).abs().max().item() <= 1e-10 * true.abs().max().item()
    loss_of(shared.train()(x)).backward()
    assert any(p.grad.abs().max() > 0 for p in shared.layer2[0].attention.parameters())


def test_a_preserved_network_learns():
    """The weights at zero have gradients."""
    model = share_attention(pretrained(vision.resnet18(num_classes=7)), reduction=16, init="preserve").train()
    loss_of(model(torch.randn(4, 3, 64, 64))).backward()
    for name, parameter in model.layer2[0].attention.named_parameters():
        if "expand" in name:
            assert parameter.grad.abs().max() > 0, name


def test_what_cannot_be_preserved():
    kept = timm.create_model("seresnet18")
    with pytest.raises(SharingError, match=r"'preserve' divides .* that of layer1.0 ends in se \(SEModule\)"):
        share_attention(kept, reduction=16, init="preserve")
    assert not any(sharing.rewriting.is_converted(m) for m in kept.modules())
    with pytest.raises(SharingError, match=r"'preserve' needs a cell that can begin as a constant: Constant cannot"):
        share_attention(small(), lambda channels: Constant(), init="preserve")
    before_activation = timm.create_model("resnetv2_50", layers=(1, 1, 1, 1))
    with pytest.raises(SharingError, match=r"'preserve' cannot keep what the extra norm of stages.0.blocks.0 changes"):
        share_attention(before_activation, reduction=16, init="preserve", extra_norm="batch")
    assert not any(sharing.rewriting.is_converted(m) for m in before_activation.modules())
    bare = small()
    bare[1].norm = nn.BatchNorm2d(6, affine=False)
    weights = copy.deepcopy(bare.state_dict())
    with pytest.raises(SharingError, match=r"'preserve' divides"):
        share_attention(bare, reduction=2, init="preserve")
    assert all(torch.equal(value, weights[key]) for key, value in bare.state_dict().items())


class Ending(nn.Module):
    """A block whose branch ends in ``last``."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(6, 6, 3, padding=1), last

    def forward(self, x):
        return x + self.last(self.conv(x))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1)


class WrittenOut(Ending):
    """A layer scale of tokens, which become a map again."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6))
        self.gamma = nn.Parameter(torch.rand(1, 6) + 0.5)

    def forward(self, x):
        return x + (self.gamma[:, None, None] * self.last(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Permuted(Ending):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6))

    def forward(self, x):
        return x + torch.permute(self.last(self.conv(x).permute(0, 2, 3, 1)), (0, 3, 1, 2))


class Standardised(nn.Conv2d):
    """Whose result does not change when its weight is divided."""

    def standard(self):
        mean, deviation = (f(self.weight, dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        return (self.weight - mean) / deviation

    def forward(self, x):
        return self._conv_forward(x, self.standard(), self.bias)


class Gained(Standardised):
    def __init__(self) -> None:
        super().__init__(6, 6, 1)
        self.gain = nn.Parameter(torch.rand(6, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.gain * self.standard()) + self.bias.view(1, -1, 1, 1)


class Times(Ending):
    """A branch that is multiplied by ``factor``."""

    def __init__(self, factor: float | nn.Parameter) -> None:
        super().__init__(nn.Conv2d(6, 6, 1))
        self.factor = factor

    def forward(self, x):
        return x + self.factor * self.last(self.conv(x))


class ActivatedNorm(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x).sigmoid()


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, y: pytest.fail("the hook sees what is tried"))
    return layer


DIVISIBLE = {
    "convolution": lambda: Ending(nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2)),
    "group norm": lambda: Ending(nn.GroupNorm(3, 6)),
    "instance norm": lambda: Ending(nn.InstanceNorm2d(6, affine=True)),
    "layer scale": lambda: Ending(LayerScale()),
    "layer scale written out": WrittenOut,
    "linear, permuted": Permuted,
    "the gain of standardised weights": lambda: Ending(Gained()),
    "a number": lambda: Times(-0.5),
    "a parameter of one value": lambda: Times(nn.Parameter(torch.ones(1, 1))),
    "a parameter of the positions": lambda: Times(nn.Parameter(torch.ones(1, 1, 7, 5))),
    "ReLU, pooling and a drop": lambda: Ending(
        nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), nn.MaxPool2d(3, 1, 1), nn.Dropout(0.0))
    ),
}
INDIVISIBLE = {
    "standardised weights": lambda: Ending(Standardised(6, 6, 1)),
    "parametrised weights": lambda: Ending(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1))),
    "weights that a hook makes": lambda: Ending(nn.utils.spectral_norm(nn.Conv2d(6, 6, 1))),
    "an activation within": lambda: Ending(ActivatedNorm(3, 6)),
    "a hook": lambda: Ending(hooked(nn.Conv2d(6, 6, 1))),
    "no weights": lambda: Ending(nn.InstanceNorm2d(6)),
    "an activation": lambda: Ending(nn.Sequential(nn.Conv2d(6, 6, 1), nn.SiLU())),
    "a drop to other than zero": lambda: Ending(
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.AlphaDropout(), nn.ReLU())
    ),
    "a transposed convolution": lambda: Ending(nn.ConvTranspose2d(6, 6, 3, padding=1)),
}


@pytest.mark.parametrize("kind", DIVISIBLE)
def test_what_a_branch_may_end_in_to_be_preserved(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), DIVISIBLE[kind](), DIVISIBLE[kind]()).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    expected = model(x)
    found = share_attention(model, reduction=2, init="preserve")(x)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("kind", INDIVISIBLE)
def test_what_it_may_not_end_in(kind):
    """Where dividing the weights would change nothing, or something else, without a word."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), INDIVISIBLE[kind](), INDIVISIBLE[kind]())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SharingError, match=r"'preserve' divides .* that of 1 ends in last(.[12])? \(.* exclude leaves"):
        share_attention(model, reduction=2, init="preserve")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_that_share_their_last_layer_are_not_preserved():
    last = nn.Conv2d(6, 6, 1)
    model = nn.Sequential(Ending(last), Ending(last))
    before = last.weight.clone()
    with pytest.raises(SharingError, match=r"one layer by the scales of several blocks"):
        share_attention(model, reduction=2, init="preserve")
    assert torch.equal(last.weight, before)


class Constant(nn.Module):
    def forward(self, x, state=None, *, shortcut=None, activation=None, inplace=False, norm=None, sample_scale=None):
        return x, None


def test_a_constant_too_small_to_divide_by(monkeypatch):
    monkeypatch.setattr(sharing.preserve, "_LEAST", 0.9)
    model = small()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(SharingError, match=r"would divide by less than 0.9: .* take another seed"):
        share_attention(model, reduction=2, init="preserve")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(sharing.rewriting.is_converted(m) for m in model.modules())


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda m, x: torch.cat([m.one(x), m.two(x)], 1), (12, 1)),
        (lambda m, x: m.one(x).permute(0, 2, 3, 1), (6, -1)),
        (lambda m, x: m.one(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2), (6, 1)),
        (lambda m, x: torch.relu(m.branch(x)) * torch.sigmoid(m.one(x)), (6, 1)),
        (lambda m, x: F.conv2d(x, m.one.weight), (6, 1)),
    ],
)
def test_widths(how, expected):
    model = Odd(how)
    _, result = traced_result(model)
    assert width_of(model, result) == Width(*expected)


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: x * 2,
        lambda m, x: torch.cat([m.one(x), m.two(x)], 2),
        lambda m, x: m.one(x).permute(2, 1, 0, 3).permute(1, 3, 0, 2),
        lambda m, x: m.one(x)[:, :3],
    ],
)
def test_unknown_widths(how):
    model = Odd(how)
    _, result = traced_result(model)
    with pytest.raises(Unknown):
        width_of(model, result)


def test_the_packages_own_name():
    assert dia_kernels.share_attention is share_attention
