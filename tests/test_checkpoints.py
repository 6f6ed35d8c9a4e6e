"""Checkpoints: pytorchcv's networks and the authors' names loaded into ours; every error, with nothing changed.

Weights and running statistics are random, so that no two tensors can be swapped unseen. Outputs are compared in
float64; the tolerance covers rounding errors alone.
"""

import re

import pytest
import torch
import torchvision
from peers import authors
from pytorchcv.model_provider import get_model
from torch import nn

import dia_kernels as dk
from dia_kernels import checkpoints, models
from dia_kernels.checkpoints import CheckpointError
from dia_kernels.models.parts import Options

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
DIA = Options("dia")


@torch.no_grad()
def randomise(model):
    """Draws what a training would have changed: norms' parameters and statistics, and their counters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.num_batches_tracked.fill_(int(torch.randint(1, 1000, ())))
    return model


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, expected):
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def saved(content, folder):
    path = folder / "checkpoint.pth.tar"
    torch.save(content, path)
    return path


def small(name):
    """A network of each family with the fewest blocks that have a first and a later one in each stage."""
    networks = {
        "resnet": lambda: models.ResNet(20, 7, bottleneck=True, options=DIA),
        "preresnet": lambda: models.PreResNet(20, 7, options=DIA),
        "wrn": lambda: models.WideResNet(16, 7, widen=1, options=DIA),
        "resnext": lambda: models.ResNeXt(20, 7, groups=2, widen=2, options=DIA),
    }
    return randomise(networks[name]())


# --- pytorchcv ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "classes", "loaded", "merged"),
    [
        ("resnet20", "diaresnet20_cifar10", 10, 152, 48),
        ("resnet56", "diaresnet56_svhn", 10, 368, 192),
        ("resnet164", "diaresnet164bn_cifar100", 100, 1022, 408),
    ],
)
def test_the_output_of_pytorchcv(ours, theirs, classes, loaded, merged, tmp_path):
    peer = randomise(get_model(theirs)).eval()
    model = models.create(ours, classes, attention="dia").double().eval()
    report = checkpoints.load(model, saved(peer.state_dict(), tmp_path))
    assert (report.source, report.loaded, report.renamed) == ("pytorchcv's networks", loaded, loaded)
    assert report.merged == merged
    assert report.loaded + report.merged == len(peer.state_dict())
    assert str(report).count("\n") == 0, report
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = peer.double()(images)
        torch.testing.assert_close(model(images), expected, **TOLERANCE)
    assert expected.std() > 1e-3


def test_a_training_step_is_that_of_pytorchcv(tmp_path):
    peer = randomise(get_model("diaresnet20_cifar10")).double()
    model = models.create("resnet20", attention="dia").double()
    checkpoints.load(model, saved(peer.state_dict(), tmp_path))
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    for network in (peer, model):
        nn.functional.cross_entropy(network(images), labels).backward()
        torch.optim.SGD(network.parameters(), 0.1).step()
    stepped = models.create("resnet20", attention="dia").double()
    checkpoints.load(stepped, peer.state_dict())
    for name, value in stepped.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, **TOLERANCE, msg=name)
    gradients = [parameter.grad.abs().max() for parameter in model.parameters()]
    assert min(gradients) > 0


def test_networks_without_attention(tmp_path):
    peer = randomise(get_model("resnet20_cifar10")).double().eval()
    model = models.create("resnet20").double().eval()
    assert checkpoints.load(model, saved(peer.state_dict(), tmp_path)).merged == 0
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), peer(images), **TOLERANCE)


def converted_names(plain):
    """torchvision's network with the attention's parameters where a conversion puts them."""
    for stage in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
        last = stage[0].bn3 if hasattr(stage[0], "bn3") else stage[0].bn2
        stage[0].attention = dk.SharedAttention(last.num_features, 4)
    return plain


@pytest.mark.parametrize(
    ("ours", "theirs", "keys", "names"),
    [
        ("resnet18", "diaresnet18", 186, 154),
        ("resnet34", "diaresnet34", 346, 250),
        ("resnet50", "diaresnet50b", 448, 352),
        ("resnet101", "diaresnet101b", 890, 658),
    ],
)
def test_names_and_shapes_of_torchvision(ours, theirs, keys, names):
    with torch.device("meta"):
        peer = get_model(theirs).state_dict()
        model = converted_names(getattr(torchvision.models, ours)()).state_dict()
    found = checkpoints.key_map(peer, model)
    assert len(peer) == len(found) == keys
    assert set(found.values()) == set(model)
    assert len(model) == names
    for key, name in found.items():
        assert peer[key].shape == model[name].shape, key


def test_pairs_of_names_of_torchvision():
    with torch.device("meta"):
        peer = get_model("diaresnet50b").state_dict()
        model = converted_names(torchvision.models.resnet50()).state_dict()
    found = checkpoints.key_map(peer, model)
    for key, name in {
        "features.init_block.conv.conv.weight": "conv1.weight",
        "features.init_block.conv.bn.running_var": "bn1.running_var",
        "features.stage3.unit5.body.conv2.conv.weight": "layer3.4.conv2.weight",
        "features.stage3.unit5.body.conv3.bn.running_mean": "layer3.4.bn3.running_mean",
        "features.stage4.unit1.identity_conv.conv.weight": "layer4.0.downsample.0.weight",
        "features.stage4.unit1.identity_conv.bn.bias": "layer4.0.downsample.1.bias",
        "features.stage2.unit4.attention.lstm.x_amps.amp1.fc1.weight": "layer2.0.attention.input_reduce_weight",
        "features.stage2.unit3.attention.lstm.h_amps.amp1.fc1.bias": "layer2.0.attention.hidden_reduce_bias",
        "features.stage2.unit1.attention.lstm.x_amps.amp1.fc2.bias": "layer2.0.attention.input_expand_bias",
        "features.stage1.unit2.attention.lstm.h_amps.amp1.fc2.weight": "layer1.0.attention.hidden_expand_weight",
        "output.bias": "fc.bias",
    }.items():
        assert found[key] == name


def test_values_go_to_torchvisions_names(tmp_path):
    peer = randomise(get_model("diaresnet10")).state_dict()
    block = torchvision.models.resnet.BasicBlock
    model = converted_names(torchvision.models.ResNet(block, [1, 1, 1, 1]))
    report = checkpoints.load(model, saved(peer, tmp_path))
    assert (report.loaded, report.merged, report.notes) == (len(model.state_dict()), 0, ())
    found = model.state_dict()
    assert torch.equal(
        found["layer2.0.attention.hidden_expand_weight"],
        peer["features.stage2.unit1.attention.lstm.h_amps.amp1.fc2.weight"],
    )
    assert torch.equal(found["layer4.0.bn2.running_var"], peer["features.stage4.unit1.body.conv2.bn.running_var"])


def test_a_bottleneck_with_torchvisions_names_is_noted():
    """diaresnet50 has the names and the shapes of diaresnet50b, and strides elsewhere."""
    with torch.device("meta"):
        peer, other = get_model("diaresnetbc14b").state_dict(), get_model("diaresnet50").state_dict()
        assert {k: v.shape for k, v in other.items()} == {
            k: v.shape for k, v in get_model("diaresnet50b").state_dict().items()
        }
    peer = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in peer.items()}
    block = torchvision.models.resnet.Bottleneck
    report = checkpoints.load(converted_names(torchvision.models.ResNet(block, [1, 1, 1, 1])), peer)
    assert "diaresnet50b" in str(report)


def test_the_converted_resnet50_gives_pytorchcvs_output(tmp_path):
    peer = randomise(get_model("diaresnet50b")).eval()
    model = torchvision.models.resnet50()
    dk.share_attention(model, reduction=4)
    report = checkpoints.load(model, saved(peer.state_dict(), tmp_path))
    assert (report.loaded, report.renamed, report.merged) == (352, 352, 96)
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = peer.double()(images)
        torch.testing.assert_close(model.double().eval()(images), expected, **TOLERANCE)
    assert expected.std() > 1e-3


# --- the authors -------------------------------------------------------------------------------------

CELL = {"input": "ih", "hidden": "hh", "reduce": "0", "expand": "2"}


def as_authors(name, family):
    """Name of a tensor of ours in the authors' network: the inverse of the key map, written down anew."""
    stage = {"resnet": "layer", "preresnet": "layer", "wrn": "block", "resnext": "stage_"}[family]
    if match := re.match(r"stages\.(\d)\.attention\.(input|hidden)_(reduce|expand)_(weight|bias)$", name):
        number, path, linear, last = match.groups()
        return f"{stage}{int(number) + 1}.lstm.w_{CELL[path]}.0.seq.{CELL[linear]}.{last}"
    if match := re.match(r"stages\.(\d)\.blocks\.(\d+)\.(.+)\.(\w+)$", name):
        number, block, layer, last = match.groups()
        if family == "resnet":
            layer = layer.replace("projection", "downsample")
        elif family == "preresnet":
            layer = {"tail_bn": "bn_additional", "projection": "downsample.0"}.get(layer, layer)
        elif family == "wrn":
            layer = {"tail_bn": "bn_additional", "projection": "convShortcut"}.get(layer, layer)
        else:
            layer = {
                "conv1": "conv_reduce",
                "bn1": "bn_reduce",
                "conv2": "conv_conv",
                "bn2": "bn",
                "conv3": "conv_expand",
                "bn3": "bn_expand",
                "projection.0": "shortcut.shortcut_conv",
                "projection.1": "shortcut.shortcut_bn",
            }[layer]
        return f"{stage}{int(number) + 1}.ModuleList.{block}.{layer}.{last}"
    layer, _, last = name.rpartition(".")
    outer = {
        "resnet": {"stem.0": "conv1", "stem.1": "bn1", "classifier": "fc"},
        "preresnet": {"stem": "conv1", "head.0": "bn", "classifier": "fc"},
        "wrn": {"stem": "conv1", "head.0": "bn1", "classifier": "fc"},
        "resnext": {"stem.0": "conv_1_3x3", "stem.1": "bn_1", "classifier": "classifier"},
    }[family]
    return f"{outer[layer]}.{last}"


def authors_file(model, family):
    """What the authors' training script saves of a network in DataParallel."""
    state = {f"module.{as_authors(name, family)}": value for name, value in model.state_dict().items()}
    return {"epoch": 164, "state_dict": state, "acc": 76.5, "best_acc": 76.67, "optimizer": {"state": {}}}


FAMILIES = [
    ("resnet", "resnet164", "the authors' ResNet"),
    ("preresnet", "preresnet164", "the authors' PreResNet"),
    ("wrn", "wrn52_4", "the authors' WRN"),
    ("resnext", "resnext101_8x32", "the authors' ResNeXt"),
]


@pytest.mark.parametrize(("family", "name", "source"), FAMILIES)
def test_there_and_back(family, name, source, tmp_path):
    original, model = small(family), small(family)
    file = authors_file(original, family)
    report = checkpoints.load(model, saved(file, tmp_path))
    assert_same_state(model, original.state_dict())
    assert (report.source, report.loaded, report.merged) == (source, len(file["state_dict"]), 0)
    with torch.device("meta"):
        full = models.create(name, 100, attention="dia").state_dict()
    theirs = {f"module.{as_authors(key, family)}": key for key in full}
    assert checkpoints.key_map(theirs, full) == theirs


def test_the_output_of_the_authors(tmp_path):
    """The peer's blocks lie in stages; the authors' lie under ``ModuleList`` of ``layer1`` to ``layer3``."""
    peer = randomise(authors.ResNet(widths=(64, 128, 256), blocks=18, num_classes=100)).eval()
    state = {}
    for key, value in peer.state_dict().items():
        key = re.sub(r"^stages\.(\d)\.", lambda match: f"layer{int(match[1]) + 1}.", key)
        state[f"module.{key.replace('.blocks.', '.ModuleList.')}"] = value
    assert "module.layer3.ModuleList.17.bn3.running_var" in state
    assert "module.layer1.lstm.w_ih.0.seq.0.weight" in state
    model = models.create("resnet164", 100, attention="dia").double().eval()
    checkpoints.load(model, saved({"state_dict": state, "epoch": 1}, tmp_path))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), peer.double()(images), **TOLERANCE)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("layer2.lstm.w_ih.1.weight", "stages.1.attention.input_weight_l1"),
        ("layer2.lstm.w_hh.2.bias", "stages.1.attention.hidden_bias_l2"),
        ("features.stage2.unit3.attention.lstm.x_amps.amp2.weight", "stages.1.attention.input_weight_l1"),
        ("features.stage2.unit1.attention.lstm.h_amps.amp3.bias", "stages.1.attention.hidden_bias_l2"),
    ],
)
def test_names_of_stacked_cells(key, name):
    mark = "layer1.ModuleList.0.conv1.weight" if key.startswith("layer") else "features.stage1.unit1.body.conv1.x"
    assert checkpoints.key_map([mark, key], small("resnet").state_dict())[key] == name


# --- ours, and what wraps a network --------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "network.", "module._orig_mod."])
@pytest.mark.parametrize("nested", [False, True])
def test_our_own(prefix, nested, tmp_path):
    original, model = small("wrn"), small("wrn")
    state = {prefix + name: value for name, value in original.state_dict().items()}
    report = checkpoints.load(model, saved({"state_dict": state} if nested else state, tmp_path))
    assert_same_state(model, original.state_dict())
    assert report.source == "dia_kernels.models"
    assert report.renamed == (len(state) if prefix else 0)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_into_a_wrapped_network(wrap):
    original, model = small("resnet"), small("resnet")
    checkpoints.load(wrap(model), authors_file(original, "resnet"))
    assert_same_state(model, original.state_dict())


def test_any_network_by_its_own_names():
    original, model = nn.Linear(2, 3), nn.Linear(2, 3)
    report = checkpoints.load(model, original.state_dict())
    assert_same_state(model, original.state_dict())
    assert (report.source, report.loaded, report.renamed) == ("the model itself", 2, 0)


def test_pytorchcvs_own_network_holds_each_tensor_once():
    original, model = (randomise(get_model("diaresnet20_cifar10")) for _ in range(2))
    report = checkpoints.load(model, original.state_dict())
    assert_same_state(model, original.state_dict())
    assert (report.loaded, report.merged) == (152, 48)


def test_the_dtype_stays_the_models():
    original, model = small("resnet").double(), small("resnet").to(torch.bfloat16)
    checkpoints.load(model, original.state_dict())
    assert_same_state(model, original.to(torch.bfloat16).state_dict())


def test_counters_that_the_file_lacks_are_zeroed(tmp_path):
    original, model = small("resnet"), small("resnet")
    file = authors_file(original, "resnet")
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    for name in counters:
        del file["state_dict"][f"module.{as_authors(name, 'resnet')}"]
    report = checkpoints.load(model, saved(file, tmp_path))
    assert list(report.zeroed) == counters
    assert not report.missing
    assert_same_state(model, {n: v * (n not in counters) for n, v in original.state_dict().items()})
    assert f"set to 0: {len(counters)} (stem.1.num_batches_tracked, " in str(report)


def test_report_for_a_reader():
    report = checkpoints.LoadReport("us", 5, 4, 3, missing=("a",), unexpected=("b", "c", "d", "e"), notes=("So.",))
    assert str(report) == (
        "Names of us: 5 tensors loaded, 4 of them renamed, 3 equal copies merged.\n"
        "Missing: 1 (a).\nUnexpected: 4 (b, c, d, ...).\nSo."
    )


# --- what does not fit -----------------------------------------------------------------------------------


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


def faulty():
    """A network's state with one key gone, two too many, and one of another shape."""
    state = without(small("resnet").state_dict(), "stem.0.weight")
    state["stages.0.blocks.7.conv1.weight"] = state["extra"] = torch.zeros(1)
    state["classifier.bias"] = torch.zeros(8)
    return state


FAULTS = (
    "missing: 1 (stem.0.weight); unexpected: 2 (stages.0.blocks.7.conv1.weight, extra);"
    " of another shape: 1 (classifier.bias (8,) for classifier.bias (7,))."
)


def test_everything_wrong_is_named_and_nothing_loaded():
    model = small("resnet")
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=re.escape(FAULTS)):
        checkpoints.load(model, faulty())
    assert_same_state(model, before)


def test_not_strict_loads_what_fits():
    model, state = small("resnet"), faulty()
    before = snapshot(model)
    report = checkpoints.load(model, state, strict=False)
    assert report.missing == ("stem.0.weight",)
    assert report.unexpected == ("stages.0.blocks.7.conv1.weight", "extra")
    assert report.misshapen == ("classifier.bias (8,) for classifier.bias (7,)",)
    assert report.loaded == len(before) - 2
    kept = ("stem.0.weight", "classifier.bias")
    assert_same_state(model, {name: before[name] if name in kept else state[name] for name in before})


def test_a_norm_that_is_missing_has_its_counter_missing():
    model = small("resnet")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("stem.1.")}
    report = checkpoints.load(model, state, strict=False)
    assert report.zeroed == ()
    assert "stem.1.num_batches_tracked" in report.missing
    assert model.stem[1].num_batches_tracked > 0


def test_copies_that_differ():
    state = snapshot(get_model("diaresnet20_cifar10"))
    other = "features.stage2.unit3.attention.lstm.h_amps.amp1.fc2.bias"
    state[other] = state[other] + 1e-6
    model = models.create("resnet20", attention="dia")
    before = snapshot(model)
    for strict in (True, False):
        with pytest.raises(
            CheckpointError,
            match=r"copies of one tensor differ: 1 \(features.stage2.unit1.\S+ and features.stage2.unit3.\S+h_amps",
        ):
            checkpoints.load(model, state, strict=strict)
    assert_same_state(model, before)


def file_of(name):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in get_model(name).state_dict().items()}
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        (lambda: {"weight": torch.ones(1)}, lambda: small("resnet"), r"keys of no known form: 1 \(weight\)"),
        (
            lambda: authors_file(small("wrn"), "wrn"),
            lambda: converted_names(torchvision.models.resnet18()),
            "names of the authors' WRN, no map to those of torchvision's ResNets",
        ),
        (
            lambda: small("resnet").state_dict(),
            lambda: nn.Linear(2, 3),
            "names of dia_kernels.models, no map to those of the model",
        ),
        (
            lambda: file_of("diapreresnet20_cifar10"),
            lambda: small("preresnet"),
            "pytorchcv's pre-activation networks, no map to those of dia_kernels.models .their blocks have no norm",
        ),
        (
            lambda: file_of("diaresnet20_cifar10"),
            lambda: models.create("resnet56", attention="dia"),
            r"do not fit the model. missing: 216 \(stages.0.blocks.3.conv1.weight, .*, \.\.\.\). Nothing was loaded",
        ),
        (
            lambda: file_of("diaresnet20_cifar10"),
            lambda: models.create("resnet20"),
            r"unexpected: 72 \(features.stage1.unit1.attention.lstm.x_amps.amp1.fc1.weight, ",
        ),
        (
            lambda: file_of("diaresnet20_cifar10"),
            lambda: models.create("resnet20", 100, attention="dia"),
            r"output.weight \(10, 64\) for classifier.weight \(100, 64\)",
        ),
        (
            lambda: authors_file(small("preresnet"), "preresnet"),
            lambda: small("resnet"),
            "names of the authors' PreResNet, which do not fit the model. missing",
        ),
        (
            lambda: file_of("diaresnet20_cifar10"),
            lambda: models.create("resnet20", attention="dia").to("meta"),
            "tensors on the meta device",
        ),
    ],
)
def test_a_file_of_another_network(file, model, message):
    model = model()
    before = None if next(model.parameters()).is_meta else snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(model, file())
    if before is not None:
        assert_same_state(model, before)


def test_nothing_that_fits_is_an_error_if_not_strict_too():
    with pytest.raises(CheckpointError, match="of another shape: 2"):
        checkpoints.load(nn.Linear(2, 3), nn.Linear(4, 5).state_dict(), strict=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no checkpoint that torch.load reads with weights_only=True"),
        (b"no weights here", "is no checkpoint that torch.load reads"),
        (b"PK\x03\x04 half a zip", "is no checkpoint that torch.load reads"),
        (nn.Linear(2, 3), "is no checkpoint that torch.load reads with weights_only=True .UnpicklingError: "),
        ([torch.ones(1)], "expected a state dict, got list"),
        (torch.ones(1), "expected a state dict, got Tensor"),
        ({}, "expected a state dict, got an empty one"),
        ({"epoch": 3}, "expected a state dict, got int under 'epoch'"),
        ({3: torch.ones(1)}, "expected a state dict, got Tensor under 3"),
        ({"weight": torch.ones(1, device="meta")}, "expected values, got a tensor on the meta device under 'weight'"),
    ],
)
def test_a_file_that_is_no_checkpoint(content, message, tmp_path):
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(nn.Linear(2, 3), path)


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoints.load(nn.Linear(2, 3), tmp_path / "none")


@pytest.mark.parametrize(
    ("model", "file", "message"),
    [
        ({}, {}, "model: expected an nn.Module, got dict"),
        (nn.Linear(2, 3), 3, "file: expected a path or a state dict, got int"),
    ],
)
def test_arguments_of_the_wrong_type(model, file, message):
    with pytest.raises(TypeError, match=message):
        checkpoints.load(model, file)
