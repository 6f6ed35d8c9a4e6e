"""The networks of ``dia_kernels.models`` against hand counts and against pytorchcv's, with copied weights.

Tolerance: 4 sqrt(n) ulp of the tensor's largest value in float64, n the terms of the longest sum.
"""

import copy
import math

import pytest
import torch
from pytorchcv.model_provider import get_model

from dia_kernels import SharedAttention, backends, models

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SIDE = 4, 32
# The longest sum is over the samples and positions of the first stage: its batch norms, its gradients.
TERMS = BATCH * SIDE * SIDE
BACKENDS = [None, *(name for name in backends.NAMES if backends.missing(name) is None)]


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
        (attention if "attention" in name else backbone).append(tensor)
    return backbone, attention


def tensors(model):
    """Parameters and buffers in order, each once: pytorchcv registers its attention in every block."""
    return split_by_unit([*model.named_parameters(), *model.named_buffers()])


@torch.no_grad()
def copy_weights(source, target):
    for sources, targets in zip(tensors(source), tensors(target), strict=True):
        for value, into in zip(sources, targets, strict=True):
            into.copy_(value)


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


@pytest.mark.parametrize(("depth", "attention"), [(20, None), (20, "dia"), (56, None), (56, "dia")])
def test_parameters_of_pytorchcv(depth, attention):
    theirs = get_model(f"{'' if attention is None else attention}resnet{depth}_cifar10")
    assert count(models.ResNet(depth, attention=attention)) == count(theirs)


def test_known_sizes():
    assert count(models.create("resnet20")) == 272_474
    assert count(models.create("resnet20", attention="dia")) == 272_474 + 776 + 2_832 + 10_784


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("attention", "backend"), [(None, None), *(("dia", backend) for backend in BACKENDS)])
def test_network_of_pytorchcv(attention, backend, training):
    theirs = get_model("resnet20_cifar10" if attention is None else "diaresnet20_cifar10").double()
    ours = models.create("resnet20", attention=attention, backend=backend).double()
    copy_weights(theirs, ours)
    images = torch.randn(BATCH, 3, SIDE, SIDE, dtype=torch.float64)
    expected = logits_and_gradients(theirs, images, training)
    found = logits_and_gradients(ours, images, training)
    limit = 4 * math.sqrt(TERMS) * torch.finfo(torch.float64).eps
    for value, truth in zip(found, expected, strict=True):
        assert (value - truth).abs().max() <= limit * truth.abs().max()
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
    assert "resnet20" in models.names()
    for name in models.names():
        assert models.create(name, num_classes=7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.create("resnet21"), r"name: expected one of resnet20.*, got 'resnet21'"),
        (lambda: models.create("resnet20", attention="se"), r"attention: expected None or \"dia\", got 'se'"),
        (lambda: models.create("resnet20", attention="dia", backend="tpu"), r"backend: expected None or one of"),
        (
            lambda: models.create("resnet20", attention="dia", reduction=17),
            "reduction: expected at most channels = 16",
        ),
        (lambda: models.ResNet(21), r"depth: expected 6 n \+ 2 with n at least 1, got 21"),
        (lambda: models.ResNet(2), r"depth: expected 6 n \+ 2 with n at least 1, got 2"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
