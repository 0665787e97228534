"""Backbones: where the blocks go, and that a stock network and its checkpoints live on in them."""

from __future__ import annotations

import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.config import LazyCall, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import ResNet, build_backbone, build_model
from detectron2.modeling.backbone import BasicStem
from torch import nn
from torch.testing import assert_close

from nl_detectron import NonLocalResNet, insert_non_local_blocks
from nl_detectron.config import without_blocks
from nl_detectron.non_local import find_blocks

# Paper Sec. 5.1 and 6, released code and GluonCV for R-101; index i is "after residual block i".
PRESETS = {
    (50, 1): {"RES4": (-2,)},
    (50, 5): {"RES3": (1, 3), "RES4": (1, 3, 5)},
    (50, 10): {"RES3": (0, 1, 2, 3), "RES4": (0, 1, 2, 3, 4, 5)},
    (101, 1): {"RES4": (-2,)},
    (101, 5): {"RES3": (1, 3), "RES4": (6, 13, 20)},
    (101, 10): {"RES3": (0, 1, 2, 3), "RES4": (2, 6, 10, 14, 18, 22)},
}
presets = pytest.mark.parametrize("preset", PRESETS, ids=lambda p: f"R{p[0]}-{p[1]}")
BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}
BLOCKS[152] = [3, 8, 36, 3]


def set_blocks(cfg, after_blocks):
    for stage in cfg.MODEL.NON_LOCAL.AFTER_BLOCKS:
        cfg.MODEL.NON_LOCAL.AFTER_BLOCKS[stage] = after_blocks.get(stage, ())


def make_resnet(depth=50, **kwargs):
    """A small ResNet from detectron2's own parts."""
    stages = ResNet.make_default_stages(depth, norm="BN")
    return ResNet(BasicStem(), stages, **kwargs)


def with_random_statistics(model):
    """A network as a checkpoint may hold it: FrozenBN's buffers are not 0 and 1."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(1, 2)
    return model


@pytest.fixture
def nl_cfg(small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
    return small_cfg


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152, "X101", "X152"])
def test_default_is_right_before_the_last_block_of_res4(cfg, depth):
    if isinstance(depth, str):  # ResNeXt 32x8d
        depth = int(depth[1:])
        cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32, 8
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_backbone"
    with torch.device("meta"):
        resnet, stock = build_backbone(cfg), build_backbone(without_blocks(cfg))
    last = BLOCKS[depth][2] - 1
    order = [*map(str, range(last)), f"non_local{last - 1}", str(last)]
    assert [name for name, _ in resnet.res4.named_children()] == order
    assert list(find_blocks(resnet)) == [f"res4.non_local{last - 1}"]
    assert resnet.output_shape() == stock.output_shape()
    ours, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (resnet, stock))
    assert {k: v for k, v in ours.items() if ".non_local" not in k} == expected
    channels = 256 if depth < 50 else 1024
    assert ours[f"res4.non_local{last - 1}.theta.weight"] == (channels // 2, channels, 1, 1)


@presets
def test_presets_are_the_stock_network_when_new(cfg, nl_cfg, preset):
    nl_cfg.MODEL.RESNETS.DEPTH = preset[0]
    set_blocks(nl_cfg, PRESETS[preset])
    stock = with_random_statistics(build_backbone(without_blocks(nl_cfg))).eval()
    ours = build_backbone(nl_cfg).eval()
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert unexpected == []
    assert all(".non_local" in key for key in missing)
    assert len(find_blocks(ours)) == preset[1]
    for stage, indices in PRESETS[preset].items():
        number = BLOCKS[preset[0]][int(stage[-1]) - 2]
        order = [*map(str, range(number))]
        for i in sorted((i % number for i in indices), reverse=True):
            order.insert(i + 1, f"non_local{i}")
        children = getattr(ours.bottom_up, stage.lower()).named_children()
        assert [name for name, _ in children] == order
    x = torch.randn(1, 3, 64, 96)
    expected, got = stock(x), ours(x)
    assert list(got) == list(expected)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_block_is_applied_to_the_output_of_its_residual_block():
    resnet = make_resnet(18).eval()
    insert_non_local_blocks(resnet, {"res4": [-2]}, subsample=2)
    first, block, second = resnet.res4.children()
    nn.init.normal_(block.conv_out.weight)
    x = torch.randn(1, 128, 5, 7)
    assert_close(resnet.res4(x), second(block(first(x))))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("build_non_local_resnet_backbone", ["res4"]),
        ("build_non_local_resnet_fpn_backbone", ["res2", "res3", "res4", "res5"]),
        ("build_non_local_retinanet_resnet_fpn_backbone", ["res3", "res4", "res5"]),
    ],
)
def test_builders(small_cfg, name, stages):
    cfg = small_cfg
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = stages
    ours, stock = build_backbone(cfg), build_backbone(without_blocks(cfg))
    assert type(ours) is type(stock)
    assert ours.output_shape() == stock.output_shape()
    assert ours.size_divisibility == stock.size_divisibility
    prefix = "bottom_up." if "fpn" in name else ""
    assert list(find_blocks(ours)) == [f"{prefix}res4.non_local4"]


def c2_name(key):
    """The name that Caffe2 gives to a key of detectron2's ResNet."""
    for ours, c2 in [
        ("stem.conv1.norm.", "res_conv1_norm."),
        ("stem.conv1.", "conv1_"),
        (".shortcut.", ".branch1."),
        (".conv1.", ".branch2a."),
        (".conv2.", ".branch2b."),
        (".conv3.", ".branch2c."),
        ("norm.weight", "bn.s"),
        ("norm.running_mean", "bn.rm"),
        ("norm.running_var", "bn.riv"),
        ("norm.", "bn."),
        ("weight", "w"),
        ("bias", "b"),
    ]:
        key = key.replace(ours, c2)
    return key.replace(".", "_")


@pytest.mark.parametrize("dialect", ["pth", "caffe2"])
@presets
def test_stock_checkpoints_load_by_name(nl_cfg, preset, dialect, tmp_path):
    """As ImageNet weights do: a file of the bare ResNet, matched to a whole detector's backbone."""
    nl_cfg.MODEL.MASK_ON = nl_cfg.MODEL.KEYPOINT_ON = False
    nl_cfg.MODEL.RESNETS.DEPTH = preset[0]
    set_blocks(nl_cfg, PRESETS[preset])
    stock_cfg = without_blocks(nl_cfg)
    stock_cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    weights = with_random_statistics(build_backbone(stock_cfg)).state_dict()
    if dialect == "pth":
        path = tmp_path / "weights.pth"
        torch.save({"model": weights, "matching_heuristics": True}, path)
    else:
        names = {c2_name(key): key for key in weights}
        assert convert_basic_c2_names(list(names)) == list(names.values())
        arrays = {name: weights[key].numpy() for name, key in names.items()}
        path = tmp_path / "weights.pkl"
        path.write_bytes(
            pickle.dumps({"model": arrays, "__author__": "Caffe2", "matching_heuristics": True})
        )

    model = build_model(nl_cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    DetectionCheckpointer(model).load(str(path))
    after = model.state_dict()
    prefix = "backbone.bottom_up."
    for key in after:
        expected = weights.get(key[len(prefix) :]) if key.startswith(prefix) else None
        assert (expected is None) == (not key.startswith(prefix) or ".non_local" in key)
        assert torch.equal(after[key], before[key] if expected is None else expected), key


def test_resnet_for_lazy_configs():
    resnet = LazyCall(ResNet)(
        stem=LazyCall(BasicStem)(norm="BN"),
        stages=LazyCall(ResNet.make_default_stages)(depth=18, norm="BN"),
        out_features=["res3", "res4"],
    )
    stock = instantiate(resnet)
    resnet._target_ = NonLocalResNet
    resnet.after_blocks = {"res4": [-2]}
    ours = instantiate(resnet)
    assert list(find_blocks(ours)) == ["res4.non_local0"]
    assert ours.res4.non_local0.subsample == 1
    assert set(stock.state_dict()) < set(ours.state_dict())
    resnet.after_blocks = {"res3": [0, 1]}
    resnet.block_options = {"subsample": 2, "pairwise": "gaussian"}
    ours = instantiate(resnet)
    assert list(find_blocks(ours)) == ["res3.non_local0", "res3.non_local1"]
    assert ours.res3.non_local1.subsample == 2
    assert ours.res3.non_local1.pairwise == "gaussian"
    assert ours.output_shape() == stock.output_shape()


@pytest.mark.parametrize("freeze_at", [0, 2, 3])
def test_blocks_train_behind_a_frozen_stage(nl_cfg, freeze_at):
    nl_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    set_blocks(nl_cfg, {"RES4": (0,), "RES5": (-1,)})
    bottom_up = build_backbone(nl_cfg).bottom_up
    for name, parameter in bottom_up.named_parameters():
        frozen = name.startswith(tuple(["stem", "res2", "res3"][:freeze_at]) or "-")
        assert parameter.requires_grad == (not frozen), name


@pytest.mark.parametrize("norm", ["", "BN"])
def test_blocks_learn_in_a_frozen_network(nl_cfg, norm):
    """In a frozen trunk all parameters of the blocks learn, and no others."""
    nl_cfg.MODEL.BACKBONE.FREEZE_AT = 5
    nl_cfg.MODEL.NON_LOCAL.NORM = norm
    set_blocks(nl_cfg, {"RES2": (0,), "RES4": (-2,)})
    bottom_up = build_backbone(nl_cfg).bottom_up.train()
    optimizer = torch.optim.SGD([p for p in bottom_up.parameters() if p.requires_grad], lr=0.1)
    before = {name: t.clone() for name, t in bottom_up.named_parameters()}
    # res5 of one image is 2 x 3, the blocks' largest map 16 x 24.
    x = torch.randn(2, 3, 64, 96)
    for _ in range(3):  # first the output convolution, or its norm; then what lies before it
        optimizer.zero_grad()
        bottom_up(x)["res5"].square().sum().backward()
        for parameter in bottom_up.parameters():
            if parameter.grad is not None:
                parameter.grad /= parameter.grad.norm() + 1e-30
        optimizer.step()
    # What a norm subtracts again, and what all keys' affinities share, has no gradient.
    idle = {"phi.bias"} | ({"conv_out.bias"} if norm else set())
    for name, parameter in bottom_up.named_parameters():
        if not name.endswith(tuple(idle)):
            assert torch.equal(parameter, before[name]) == (".non_local" not in name), name


def test_freezing_a_stage_freezes_the_blocks_in_it():
    resnet = make_resnet(18)
    insert_non_local_blocks(resnet, {"res3": [0], "res4": [0]}, norm="BN")
    resnet.freeze(3)
    assert not any(p.requires_grad for p in resnet.res3.parameters())
    assert isinstance(resnet.res3.non_local0.norm, FrozenBatchNorm2d)
    assert all(p.requires_grad for p in resnet.res4.non_local0.parameters())


@pytest.mark.parametrize("where", [{"device": "meta"}, {"dtype": torch.float64}], ids=str)
def test_blocks_follow_device_and_dtype_of_their_stage(where):
    resnet = make_resnet(18).to(**where)
    insert_non_local_blocks(resnet, {"res4": [0]}, norm="BN")
    for tensor in resnet.res4.non_local0.parameters():
        assert (tensor.device, tensor.dtype) == (
            resnet.res4[0].conv1.weight.device,
            resnet.res4[0].conv1.weight.dtype,
        )


def test_no_blocks_is_the_stock_network():
    resnet, keys = make_resnet(18), set(make_resnet(18).state_dict())
    insert_non_local_blocks(resnet, {"res3": [], "res4": ()})
    assert set(resnet.state_dict()) == keys


@pytest.mark.parametrize(
    ("after_blocks", "message"),
    [
        ({"res6": [0]}, r"'res6' .*AFTER_BLOCKS.RES6.*it has \['res2', 'res3', 'res4'\]"),
        ({"res5": [0]}, r"'res5' .*no such stage; it has \['res2', 'res3', 'res4'\]. .*not built"),
        ({"stem": [0]}, "'stem' .*no such stage"),
        ({"res4": [2]}, r"'res4' .*AFTER_BLOCKS.RES4.*2 residual blocks.*\[-2, 1\], got \[2\]"),
        ({"res4": [0, -3]}, r"\[-2, 1\], got \[-3\]"),
        ({"res4": [1, 1]}, r"more than one non-local block after block 1, got \[1, 1\]"),
        ({"res4": [0, -2]}, r"more than one non-local block after block 0, got \[0, -2\]"),
    ],
    ids=str,
)
def test_wrong_places(after_blocks, message):
    resnet = make_resnet(18, out_features=["res4"], freeze_at=2)
    with pytest.raises(ValueError, match=message):
        insert_non_local_blocks(resnet, after_blocks)
    assert not find_blocks(resnet)


def test_second_insertion():
    resnet = make_resnet(18)
    insert_non_local_blocks(resnet, {"res4": [0]})
    with pytest.raises(ValueError, match=r"more than one non-local block after block 0, got \[0\]"):
        insert_non_local_blocks(resnet, {"res4": [0]})
    insert_non_local_blocks(resnet, {"res4": [1]})  # indices count residual blocks alone
    assert [n for n, _ in resnet.res4.named_children()] == ["0", "non_local0", "1", "non_local1"]


def test_input_shape_reaches_the_stock_builder(nl_cfg):
    backbone = build_backbone(nl_cfg, ShapeSpec(channels=5))
    assert backbone.bottom_up.stem.conv1.weight.shape[1] == 5
