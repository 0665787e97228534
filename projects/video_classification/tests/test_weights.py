"""Checkpoints of other video libraries: the same logits or the same keys, both ways."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close
from video_classification.config import default_video_config

from nl_detectron.weights import DIALECTS, convert, report

# Modules of a network with one residual block in each of res2 and res3, and a non-local block after
# the latter; then those of other libraries in the same order, from their sources.
OURS = """
backbone.stem.conv1 backbone.stem.conv1.norm
backbone.res2.0.shortcut backbone.res2.0.shortcut.norm backbone.res2.0.conv1
backbone.res2.0.conv1.norm backbone.res2.0.conv2 backbone.res2.0.conv2.norm
backbone.res2.0.conv3 backbone.res2.0.conv3.norm
backbone.res3.0.shortcut backbone.res3.0.shortcut.norm backbone.res3.0.conv1
backbone.res3.0.conv1.norm backbone.res3.0.conv2 backbone.res3.0.conv2.norm
backbone.res3.0.conv3 backbone.res3.0.conv3.norm
backbone.res3.non_local0.theta backbone.res3.non_local0.phi backbone.res3.non_local0.g
backbone.res3.non_local0.conv_out backbone.res3.non_local0.norm head.linear
"""
THEIRS = {
    "slowfast": """
s1.pathway0_stem.conv s1.pathway0_stem.bn
s2.pathway0_res0.branch1 s2.pathway0_res0.branch1_bn s2.pathway0_res0.branch2.a
s2.pathway0_res0.branch2.a_bn s2.pathway0_res0.branch2.b s2.pathway0_res0.branch2.b_bn
s2.pathway0_res0.branch2.c s2.pathway0_res0.branch2.c_bn
s3.pathway0_res0.branch1 s3.pathway0_res0.branch1_bn s3.pathway0_res0.branch2.a
s3.pathway0_res0.branch2.a_bn s3.pathway0_res0.branch2.b s3.pathway0_res0.branch2.b_bn
s3.pathway0_res0.branch2.c s3.pathway0_res0.branch2.c_bn
s3.pathway0_nonlocal0.conv_theta s3.pathway0_nonlocal0.conv_phi s3.pathway0_nonlocal0.conv_g
s3.pathway0_nonlocal0.conv_out s3.pathway0_nonlocal0.bn head.projection
""",
    "mmcv": """
backbone.conv1.conv backbone.conv1.bn
backbone.layer1.0.downsample.conv backbone.layer1.0.downsample.bn backbone.layer1.0.conv1.conv
backbone.layer1.0.conv1.bn backbone.layer1.0.conv2.conv backbone.layer1.0.conv2.bn
backbone.layer1.0.conv3.conv backbone.layer1.0.conv3.bn
backbone.layer2.0.downsample.conv backbone.layer2.0.downsample.bn backbone.layer2.0.conv1.conv
backbone.layer2.0.conv1.bn backbone.layer2.0.conv2.conv backbone.layer2.0.conv2.bn
backbone.layer2.0.conv3.conv backbone.layer2.0.conv3.bn
backbone.layer2.0.non_local_block.theta.conv backbone.layer2.0.non_local_block.phi.0.conv
backbone.layer2.0.non_local_block.g.0.conv backbone.layer2.0.non_local_block.conv_out.conv
backbone.layer2.0.non_local_block.conv_out.bn cls_head.fc_cls
""",
    "mmaction2_tsm": """
backbone.conv1.conv backbone.conv1.bn
backbone.layer1.0.downsample.conv backbone.layer1.0.downsample.bn backbone.layer1.0.conv1.conv.net
backbone.layer1.0.conv1.bn backbone.layer1.0.conv2.conv backbone.layer1.0.conv2.bn
backbone.layer1.0.conv3.conv backbone.layer1.0.conv3.bn
backbone.layer2.0.block.downsample.conv backbone.layer2.0.block.downsample.bn
backbone.layer2.0.block.conv1.conv.net backbone.layer2.0.block.conv1.bn
backbone.layer2.0.block.conv2.conv backbone.layer2.0.block.conv2.bn
backbone.layer2.0.block.conv3.conv backbone.layer2.0.block.conv3.bn
backbone.layer2.0.non_local_block.theta.conv backbone.layer2.0.non_local_block.phi.0.conv
backbone.layer2.0.non_local_block.g.0.conv backbone.layer2.0.non_local_block.conv_out.conv
backbone.layer2.0.non_local_block.conv_out.bn cls_head.fc_cls
""",
    "tsm": """
base_model.conv1 base_model.bn1
base_model.layer1.0.downsample.0 base_model.layer1.0.downsample.1 base_model.layer1.0.conv1.net
base_model.layer1.0.bn1 base_model.layer1.0.conv2 base_model.layer1.0.bn2
base_model.layer1.0.conv3 base_model.layer1.0.bn3
base_model.layer2.0.block.downsample.0 base_model.layer2.0.block.downsample.1
base_model.layer2.0.block.conv1.net base_model.layer2.0.block.bn1
base_model.layer2.0.block.conv2 base_model.layer2.0.block.bn2
base_model.layer2.0.block.conv3 base_model.layer2.0.block.bn3
base_model.layer2.0.nl.theta base_model.layer2.0.nl.phi.0 base_model.layer2.0.nl.g.0
base_model.layer2.0.nl.W.0 base_model.layer2.0.nl.W.1 new_fc
""",
    "caffe2": """
conv1 res_conv1_bn
res2_0_branch1 res2_0_branch1_bn res2_0_branch2a res2_0_branch2a_bn res2_0_branch2b
res2_0_branch2b_bn res2_0_branch2c res2_0_branch2c_bn
res3_0_branch1 res3_0_branch1_bn res3_0_branch2a res3_0_branch2a_bn res3_0_branch2b
res3_0_branch2b_bn res3_0_branch2c res3_0_branch2c_bn
nonlocal_conv3_0_theta nonlocal_conv3_0_phi nonlocal_conv3_0_g nonlocal_conv3_0_out
nonlocal_conv3_0_bn pred
""",
}
NORM = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}  # in Caffe2
IMAGES = ("tsm", "mmaction2_tsm")  # their ResNets have 2-D convolutions


def theirs_of(state, dialect):
    """The state dict of our network as the other library has it."""
    modules = dict(zip(OURS.split(), THEIRS[dialect].split(), strict=True))
    theirs = {}
    for key, tensor in state.items():
        module, name = key.rsplit(".", 1)
        if dialect == "caffe2":
            if name == "num_batches_tracked":
                continue
            short = NORM[name] if module.endswith("norm") else name[0]
            new = f"{modules[module]}_{short}"
        else:
            new = "module." * (dialect == "tsm") + f"{modules[module]}.{name}"
        if dialect in IMAGES and tensor.dim() == 5 and "non_local" not in key:
            tensor = tensor.squeeze(2)
        theirs[new] = tensor
    if dialect in ("mmcv", "mmaction2_tsm"):  # no bias before a norm
        assert not theirs.pop("backbone.layer2.0.non_local_block.conv_out.conv.bias").any()
    return theirs


@pytest.fixture
def network(video_cfg, randomize):
    """The state dict of an I3D, or of a network whose convolutions see one frame."""

    def network(inflate):
        video_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet3d_backbone"
        video_cfg.MODEL.RESNETS.OUT_FEATURES = ["res3"]
        video_cfg.MODEL.VIDEO.NUM_BLOCKS, video_cfg.MODEL.VIDEO.INFLATE = (1, 1), inflate
        video_cfg.MODEL.VIDEO.STEM_KERNEL = (5 if inflate else 1, 7, 7)
        video_cfg.MODEL.NON_LOCAL.AFTER_BLOCKS = CfgNode(
            {"RES2": (), "RES3": (0,), "RES4": (), "RES5": ()}
        )
        state = randomize(build_model(video_cfg)).state_dict()
        state["backbone.res3.non_local0.conv_out.bias"].zero_()
        return state

    return network


def options(dialect):
    """Of the blocks, as the dialect has them, so that no weight is rescaled."""
    fixed = DIALECTS[dialect].fixed
    return {"pairwise": "embedded_gaussian", "subsample": 2, "scale": fixed.get("scale", False)}


CASES = [(name, inflate) for name in THEIRS for inflate in ("", "3x1x1", "3x3x3")]


@pytest.mark.parametrize(
    ("dialect", "inflate"), [case for case in CASES if not (case[0] in IMAGES and case[1])]
)
def test_every_key_both_ways(dialect, inflate, network):
    state = network(inflate)
    theirs = theirs_of(state, dialect)
    there = convert(state, "nl_detectron", dialect, lambda name: options(dialect))
    assert_close(there.state, theirs, rtol=0, atol=0)
    assert set(there.mapped) | set(there.dropped) == set(state)
    back = convert(theirs, dialect, "nl_detectron", lambda name: options(dialect))
    assert not back.dropped
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    expected = {k: v for k, v in state.items() if dialect != "caffe2" or k not in counters}
    assert_close(back.state, expected, rtol=0, atol=0)
    assert back.video["MODEL.VIDEO.INFLATE"] == inflate
    assert list(back.blocks) == ["backbone.res3.non_local0"]


def configured(result):
    """Our model, with the converted weights and what the report says of its config."""
    cfg = default_video_config()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "VideoClassifier", "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_resnet3d_backbone", 0
    for key, value in result.video.items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [1.0] * 3
    model = build_model(cfg).eval()
    model.load_state_dict(result.state)
    return model


def random_clips(frames):
    """Two clips, which differ in their colors, so that the mean over a map does not hide it."""
    return 2 * torch.randn(2, 3, 1, 1, 1) + torch.randn(2, 3, frames, 64, 64)


def logits_of_trained(model, last, x):
    """Logits around 1 of two clips, by the model as after training."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            if name.endswith(("running_var", "weight")):
                nn.init.uniform_(tensor, 0.5, 1.5)
            else:
                nn.init.normal_(tensor, std=0.1)
    last.weight /= model.eval()(x).std()
    logits = model(x)
    assert (logits[0] - logits[1]).abs().max() > 0.1
    return logits


@pytest.mark.parametrize("name", ["c2d_r50", "i3d_r50"])
@torch.no_grad()
def test_pytorchvideo(name):
    hub = pytest.importorskip(
        "pytorchvideo.models.hub", reason="make peers installs it", exc_type=ImportError
    )
    # Its head averages windows of 7 x 7, which are the whole map at 224 x 224.
    theirs = getattr(hub, name)(head_pool_kernel_size=(4, 2, 2))
    clips = random_clips(8)
    expected = logits_of_trained(theirs, theirs.blocks[6].proj, clips)
    state = theirs.state_dict()
    result = convert(state, "pytorchvideo", "nl_detectron")
    assert_close(configured(result)(clips), expected, rtol=1e-5, atol=1e-5)
    back = convert(result.state, "nl_detectron", "pytorchvideo")
    assert_close(back.state, dict(state), rtol=0, atol=0)


class Shift(nn.Module):
    """TSM's wrapper of a convolution: clips are one batch of their frames."""

    def __init__(self, net, frames):
        super().__init__()
        self.net, self.frames = net, frames

    def forward(self, x):
        clips = x.unflatten(0, (-1, self.frames))
        n, y = clips.shape[2] // 8, torch.zeros_like(clips)
        for t in range(self.frames):
            if t + 1 < self.frames:
                y[:, t, :n] = clips[:, t + 1, :n]
            if t > 0:
                y[:, t, n : 2 * n] = clips[:, t - 1, n : 2 * n]
            y[:, t, 2 * n :] = clips[:, t, 2 * n :]
        return self.net(y.flatten(0, 1))


class TemporalPool(nn.Module):
    """TSM's wrapper of layer2: the largest of frames 2t - 1, 2t and 2t + 1."""

    def __init__(self, net, frames):
        super().__init__()
        self.net, self.frames = net, frames

    def forward(self, x):
        clips = x.unflatten(0, (-1, self.frames))
        pooled = [
            torch.stack([clips[:, t] for t in range(2 * i - 1, 2 * i + 2) if t >= 0]).amax(0)
            for i in range(self.frames // 2)
        ]
        return self.net(torch.stack(pooled, 1).flatten(0, 1))


class Mean(nn.Module):
    """TSM's consensus of the frames."""

    def forward(self, x):
        return x.mean(1)


@pytest.mark.parametrize(
    ("blocks", "every", "pooling"),
    [
        ((1, 2, 2, 1), 1, "space"),
        ((1, 2, 2, 1), 1, "tsm_temporal_pool"),
        ((1, 1, 23, 2), 2, "space"),
    ],
)
@torch.no_grad()
def test_tsm(blocks, every, pooling):
    """torchvision's ResNet with shifts in place, and the mean of the logits of all frames."""
    frames, resnet = 6, torchvision.models.resnet
    after = frames if pooling == "space" else frames // 2
    base = resnet.ResNet(resnet.Bottleneck, list(blocks), width_per_group=8, num_classes=7)
    for stage in (base.layer1, base.layer2, base.layer3, base.layer4):
        for block in list(stage)[::every]:
            block.conv1 = Shift(block.conv1, frames if stage is base.layer1 else after)
    if pooling != "space":
        base.layer2 = TemporalPool(base.layer2, frames)
    clips = random_clips(frames)
    images = clips.transpose(1, 2).flatten(0, 1)
    consensus = nn.Sequential(base, nn.Unflatten(0, (-1, after)), Mean())
    expected = logits_of_trained(consensus, base.fc, images)
    state = {f"module.base_model.{key}": value for key, value in base.state_dict().items()}
    for name in ("weight", "bias"):
        state[f"module.new_fc.{name}"] = state.pop(f"module.base_model.fc.{name}")
    result = convert(state, "tsm", "nl_detectron")
    assert result.video["MODEL.VIDEO.POOLING"] == pooling
    assert_close(configured(result)(clips), expected, rtol=1e-5, atol=1e-5)
    back = convert(result.state, "nl_detectron", "tsm", pooling=pooling)
    assert_close(back.state, state, rtol=0, atol=0)


def test_report(network):
    theirs = theirs_of(network("3x1x1"), "slowfast")
    result = convert(theirs, "slowfast", "nl_detectron")
    lines = "\n".join(report(result, "slowfast", "nl_detectron", False))
    for text in (
        *("VIDEO.STEM_KERNEL (5, 7, 7)", "VIDEO.INFLATE 3x1x1", "VIDEO.NUM_BLOCKS (1, 1)"),
        *("VIDEO.HEAD.NUM_CLASSES 3", "VIDEO.POOLING slowfast", "INPUT.FORMAT RGB"),
        *("PIXEL_MEAN [114.75, 114.75, 114.75]", "PIXEL_STD [57.375, 57.375, 57.375]"),
        *("RESNETS.WIDTH_PER_GROUP 4", "AFTER_BLOCKS.RES3 (0,)"),
    ):
        assert text in lines
    result = convert(theirs, "slowfast", "caffe2")
    last = list(report(result, "slowfast", "caffe2", False))[-2:]  # both poolings must be known
    assert ["POOLING slowfast" in last[0], "POOLING released_32x2" in last[1]] == [True, True]


def test_c2d_of_mmaction2(network):
    """Its kernels are 2-D; the dimensions say that it is for video."""
    state = network("")
    theirs = {k: v.squeeze(2) if v.dim() == 5 else v for k, v in theirs_of(state, "mmcv").items()}
    back = convert(theirs, "mmcv", "nl_detectron", lambda name: options("mmcv"), dim=3)
    assert_close(back.state, dict(state), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dialect", "change", "message"),
    [
        ("slowfast", "no head", "lacks head.projection.weight; .* set blocks_only"),
        ("tsm", "no head", "lacks new_fc.weight"),
        (
            "mmcv",
            "of mmaction2_tsm",
            r"not in this dialect.*block\.conv\*\.conv\.net.*--blocks-only",
        ),
        ("tsm", "not shifted", r"not in this dialect.*1 key: base_model\.layer1\.0\.conv1\.weight"),
        ("mmaction2_tsm", "of mmcv", r"not in this dialect.*backbone\.conv\*\.conv\.\*"),
        ("slowfast", "inflated", r"neither C2D nor I3D.*: res2\.0\.conv1, res2\.0\.conv3, res3"),
    ],
)
def test_refused(dialect, change, message, network):
    source = change.removeprefix("of ") if change.startswith("of ") else dialect
    theirs = theirs_of(network("" if source in IMAGES else "3x1x1"), source)
    if change == "no head":
        theirs = {k: v for k, v in theirs.items() if "projection" not in k and "new_fc" not in k}
    elif change == "not shifted":
        theirs["module.base_model.layer1.0.conv1.weight"] = theirs.pop(
            "module.base_model.layer1.0.conv1.net.weight"
        )
    elif change == "inflated":
        key = "s2.pathway0_res0.branch2.c.weight"
        theirs[key] = theirs[key].repeat(1, 1, 3, 1, 1)
    with pytest.raises(ValueError, match=message):
        convert(theirs, dialect, "nl_detectron", lambda name: options(dialect))
