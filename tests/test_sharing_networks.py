"""``share_attention`` on other people's networks: each against the same attention hooked in by hand.

Where attention belongs is written down here for every network, as names of its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import monai.networks.nets as monai
import pytest
import segmentation_models_pytorch
import timm
import torch
import torchvision.models as vision
from hooked import Places, assert_same, pair
from pytorchcv.model_provider import get_model
from torch import nn

from dia_kernels import sharing

pytestmark = pytest.mark.usefixtures("one_thread")


def _images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _blocks(pattern: str, *counts: int, first: int = 1) -> Places:
    """``pattern`` with the stage's number and the block's, of so many blocks a stage."""
    return [[pattern.format(s=s, i=i) for i in range(n)] for s, n in enumerate(counts, first)]


@dataclass
class Case:
    make: Callable[[], nn.Module]
    places: Places
    shape: tuple[int, ...] = (2, 3, 64, 64)
    options: dict[str, Any] | None = None


def _of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{"num_classes": 7, **options})


RESNET50 = _blocks("layer{s}.{i}.bn3", 3, 4, 6, 3)
HRNET = [
    ["layer1.0.bn3"],
    *([f"stage{s}.0.branches.{b}.{i}.bn2" for i in range(2)] for s in (2, 3, 4) for b in range(s)),
    *([f"incre_modules.{k}.0.bn3"] for k in range(4)),
]
CASES = {
    "torchvision resnet18": Case(lambda: vision.resnet18(num_classes=7), _blocks("layer{s}.{i}.bn2", 2, 2, 2, 2)),
    "torchvision resnet50": Case(lambda: vision.resnet50(num_classes=7), RESNET50),
    "torchvision resnet152": Case(lambda: vision.resnet152(num_classes=7), _blocks("layer{s}.{i}.bn3", 3, 8, 36, 3)),
    "torchvision resnext50": Case(lambda: vision.resnext50_32x4d(num_classes=7), RESNET50),
    "torchvision wide_resnet50": Case(lambda: vision.wide_resnet50_2(num_classes=7), RESNET50),
    "torchvision regnet_y_400mf": Case(
        lambda: vision.regnet_y_400mf(num_classes=7),
        _blocks("trunk_output.block{s}.block{s}-{i}.f", 1, 3, 6, 6),
    ),
    "torchvision mobilenet_v3_small": Case(
        lambda: vision.mobilenet_v3_small(num_classes=7),
        [["features.3.block"], ["features.5.block", "features.6.block"], ["features.8.block"],
         ["features.10.block", "features.11.block"]],
    ),
    "torchvision mobilenet_v3_large": Case(
        lambda: vision.mobilenet_v3_large(num_classes=7),
        [["features.1.block"], ["features.3.block"], ["features.5.block", "features.6.block"],
         [f"features.{i}.block" for i in (8, 9, 10)], ["features.12.block"],
         ["features.14.block", "features.15.block"]],
    ),
    "torchvision efficientnet_b0": Case(
        lambda: vision.efficientnet_b0(num_classes=7),
        [["features.2.1.block"], ["features.3.1.block"], ["features.4.1.block", "features.4.2.block"],
         ["features.5.1.block", "features.5.2.block"], [f"features.6.{i}.block" for i in (1, 2, 3)]],
    ),
    "torchvision convnext_tiny": Case(
        lambda: vision.convnext_tiny(num_classes=7, stochastic_depth_prob=0.3),
        [[f"< features.{s}.{i}.stochastic_depth" for i in range(n)] for s, n in ((1, 3), (3, 3), (5, 9), (7, 3))],
    ),
    "torchvision deeplabv3_resnet50": Case(
        lambda: vision.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3),
        _blocks("backbone.layer{s}.{i}.bn3", 3, 4, 6, 3),
        (2, 3, 33, 33),
    ),
    "timm resnet50": Case(_of_timm("resnet50"), RESNET50),
    "timm resnet50, stochastic depth": Case(_of_timm("resnet50", drop_path_rate=0.3), RESNET50),
    "timm resnet50d": Case(_of_timm("resnet50d"), RESNET50),
    "timm resnetv2_50": Case(_of_timm("resnetv2_50"), _blocks("stages.{s}.blocks.{i}.conv3", 3, 4, 6, 3, first=0)),
    "timm seresnet50, kept": Case(_of_timm("seresnet50"), _blocks("layer{s}.{i}.se", 3, 4, 6, 3)),
    "timm ecaresnet50d, kept": Case(_of_timm("ecaresnet50d"), _blocks("layer{s}.{i}.se", 3, 4, 6, 3)),
    "timm regnety_008": Case(_of_timm("regnety_008"), [
        [f"s{s}.b{i}.conv3" for i in range(1, n + 1)] for s, n in ((1, 1), (2, 3), (3, 8), (4, 2))
    ]),
    "timm hrnet_w18_small": Case(_of_timm("hrnet_w18_small"), HRNET),
    "pytorchcv resnet164bn": Case(
        lambda: get_model("resnet164bn_cifar10"),
        [[f"features.stage{s}.unit{u}.body" for u in range(1, 19)] for s in (1, 2, 3)],
        (2, 3, 32, 32),
    ),
    "pytorchcv preresnet20": Case(
        lambda: get_model("preresnet20_cifar10"),
        [[f"features.stage{s}.unit{u}.body.conv2" for u in range(1, 4)] for s in (1, 2, 3)],
        (2, 3, 32, 32),
    ),
    "MONAI resnet18 in 3-D": Case(
        lambda: monai.resnet18(spatial_dims=3, n_input_channels=1, num_classes=4, shortcut_type="B"),
        _blocks("layer{s}.{i}.bn2", 2, 2, 2, 2),
        (2, 1, 24, 24, 24),
    ),
    "MONAI SegResNet": Case(
        lambda: monai.SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=2),
        [
            *([f"down_layers.{s}.{i}.conv2" for i in range(1, n + 1)] for s, n in enumerate((1, 2, 2, 4))),
            *([f"up_layers.{s}.0.conv2"] for s in range(3)),
        ],
        (1, 1, 16, 16, 16),
        {"reduction": 4},
    ),
    "segmentation_models_pytorch U-Net": Case(
        lambda: segmentation_models_pytorch.Unet("resnet34", encoder_weights=None),
        _blocks("encoder.layer{s}.{i}.bn2", 3, 4, 6, 3),
    ),
}  # fmt: skip


def made(case: Case) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    options = {"reduction": 16, **(case.options or {})}
    return pair(case.make().double(), case.places, lambda model: sharing.share_attention(model, "lstm", **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_as_with_hooks(name):
    """Results in evaluation and in training; gradients; and the norms' buffers."""
    case = CASES[name]
    shared, hooked = made(case)
    x = _images(*case.shape)
    assert [len(stage.blocks) for stage in sharing.report(shared).stages] == [len(names) for names in case.places]
    with torch.no_grad():
        assert_same(shared, hooked, lambda model: model(x), training=False)
    assert_same(shared, hooked, lambda model: model(x), training=True)


def test_refused():
    """ViT has no place that is known; blocks with MONAI's shortcut of type "A" cannot be traced."""
    with torch.device("meta"):
        vit = vision.vit_b_16()
    with pytest.raises(sharing.SharingError, match=r"encoder_layer_11: 2 tails in one block, as in transformers"):
        sharing.share_attention(vit)
    network = monai.resnet18(spatial_dims=3, n_input_channels=1, shortcut_type="A")
    with pytest.raises(
        sharing.SharingError, match=r"layer4.0: cannot be traced .* ResNetBlock can: .* give an adapter"
    ):
        sharing.share_attention(network)
