"""Blocks in networks other than detectron2's ResNet: RegNet, 3-D networks, torchvision's."""

from __future__ import annotations

import functools

import pytest
import torch
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from torch import nn
from torch.testing import assert_close
from torchvision import models

from nl_detectron import NonLocalBlock, insert_non_local_blocks
from nl_detectron.config import backbone_options
from nl_detectron.non_local import find_blocks
from tests import oracles


def test_regnet():
    make = functools.partial(
        RegNet,
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=13,
        w_a=27.89,
        w_0=24,
        w_m=2.09,
        group_width=8,
        out_features=["s3", "s4"],
    )
    stock, ours = make().eval(), make().eval()
    insert_non_local_blocks(ours, {"s3": [-2], "s4": [0]}, subsample=2)
    last = len(list(stock.s3.children()))
    names = [name for name, _ in ours.s3.named_children()]
    assert names[-3:] == [f"b{last - 1}", f"non_local{last - 2}", f"b{last}"]
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert unexpected == []
    assert all(".non_local" in key for key in missing)
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(ours(x)[k], v) for k, v in stock(x).items())


class Block3d(CNNBlockBase):
    """A residual block of a video network; strides are those of space."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__(in_channels, out_channels, stride)
        self.conv = nn.Conv3d(in_channels, out_channels, 3, (1, stride, stride), padding=1)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1, (1, stride, stride))

    def forward(self, x):
        return (self.conv(x) + self.shortcut(x)).relu()


class ResNet3d(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.res3 = nn.Sequential(Block3d(3, 6, 2), Block3d(6, 6, 1))
        self.res4 = nn.Sequential(Block3d(6, 10, 2), Block3d(10, 10, 1))


@pytest.mark.parametrize(("axes", "subsample"), [("spacetime", 2), ("space", 2), ("time", 1)])
def test_3d_network(cfg, axes, subsample):
    node = cfg.MODEL.NON_LOCAL
    node.DIM, node.AXES, node.SUBSAMPLE, node.AFTER_BLOCKS.RES3 = 3, axes, subsample, (-1,)
    network, clip = ResNet3d().double(), torch.randn(2, 3, 5, 14, 22).double()
    stock = network(clip)
    insert_non_local_blocks(network, **backbone_options(cfg))
    assert torch.equal(network(clip), stock)
    x = clip
    for name in ("res3.0", "res3.1", "res3.non_local1", "res4.0", "res4.non_local0", "res4.1"):
        module = network.get_submodule(name)
        if isinstance(module, NonLocalBlock):
            nn.init.normal_(module.conv_out.weight)
            options = {"subsample": subsample, "axes": axes}
            x = oracles.block(x, module.state_dict(), "embedded_gaussian", **options)
        else:
            x = module(x)
    assert_close(network(clip), x)


def test_options_of_a_stage(cfg):
    node = cfg.MODEL.NON_LOCAL
    node.DIM, node.AFTER_BLOCKS.RES3, node.GROUP_FRAMES = 3, (0, 1), 5
    node.STAGE_OPTIONS.RES3 = ("GROUP_FRAMES", 2, "PAIRWISE", "gaussian", "NORM", "BN")
    network = ResNet3d()
    insert_non_local_blocks(network, **backbone_options(cfg))
    got = {
        name: (block.group_frames, block.pairwise, bool(block.norm), block.subsample)
        for name, block in find_blocks(network).items()
    }
    own, common = (2, "gaussian", True, 2), (5, "embedded_gaussian", False, 2)
    res3 = dict.fromkeys(("res3.non_local0", "res3.non_local1"), own)
    assert got == {**res3, "res4.non_local0": common}


@pytest.mark.parametrize(
    "network", [models.video.r3d_18, models.video.r2plus1d_18, models.resnet50]
)
def test_networks_of_torchvision(network):
    torch.manual_seed(0)
    stock = network().eval()
    torch.manual_seed(0)
    ours, dim = network().eval(), 2 if network is models.resnet50 else 3
    options = {"layer2": {"pairwise": "gaussian"}} | (
        {"layer3": {"group_frames": 1}} if dim > 2 else {}
    )
    insert_non_local_blocks(
        ours, {"layer2": [-1], "layer3": [-2, 1]}, options, dim=dim, subsample=2
    )
    keys = [key for key in ours.state_dict() if ".non_local" not in key]
    assert keys == list(stock.state_dict())
    clip = torch.randn(1, 3, 4, 32, 32)[:, :, *[0] * (3 - dim)]
    assert torch.equal(ours(clip), stock(clip))
    place = "layer2.non_local1" if dim == 3 else "layer2.non_local3"
    assert ours.get_submodule(place).pairwise == "gaussian"
    nn.init.normal_(ours.get_submodule(place).conv_out.weight)
    assert not torch.equal(ours(clip), stock(clip))


class ResStage(nn.Module):
    """A stage of pytorchvideo's."""

    def __init__(self):
        super().__init__()
        self.res_blocks = nn.ModuleList([Block3d(3, 6, 2), Block3d(6, 6, 1), Block3d(6, 6, 1)])

    def forward(self, x):
        for block in self.res_blocks:
            x = block(x)
        return x


def test_module_list():
    """A block of weights other than zero runs in its place, and not again elsewhere."""
    stage, clip = ResStage().double(), torch.randn(2, 3, 5, 14, 22).double()
    keys, expected = list(stage.state_dict()), stage(clip)
    insert_non_local_blocks(stage, {"res_blocks": [-2]}, dim=3, subsample=2)
    assert [key for key in stage.state_dict() if ".non_local1." not in key] == keys
    assert torch.equal(stage(clip), expected)
    blocks = stage.res_blocks
    block = blocks.get_submodule("non_local1")
    nn.init.normal_(block.conv_out.weight)
    between = blocks[1](blocks[0](clip))
    between = oracles.block(between, block.state_dict(), "embedded_gaussian", subsample=2)
    assert_close(stage(clip), blocks[2](between))


def test_stage_without_convolutions():
    network = nn.Sequential()
    network.stage = nn.Sequential(nn.Linear(5, 7), nn.ReLU())
    with pytest.raises(ValueError, match="Linear has no convolution .* give in_channels"):
        insert_non_local_blocks(network, {"stage": [0]})
    insert_non_local_blocks(network, {"stage": [0]}, in_channels=7, dim=1)
    assert network.stage.non_local0.g.in_channels == 7


@pytest.mark.parametrize(
    ("make", "dim", "own"), [(models.resnet50, 3, 2), (models.resnet50, 4, 2), (ResNet3d, 2, 3)]
)
def test_wrong_dimension(make, dim, own):
    network = make()
    stages = ("res3", "res4") if make is ResNet3d else ("layer2", "layer3")
    with pytest.raises(ValueError, match=f"MODEL.NON_LOCAL.DIM.* must be {own}, .*got {dim}"):
        insert_non_local_blocks(network, dict.fromkeys(stages, [0]), dim=dim)
    assert not find_blocks(network)
