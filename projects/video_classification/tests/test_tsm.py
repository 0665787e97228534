"""The temporal shift against loops, where it is, and a video frame by frame."""

from __future__ import annotations

import itertools

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close
from video_classification.models import TemporalShift, make_resnet3d, online
from video_classification.models.tsm import temporal_shift

TINY = {"stem_channels": 8, "res2_channels": 16, "width": 4}


def shifted(x, divisor, direction):
    """Frame t of channel c, one at a time."""
    y = torch.zeros_like(x)
    channels, frames = x.shape[1:3]
    fold = channels // divisor
    for c, t in itertools.product(range(channels), range(frames)):
        if direction == "bidirectional":
            source = t + 1 if c < fold else t - 1 if c < 2 * fold else t
        else:
            source = t - 1 if c < fold else t
        if 0 <= source < frames:
            y[:, c, t] = x[:, c, source]
    return y


@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize(("channels", "divisor"), [(17, 8), (16, 8), (5, 2), (3, 3)])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_values_and_gradient(frames, channels, divisor, direction):
    shift = TemporalShift(channels, divisor, direction)
    x = torch.randn(2, channels, frames, 3, 2).double().requires_grad_()
    dy = torch.randn_like(x)
    y = shift(x)
    assert torch.equal(y, shifted(x.detach(), divisor, direction))
    (dx,) = torch.autograd.grad(y, x, dy)
    # A shift is linear, so <S(z), dy> = <z, S^T(dy)> for any z.
    for z in torch.randn(3, *x.shape).double():
        assert_close((shifted(z, divisor, direction) * dy).sum(), (z * dx).sum())
    assert dx.count_nonzero() == shifted(torch.ones_like(x), divisor, direction).count_nonzero()
    assert not shift.state_dict()


def test_by_hand():
    """TSM's code: of 8 channels, 0 comes from the next frame and 1 from the previous one."""
    x = torch.tensor([[1.0, 2, 3]]).expand(8, 3)[None, :, :, None, None]
    got = temporal_shift(x, 1, "bidirectional")[0, :, :, 0, 0].tolist()
    assert got == [[2, 3, 0], [0, 1, 2], *[[1, 2, 3]] * 6]
    got = temporal_shift(x, 1, "unidirectional")[0, :, :, 0, 0].tolist()
    assert got == [[0, 1, 2], *[[1, 2, 3]] * 7]


@pytest.mark.parametrize("every", [1, 2])
def test_in_residual_branches(every, randomize):
    shift = {"divisor": 4, "direction": "bidirectional"}
    options = {"num_blocks": (1, 3), "pooling": "space", **TINY}
    network = make_resnet3d(**options, shift=shift, shift_every=every)
    shifts = [name for name, m in network.named_modules() if isinstance(m, TemporalShift)]
    places = {1: ["res2.0", "res3.0", "res3.1", "res3.2"], 2: ["res2.0", "res3.0", "res3.2"]}
    assert shifts == [f"{block}.shift" for block in places[every]]
    randomize(network).eval()
    plain = make_resnet3d(**options).eval()
    plain.load_state_dict(network.state_dict())
    x = torch.randn(2, 8, 5, 4, 4)
    block = plain.res2[0]
    branch = block.conv3(block.conv2(block.conv1(shifted(x, 4, "bidirectional")).relu()).relu())
    assert_close(network.res2[0](x), (branch + block.shortcut(x)).relu())


@pytest.fixture
def model(video_cfg, randomize):
    video_cfg.MODEL.VIDEO.SHIFT.DIRECTION = "unidirectional"
    video_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet3d_backbone"
    video_cfg.MODEL.NON_LOCAL.AXES = "space"
    return randomize(build_model(video_cfg)).double().eval()


@pytest.mark.parametrize("lengths", [(1,) * 7, (3, 1, 3), (7,)])
def test_online_is_unidirectional_offline(model, lengths):
    clip = torch.randint(0, 256, (2, 3, 7, 33, 47)).double()
    offline = model.backbone(model_input(model, clip))["res5"]
    for _ in range(2):  # the second video knows nothing of the first
        with online(model):
            parts = [model.backbone(model_input(model, x))["res5"] for x in clip.split(lengths, 2)]
        assert_close(torch.cat(parts, dim=2), offline, rtol=0, atol=1e-6)
        with online(model):
            logits = [model(x) * x.shape[2] / 7 for x in clip.split(lengths, 2)]
            assert not model.backbone.res5[0].shift.last_frame.requires_grad  # or it would grow
        assert_close(sum(logits), model(clip), rtol=0, atol=1e-6)
    assert_close(model.backbone(model_input(model, clip))["res5"], offline)


def model_input(model, clip):
    return (clip - model.pixel_mean) / model.pixel_std


def test_no_frame_depends_on_a_later_one(model):
    clip = torch.randn(1, 3, 6, 33, 33).double()
    later = clip.clone()
    later[:, :, 3:] = 0
    ours, other = model.backbone(clip)["res5"], model.backbone(later)["res5"]
    assert torch.equal(ours[:, :, :3], other[:, :, :3])
    assert not torch.equal(ours[:, :, 3], other[:, :, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SHIFT.DIRECTION": "bidirectional"}, r"so do backbone.res2.0.shift, .*res5.0.shift$"),
        ({"SHIFT.DIRECTION": ""}, "SHIFT.DIRECTION is empty"),
        ({"POOLING": "released_8x8"}, "so do backbone.pool2$"),
        (
            {"POOLING": "released_32x2"},
            "so do backbone.stem.conv1, backbone.stem.pool, backb.*pool2$",
        ),
        (
            {"INFLATE": "3x1x1"},
            "so do backbone.res2.0.conv1, backbone.res3.0.conv1, .*res4.0.conv1$",
        ),
        ({"STEM_KERNEL": (3, 7, 7)}, "so do backbone.stem.conv1$"),
        ({"NON_LOCAL.AXES": "spacetime"}, "so do backbone.res4.non_local0$"),
        ({"NON_LOCAL.AXES": "time", "NON_LOCAL.SUBSAMPLE": 1}, "so do backbone.res4.non_local0$"),
    ],
    ids=str,
)
def test_not_online(options, message, video_cfg):
    cfg = video_cfg
    cfg.MODEL.VIDEO.SHIFT.DIRECTION = "unidirectional"
    if any("NON_LOCAL" in key for key in options):
        cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet3d_backbone"
    for key, value in options.items():
        cfg.merge_from_list([f"MODEL.{'' if 'NON_LOCAL' in key else 'VIDEO.'}{key}", value])
    model = build_model(cfg)
    with pytest.raises(ValueError, match="evaluation mode"), online(model):
        pass
    with pytest.raises(ValueError, match=message), online(model.eval()):
        pass


@pytest.mark.parametrize(
    ("divisor", "direction", "message"),
    [
        (8, "both", "SHIFT.DIRECTION.*'bidirectional', 'unidirectional'.*got 'both'"),
        (8, "bidirectional", "SHIFT.DIVISOR.* at most the number of channels, 6, got 8"),
        (1, "bidirectional", "SHIFT.DIVISOR.* at least 2 .*got 1"),
    ],
)
def test_wrong_options(divisor, direction, message):
    with pytest.raises(ValueError, match=message):
        TemporalShift(6, divisor, direction)
    assert isinstance(make_resnet3d(num_blocks=(1,), **TINY).res2[0].shift, nn.Identity)
