"""The networks of ``dia_kernels.models``: counts, formulas, and pytorchcv's networks with copied weights.

Tolerance: 4 sqrt(n L) ulp of the tensor's largest value in float64, n the terms of the longest sum and L the
layers, whose rounding errors add up.
"""

import copy
import math
import re

import pytest
import torch
import torchvision
from pytorchcv.model_provider import get_model
from torch import nn
from torch.nn import functional as F

from dia_kernels import CELLS, CellAttention, SharedAttention, __main__, backends, create_attention, models, params
from dia_kernels.models.parts import Options
from dia_kernels.models.preresnet import PreActivationBottleneck
from dia_kernels.models.resnet import Bottleneck
from dia_kernels.models.wide_resnet import WideBlock

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SIDE = 4, 32
# The longest sum is over the samples and positions of the first stage: its batch norms, its gradients.
TERMS = BATCH * SIDE * SIDE
BACKENDS = [None, *(name for name in backends.names() if backends.missing(name) is None)]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def attention_parameters(channels, reduction):
    bottleneck = channels // reduction
    return 10 * channels * bottleneck + 2 * bottleneck + 8 * channels


def plain_parameters(depth, num_classes, in_channels):
    """Convolutions without bias, batch norms with two parameters a channel, one linear layer."""
    total = 9 * in_channels * 16 + 2 * 16
    width = 16
    for stage_width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            total += 9 * width * stage_width + 9 * stage_width * stage_width + 2 * 2 * stage_width
            total += 0 if width == stage_width else width * stage_width + 2 * stage_width
            width = stage_width
    return total + width * num_classes + num_classes


def split_by_unit(named):
    """Tensors of a state dict in two lists: the network's, the attention's."""
    backbone, attention = [], []
    for name, tensor in named:
        (attention if "attention" in name or ".se." in name else backbone).append(tensor)
    return backbone, attention


def tensors(model):
    """Parameters and buffers in order, each once: pytorchcv registers its attention in every block."""
    return split_by_unit([*model.named_parameters(), *model.named_buffers()])


@torch.no_grad()
def copy_weights(source, target):
    for sources, targets in zip(tensors(source), tensors(target), strict=True):
        for value, into in zip(sources, targets, strict=True):
            into.copy_(value.reshape(into.shape))  # their SE uses 1x1 convolutions


def logits_and_gradients(model, images, training):
    """Logits; then the gradients of the images, of the network's parameters, and of the attention's."""
    model.train(training)
    images = images.clone().requires_grad_()
    logits = model(images)
    logits.square().sum().backward()
    backbone, attention = split_by_unit((name, p.grad) for name, p in model.named_parameters())
    return [logits.detach(), images.grad, *backbone, *attention]


@pytest.mark.parametrize("reduction", [4, 3, 16])
@pytest.mark.parametrize(("num_classes", "in_channels"), [(10, 3), (100, 1)])
def test_parameters_by_hand(num_classes, in_channels, reduction):
    plain = plain_parameters(20, num_classes, in_channels)
    shared = sum(attention_parameters(channels, reduction) for channels in (16, 32, 64))
    options = {"num_classes": num_classes, "in_channels": in_channels, "reduction": reduction}
    assert count(models.create("resnet20", **options)) == plain
    assert count(models.create("resnet20", attention="dia", **options)) == plain + shared


@pytest.mark.parametrize("attention", [None, "se", "dia"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet20", "resnet20_cifar100"),
        ("resnet56", "resnet56_cifar100"),
        ("resnet110", "resnet110_cifar100"),
        ("resnet164", "resnet164bn_cifar100"),
        ("preresnet164", "preresnet164bn_cifar100"),
    ],
)
def test_parameters_of_pytorchcv(name, theirs, attention):
    with torch.device("meta"):
        ours = models.create(name, 100, attention=attention)
    if (name, attention) == ("preresnet164", "se"):
        pytest.skip("pytorchcv's network with SE has other batch norms")
    # pytorchcv's pre-activation networks with DIA have no extra batch norms.
    extra = sum(count(m) for n, m in ours.named_modules() if n.endswith("tail_bn"))
    assert count(ours) - extra == count(get_model(("" if attention is None else attention) + theirs))


@pytest.mark.parametrize(
    ("name", "plain", "dia"),
    [
        ("resnet20", 278_324, 278_324 + 776 + 2_832 + 10_784),
        ("resnet164", 1_727_284, 1_946_132),
        ("preresnet164", 1_726_388, 1_961_364),
        ("wrn52_4", 12_072_500, 12_298_516),
        ("resnext101_8x32", 32_138_244, 33_006_020),
    ],
)
def test_parameters_of_the_papers(name, plain, dia):
    with torch.device("meta"):
        assert count(models.create(name, 100)) == plain
        assert count(models.create(name, 100, attention="dia")) == dia


def test_params_command(capsys):
    assert __main__.main(["params"]) == 0
    text = capsys.readouterr().out
    for name in models.names():
        assert re.search(rf"^{name} ", text, re.MULTILINE)
    assert "1,946,132" in text
    assert "All counts agree." in text


def test_params_command_fails_where_a_count_differs(monkeypatch, capsys):
    monkeypatch.setitem(params.PUBLISHED, "resnet164", params.Published(1_727_284, 1_946_133))
    assert __main__.main(["params"]) == 1
    assert "DIFFERENT from the authors' count: resnet164." in capsys.readouterr().out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "peer", "layers", "attention", "backend"),
    [
        ("resnet20", "resnet20_cifar10", 20, None, None),
        ("resnet20", "seresnet20_cifar10", 20, "se", None),
        *(("resnet20", "diaresnet20_cifar10", 20, "dia", backend) for backend in BACKENDS),
        ("resnet164", "resnet164bn_cifar10", 164, None, None),
        *(("resnet164", "diaresnet164bn_cifar10", 164, "dia", backend) for backend in BACKENDS),
    ],
)
def test_network_of_pytorchcv(name, peer, layers, attention, backend, training):
    theirs = get_model(peer).double()
    ours = models.create(name, attention=attention, backend=backend).double()
    copy_weights(theirs, ours)
    images = torch.randn(BATCH, 3, SIDE, SIDE, dtype=torch.float64)
    expected = logits_and_gradients(theirs, images, training)
    found = logits_and_gradients(ours, images, training)
    limit = 4 * math.sqrt(TERMS * layers) * torch.finfo(torch.float64).eps
    for value, truth in zip(found, expected, strict=True):
        assert (value - truth.reshape(value.shape)).abs().max() <= limit * truth.abs().max()
    for value, truth in zip(tensors(ours)[0], tensors(theirs)[0], strict=True):
        assert (value - truth).abs().max() <= limit * truth.abs().max()


def test_each_stage_owns_one_attention():
    model = models.create("resnet20", attention="dia")
    owners = [name for name, module in model.named_modules(remove_duplicate=False) if type(module) is SharedAttention]
    assert owners == ["stages.0.attention", "stages.1.attention", "stages.2.attention"]
    assert [model.get_submodule(name).channels for name in owners] == [16, 32, 64]


def test_state_is_carried_through_a_stage_and_begins_anew_in_each():
    model = models.create("resnet20", attention="dia", in_channels=1)
    calls = []
    for module in model.modules():
        if isinstance(module, SharedAttention):
            module.register_forward_hook(lambda module, args, result: calls.append((module, args[1], result[1])))
    images = torch.randn(2, 1, 16, 16)
    model(images)
    model(images)
    assert len(calls) == 2 * 3 * 3
    for number, (module, received, _) in enumerate(calls):
        if number % 3 == 0:
            assert received is None
        else:
            before, _, returned = calls[number - 1]
            assert module is before
            assert received is returned


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shared", [False, True])
def test_any_cell_in_every_block_or_one_a_stage(cell, shared):
    model = models.create("resnet14", attention=cell, shared=shared, in_channels=1)
    units = [m for m in model.modules() if isinstance(m, (SharedAttention, CellAttention))]
    assert len(units) == (3 if shared else 6)
    lone = [create_attention(cell, c, 4 if cell in ("lstm", "lstm_tanh", "dsu") else 16, blocks=2 if shared else 1)
            for c in (16, 32, 64)]  # fmt: skip
    plain = models.create("resnet14", in_channels=1)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == (1 if shared else 2) * sum(p.numel() for unit in lone for p in unit.parameters())
    calls = []
    for unit in units:
        unit.register_forward_hook(lambda module, args, result: calls.append((module, args[1], result[1])))
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert len(calls) == 6
    assert all(p.grad is not None for p in model.parameters())
    for (first, none, state), (second, received, _) in zip(calls[::2], calls[1::2], strict=True):
        assert none is None
        assert (first is second) == shared
        assert received is (state if shared else None)


def test_the_unit_of_se_is_the_plain_one_unless_told_where_it_stands():
    kinds = [
        {type(block.attention) for stage in models.create("resnet14", attention="se", shared=shared).stages
         for block in stage.blocks}
        for shared in (None, False)
    ]  # fmt: skip
    assert kinds == [{models.SqueezeExcitation}, {CellAttention}]


def test_attention_in_some_stages_only():
    model = models.create("resnet14", attention="dia", stages=[2])
    assert [type(stage.attention) for stage in model.stages] == [type(None), type(None), SharedAttention]
    model = models.create("preresnet20", attention="se", stages=[0, 1])
    found = [{block.attention is not None for block in stage.blocks} for stage in model.stages]
    assert found == [{True}, {True}, {False}]
    shared = models.create("preresnet20", attention="eca", shared=True, stages=[1])
    norms = [{type(block.tail_bn) for block in stage.blocks} for stage in shared.stages]
    assert norms == [{nn.Identity}, {nn.BatchNorm2d}, {nn.Identity}]


def test_stacked_layers_of_the_lstm():
    model = models.create("resnet14", attention="dia", layers=2)
    assert [stage.attention.num_layers for stage in model.stages] == [2, 2, 2]
    with pytest.raises(ValueError, match="layers: expected 1 with attention='se', got 2"):
        models.create("resnet14", attention="se", layers=2)


def test_without_a_state_every_block_begins_anew():
    model = models.create("resnet14", attention="dia", carry_state=False, in_channels=1)
    received = []
    for stage in model.stages:
        stage.attention.register_forward_hook(lambda module, args, result: received.append(args[1]))
    model(torch.randn(2, 1, 8, 8))
    assert received == [None] * 6


@pytest.mark.parametrize(
    ("name", "blocks", "channels"),
    [
        ("resnet32", 5, 64),
        ("resnet83", 9, 256),
        ("resnet20bn", 2, 256),
        ("preresnet29", 3, 256),
        ("wrn16_2", 2, 128),
        ("resnext20_2x8", 2, 128),
    ],
)
def test_relatives_of_other_sizes(name, blocks, channels):
    model = models.create(name, 7, attention="dia", in_channels=1)
    assert [len(stage.blocks) for stage in model.stages] == [blocks] * 3
    assert model.classifier.in_features == channels
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


def test_backend_is_handed_on():
    model = models.create("resnet20", attention="dia", backend="reference")
    assert [m.backend for m in model.modules() if isinstance(m, SharedAttention)] == ["reference"] * 3


def test_copy_is_independent():
    model = models.create("resnet20", attention="dia", in_channels=1).eval()
    images = torch.randn(2, 1, 16, 16)
    before = model(images)
    other = copy.deepcopy(model)
    assert torch.equal(other(images), before)
    with torch.no_grad():
        other.stages[2].attention.input_expand_bias.add_(1)
    assert torch.equal(model(images), before)
    assert not torch.equal(other(images), before)


def test_names():
    assert models.names() == (
        "resnet20", "resnet56", "resnet110", "resnet164", "preresnet164", "wrn52_4", "resnext101_8x32",
    )  # fmt: skip


@pytest.mark.parametrize("attention", [None, "se", "dia"])
@pytest.mark.parametrize("name", models.names())
def test_every_network_learns_from_any_size(name, attention):
    model = models.create(name, num_classes=7, attention=attention, in_channels=1)
    logits = model(torch.randn(2, 1, 12, 8))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([1, 5])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("attention", [None, "dia"])
@pytest.mark.parametrize("name", models.names())
def test_without_shortcuts_and_norms(name, attention):
    whole = models.create(name, attention=attention)
    chain = models.create(name, attention=attention, skip=False)
    bare = models.create(name, attention=attention, norm=False)
    assert set(chain.state_dict()) == {key for key in whole.state_dict() if "projection" not in key}
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in bare.modules())
    assert all(m.bias is not None for m in bare.modules() if isinstance(m, torch.nn.Conv2d))
    chain.eval(), bare.eval()
    images = torch.randn(2, 3, 8, 8)
    assert chain(images).shape == bare(images).shape == (2, 10)


def test_without_a_shortcut_nothing_is_added():
    model = models.create("resnet20", attention="dia", skip=False)
    received = []
    for module in model.modules():
        if isinstance(module, SharedAttention):
            module.register_forward_hook(lambda *call: received.append(call[2]["shortcut"]), with_kwargs=True)
    model(torch.randn(2, 3, 8, 8))
    assert received == [None] * 9


# Keys of a network's state dict are a promise to those who keep checkpoints.
NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
FRAME = {
    "resnet": {"stem.0.weight", *(f"stem.1.{key}" for key in NORM_KEYS), "classifier.weight", "classifier.bias"},
    "preresnet": {"stem.weight", *(f"head.0.{key}" for key in NORM_KEYS), "classifier.weight", "classifier.bias"},
}
ATTENTION_KEYS = {
    f"attention.{path}_{half}_{kind}"
    for path in ("input", "hidden")
    for half in ("reduce", "expand")
    for kind in ("weight", "bias")
}


@pytest.mark.parametrize(
    ("name", "frame", "blocks", "convolutions", "norms", "projection", "projected"),
    [
        ("resnet20", "resnet", 3, 2, ["bn1", "bn2"], ["0.weight", "1"], [1, 2]),
        ("resnet164", "resnet", 18, 3, ["bn1", "bn2", "bn3"], ["0.weight", "1"], [0, 1, 2]),
        ("preresnet164", "preresnet", 18, 3, ["bn1", "bn2", "bn3", "tail_bn"], ["weight"], [0, 1, 2]),
        ("wrn52_4", "preresnet", 8, 2, ["bn1", "bn2", "tail_bn"], ["weight"], [0, 1, 2]),
        ("resnext101_8x32", "resnet", 11, 3, ["bn1", "bn2", "bn3"], ["0.weight", "1"], [0, 1, 2]),
    ],
)
def test_keys_of_the_state_dict(name, frame, blocks, convolutions, norms, projection, projected):
    expected = set(FRAME[frame])
    for stage in range(3):
        expected |= {f"stages.{stage}.{key}" for key in ATTENTION_KEYS}
        for block in range(blocks):
            prefix = f"stages.{stage}.blocks.{block}"
            expected |= {f"{prefix}.conv{k + 1}.weight" for k in range(convolutions)}
            expected |= {f"{prefix}.{norm}.{key}" for norm in norms for key in NORM_KEYS}
        if stage in projected:
            prefix = f"stages.{stage}.blocks.0.projection"
            expected.add(f"{prefix}.{projection[0]}")
            expected |= {f"{prefix}.{norm}.{key}" for norm in projection[1:] for key in NORM_KEYS}
    assert set(models.create(name, attention="dia").state_dict()) == expected


# --- the families that have no peer, block by block -------------------------------------------------


def batch_norm(x, norm):
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)


def randomise(block):
    """Weights of norms and biases away from 1 and 0."""
    for parameter in block.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return block.double()


def assert_formula(block, shared, formula, channels):
    x = torch.randn(3, channels, 6, 6, dtype=torch.float64)
    h = torch.rand(3, shared.channels, dtype=torch.float64)
    c = torch.randn(3, shared.channels, dtype=torch.float64)
    found, (new_h, _) = block(x, shared, (h, c))
    branch, shortcut, relu = formula(x)
    _, (expected_h, _) = shared(branch, (h, c))
    expected = branch * expected_h[:, :, None, None] + shortcut
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(new_h, expected_h, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (6, 2)])
def test_pre_activation_bottleneck(channels, stride):
    b = randomise(PreActivationBottleneck(channels, 2, stride, Options("dia")))

    def formula(x):
        y = F.conv2d(batch_norm(x, b.bn1).relu(), b.conv1.weight)
        y = F.conv2d(batch_norm(y, b.bn2).relu(), b.conv2.weight, stride=stride, padding=1)
        y = F.conv2d(batch_norm(y, b.bn3).relu(), b.conv3.weight)
        shortcut = x if stride == 1 else F.conv2d(x, b.projection.weight, stride=stride)
        return batch_norm(y, b.tail_bn), shortcut, False

    assert_formula(b, SharedAttention(8, 2, dtype=torch.float64), formula, channels)


@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (6, 2)])
def test_wide_block(channels, stride):
    b = randomise(WideBlock(channels, 8, stride, 0.0, Options("dia")))

    def formula(x):
        first = batch_norm(x, b.bn1).relu()
        y = F.conv2d(first, b.conv1.weight, stride=stride, padding=1)
        y = F.conv2d(batch_norm(y, b.bn2).relu(), b.conv2.weight, padding=1)
        shortcut = x if stride == 1 else F.conv2d(first, b.projection.weight, stride=stride)
        return batch_norm(y, b.tail_bn), shortcut, False

    assert_formula(b, SharedAttention(8, 2, dtype=torch.float64), formula, channels)


@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (6, 2)])
def test_grouped_bottleneck(channels, stride):
    b = randomise(Bottleneck(channels, 4, stride, Options("dia"), out_channels=8, groups=2))
    assert [m.groups for m in models.create("resnext101_8x32").modules() if hasattr(m, "groups")].count(8) == 33

    def formula(x):
        y = batch_norm(F.conv2d(x, b.conv1.weight), b.bn1).relu()
        y = batch_norm(F.conv2d(y, b.conv2.weight, stride=stride, padding=1, groups=2), b.bn2).relu()
        y = batch_norm(F.conv2d(y, b.conv3.weight), b.bn3)
        shortcut = x
        if stride == 2:
            shortcut = batch_norm(F.conv2d(x, b.projection[0].weight, stride=stride), b.projection[1])
        return y, shortcut, True

    assert_formula(b, SharedAttention(8, 2, dtype=torch.float64), formula, channels)


def test_dropout_of_the_wide_network():
    model = models.create("wrn52_4")
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.create("resnet21"), r"depth: expected 6 n \+ 2 .*, got 21"),
        (lambda: models.create("resnetx"), r"name: expected one of resnet20.*, got 'resnetx'"),
        (lambda: models.create("resnet20", attention="dia", stages=(0, 3)), r"stages: expected some of 0, 1, 2, got"),
        (lambda: models.create("resnet20", 0), r"num_classes: expected at least 1, got 0"),
        (lambda: models.create("resnet20", attention="sge"), r"attention: expected None, dia or one of .*, got 'sge'"),
        (lambda: models.create("resnet20", attention="dia", backend="tpu"), r"backend: expected None or one of"),
        (
            lambda: models.create("resnet20", attention="dia", reduction=17),
            "reduction: expected at most channels = 16",
        ),
        (lambda: models.create("resnet20", attention="se", reduction=17), "reduction: expected at most channels = 16"),
        (lambda: models.create("resnet20", attention="se", reduction=0), "reduction: expected at least 1, got 0"),
        (lambda: models.create("resnet20", attention="dia", stages=1), r"stages: expected some of 0, 1, 2, got 1"),
        (lambda: models.create("resnet20", in_channels=0), r"in_channels: expected at least 1, got 0"),
        (lambda: models.create("wrn10_0"), r"name: expected .*, got 'wrn10_0'"),
        (lambda: models.create("resnext11_8x4"), r"name: expected .*, got 'resnext11_8x4'"),
        (lambda: models.resnet18(num_classes=0), r"num_classes: expected at least 1, got 0"),
        (lambda: models.resnet18(weights="FOO"), r"weights: expected None or one of IMAGENET1K_V1, DEFAULT, got 'FOO'"),
        (lambda: models.create("resnet20", attention="dia", reduction=0), "reduction: expected at least 1, got 0"),
        (lambda: models.ResNet(21), r"depth: expected 6 n \+ 2 with n at least 1, got 21"),
        (lambda: models.ResNet(2), r"depth: expected 6 n \+ 2 with n at least 1, got 2"),
        (lambda: models.ResNet(109, bottleneck=True), r"depth: expected 9 n \+ 2"),
        (lambda: models.PreResNet(21), r"depth: expected 9 n \+ 2"),
        (lambda: models.WideResNet(50), r"depth: expected 6 n \+ 4"),
        (lambda: models.ResNeXt(100), r"depth: expected 9 n \+ 2"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_stages_may_be_any_sequence():
    some = models.create("resnet8", attention="dia", stages=range(2))
    assert count(some) == count(models.create("resnet8", attention="dia", stages=(0, 1)))


IMAGES = torch.ones(2, 3, 32, 32)


@pytest.mark.parametrize(("num_classes", "kept"), [(1000, True), (10, False)])
def test_pretrained_weights_for_other_classes(num_classes, kept, monkeypatch):
    """The classifier is drawn anew, all else is the pretrained network's."""
    weights = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *args, **kwargs: weights)
    network = models.resnet18(attention=None, weights="DEFAULT", num_classes=num_classes).state_dict()
    assert network["fc.weight"].shape == (num_classes, 512)
    assert torch.equal(network["layer4.1.bn2.weight"], weights["layer4.1.bn2.weight"])
    assert torch.equal(network["conv1.weight"], weights["conv1.weight"])
    assert (network["fc.weight"].shape == weights["fc.weight"].shape) is kept
    assert models.resnet18(weights="DEFAULT", num_classes=num_classes).eval()(IMAGES).shape == (2, num_classes)


@pytest.mark.parametrize(("attention", "reduction"), [(None, None), ("se", None), ("dia", None), ("dia", 4)])
def test_networks_for_imagenet(attention, reduction):
    """torchvision's parameters, and those of a unit a stage (r = 20, or as asked) or a block (r = 16)."""
    network = models.resnet50(attention=attention, reduction=reduction, num_classes=10)
    plain = models.resnet50(attention=None, num_classes=10)
    added = count(network) - count(plain)
    widths = {256: 3, 512: 4, 1024: 6, 2048: 3}

    def bottlenecks(c: int, m: int, paths: int, gates: int) -> int:
        return paths * (c * m + m + gates * c * m + gates * c)

    expected = {
        None: 0,
        "se": sum(n * bottlenecks(c, c // 16, 1, 1) for c, n in widths.items()),
        "dia": sum(bottlenecks(c, c // (reduction or 20), 2, 4) for c in widths),
    }[attention]
    assert added == expected
    assert network.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"attention: expected None"):
        models.resnet18(attention="lstm")
