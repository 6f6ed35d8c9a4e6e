"""``share_attention`` with attention that changes nothing, on many networks: each has to compute what it did before.

Whatever the rewriting forgets, calls twice or puts in the wrong order shows here, whoever wrote the network.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision.models as vision
from hooked import tensors
from torch import Tensor, nn

from dia_kernels import sharing
from dia_kernels.sharing import SharingError, share_attention

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

#: Blocks and stages that are found; of other networks of the family as many as their depths say.
VISION = {
    "convnext_tiny": (18, 4), "efficientnet_b0": (9, 5), "efficientnet_v2_s": (35, 6), "mnasnet0_5": (10, 5),
    "mobilenet_v2": (10, 5), "mobilenet_v3_large": (10, 6), "regnet_x_400mf": (22, 4), "regnet_y_800mf": (14, 4),
    "resnet34": (16, 4), "resnext50_32x4d": (16, 4), "wide_resnet50_2": (16, 4),
}  # fmt: skip
TIMM = {
    "cs3darknet_focus_s": None, "convnextv2_atto": None, "darknet53": None, "dla34": (6, 6), "eca_nfnet_l0": None,
    "edgenext_xx_small": None, "efficientnet_es": None, "fbnetc_100": None, "gcresnet33ts": (10, 4),
    "hardcorenas_a": None, "hrnet_w18_small": (23, 14), "mixnet_s": None,
    "mobilenetv4_conv_small": None, "nf_ecaresnet26": (8, 4), "nf_resnet26": None, "regnetv_040": None,
    "regnety_008": (14, 4), "repvgg_a0": None, "res2net50_14w_8s": None, "resnest14d": (4, 4), "resnet26t": None,
    "resnetrs50": None, "resnetv2_50d_gn": None, "seresnet33ts": None, "skresnet18": (8, 4), "spnasnet_100": None,
    "tinynet_e": None, "xception41": None,
}  # fmt: skip
REFUSED = {
    "densenet121": "found no residual blocks",
    "dpn68": "come out of one tuple",
    "ghostnet_050": "nothing tells how many channels",
    "mixer_s32_224": "one of its tails cannot join",
    "rexnet_100": "nothing tells how many channels",
    "vgg11": "found no residual blocks",
    "vit_tiny_patch16_224": "2 tails in one block",
}


class Transparent(nn.Module):
    """Attention whose scale is one, for C channels; the state counts the calls."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(
        self, x, state=None, *, shortcut=None, activation=None, inplace=False, norm=None, sample_scale=None
    ) -> tuple[Tensor, int]:
        y = x if norm is None else norm(x)
        assert self.channels in (y.shape[1], y.shape[-1])
        if sample_scale is not None:
            y = y * sample_scale.view(-1, *(1,) * (y.ndim - 1))
        if shortcut is not None:
            assert shortcut.shape == y.shape
            y = y + shortcut
        return torch.relu(y) if activation == "relu" else y, (0 if state is None else state) + 1


def assert_unchanged(model: nn.Module, found: tuple[int, int] | None) -> None:
    model = model.double()
    shared = share_attention(copy.deepcopy(model), Transparent)
    report = sharing.report(shared)
    assert report.blocks > 0
    if found is not None:
        assert (report.blocks, len(report.stages)) == found
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        results = []
        for network in (model, shared):
            torch.manual_seed(1)
            with torch.no_grad():
                results.append(tensors(network.train(training)(x)))
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    buffers = dict(shared.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, msg=name)


@pytest.mark.parametrize("name", VISION)
def test_torchvision(name):
    assert_unchanged(vision.get_model(name, weights=None), VISION[name])


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    assert_unchanged(timm.create_model(name), TIMM[name])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(SharingError, match=REFUSED[name]):
        share_attention(timm.create_model(name), Transparent)
