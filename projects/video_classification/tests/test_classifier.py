"""The meta-architecture: what goes in and out, its losses, its keys."""

from __future__ import annotations

import itertools

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch.testing import assert_close
from video_classification import add_video_config
from video_classification.config import default_video_config

from nl_detectron.config import without_blocks
from nl_detectron.non_local import find_blocks

CLIPS = torch.randint(0, 256, (2, 3, 4, 33, 37), dtype=torch.uint8)


def test_clips_in_and_logits_out(video_cfg, randomize):
    model = randomize(build_model(video_cfg)).eval()
    assert type(model).__name__ == "VideoClassifier"
    x = (CLIPS.float() - 114.75) / 57.375
    features = model.backbone(x)["res5"]
    assert features.shape == (2, 128, 4, 2, 2)
    linear = model.head.linear
    expected = torch.zeros(2, 3)
    for n, t, h, w in itertools.product(range(2), range(4), range(2), range(2)):
        expected[n] += (linear.weight @ features[n, :, t, h, w] + linear.bias) / 16
    assert_close(model(CLIPS), expected)
    scores = [clip["scores"] for clip in model([{"video": clip} for clip in CLIPS])]
    assert_close(torch.stack(scores), expected.exp() / expected.exp().sum(1, keepdim=True))


def test_loss(video_cfg, randomize):
    video_cfg.MODEL.VIDEO.HEAD.DROPOUT = 0.0
    model = randomize(build_model(video_cfg)).train()
    inputs = [{"video": clip, "label": label} for clip, label in zip(CLIPS, (2, 0))]
    logits = model(CLIPS).double()
    expected = sum(z.exp().sum().log() - z[k] for z, k in zip(logits, (2, 0))) / 2
    assert_close(model(inputs), {"loss_cls": expected.float()})


def test_loss_of_several_labels(video_cfg, randomize):
    video_cfg.MODEL.VIDEO.HEAD.DROPOUT, video_cfg.MODEL.VIDEO.HEAD.MULTI_LABEL = 0.0, True
    model = randomize(build_model(video_cfg)).train()
    labels = [(0, 2), ()]
    inputs = [{"video": clip, "label": label} for clip, label in zip(CLIPS, labels)]
    logits, expected = model(CLIPS).double(), 0
    for n, k in itertools.product(range(2), range(3)):
        p = 1 / (1 + (-logits[n, k]).exp())
        expected -= (p if k in labels[n] else 1 - p).log() / 6
    assert_close(model(inputs), {"loss_cls": expected.float()})


@pytest.mark.parametrize(("multi_label", "labels"), [(False, (0, 3)), (True, ((1,), (0, 3)))])
def test_wrong_label(multi_label, labels, video_cfg):
    """Classes counted from 1 are a frequent mistake."""
    video_cfg.MODEL.VIDEO.HEAD.MULTI_LABEL = multi_label
    model = build_model(video_cfg)
    with pytest.raises(ValueError, match="labels must be from 0 to 2, .*NUM_CLASSES is 3, got 3"):
        model([{"video": clip, "label": label} for clip, label in zip(CLIPS, labels)])


def test_dropout_in_training_alone(video_cfg):
    head = build_model(video_cfg).head
    head.linear.weight.data.fill_(1.0)
    x = torch.ones(1000, 128, 1, 1, 1)
    assert_close(head.eval()(x), torch.full((1000, 3), 128.0))
    kept = head.train()(x)[:, 0] / 2  # what is kept counts twice
    assert_close(kept.mean().item(), 64.0, rtol=0.02, atol=0)
    assert_close(kept.var().item(), 128 * 0.25, rtol=0.2, atol=0)


def test_directional_derivative_of_the_whole_model(video_cfg, randomize):
    """I3D with blocks, every parameter at once."""
    cfg = video_cfg
    cfg.MODEL.VIDEO.INFLATE, cfg.MODEL.VIDEO.POOLING = "3x1x1", "paper"
    cfg.MODEL.VIDEO.HEAD.DROPOUT, cfg.MODEL.VIDEO.SHIFT.DIRECTION = 0.0, "bidirectional"
    cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet3d_backbone"
    model = randomize(build_model(cfg)).double().train()
    inputs = [{"video": clip.double(), "label": 1} for clip in CLIPS]
    model(inputs)["loss_cls"].backward()
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) * p.abs().mean() for p in parameters]
    expected = sum((p.grad * d).sum() for p, d in zip(parameters, direction))
    losses = []
    with torch.no_grad():
        for step in (1e-7, -2e-7):
            for p, d in zip(parameters, direction):
                p += step * d
            losses.append(model(inputs)["loss_cls"])
    assert_close((losses[0] - losses[1]) / 2e-7, expected, rtol=1e-4, atol=1e-6)


# Another value of each key, which must change the parameters, their initial values, or the result
OTHERS = {
    "POOLING": "paper",
    "STEM_KERNEL": (3, 7, 7),
    "INFLATE": "3x3x3",
    "NUM_BLOCKS": (1, 1, 2, 1),
    "ZERO_INIT_RESIDUAL": True,
    "SHIFT.DIRECTION": "unidirectional",
    "SHIFT.DIVISOR": 4,
    "SHIFT.EVERY": 2,
    "HEAD.NUM_CLASSES": 5,
    "HEAD.POOL_SIZE": 1,
    "HEAD.DROPOUT": 0.0,
    "HEAD.MULTI_LABEL": True,
    "HEAD.INIT_STD": 0.001,
}


def flat(node, prefix=""):
    for key, value in node.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]


@pytest.mark.parametrize("key", OTHERS)
def test_every_key_does_something(key, video_cfg):
    training = {"HEAD.LR_FACTOR"}  # in test_train.py
    assert set(OTHERS) | training == set(flat(video_cfg.MODEL.VIDEO))
    video_cfg.MODEL.VIDEO.SHIFT.DIRECTION = "bidirectional"
    video_cfg.MODEL.VIDEO.ZERO_INIT_RESIDUAL = False
    losses = []
    for value in (None, OTHERS[key]):
        if value is not None:
            video_cfg.merge_from_list([f"MODEL.VIDEO.{key}", value])
        torch.manual_seed(0)
        model = build_model(video_cfg).train()
        label = (1,) if video_cfg.MODEL.VIDEO.HEAD.MULTI_LABEL else 1
        losses.append(model([{"video": clip, "label": label} for clip in CLIPS])["loss_cls"])
    assert losses[0] != losses[1]


def test_config_node(video_cfg):
    assert default_video_config().MODEL.VIDEO.POOLING == "released_32x2"
    expected = video_cfg.clone()
    add_video_config(video_cfg)  # a second time
    assert video_cfg == expected
    stock = default_video_config()
    stock.MODEL.pop("VIDEO")
    add_video_config(stock)
    assert stock == default_video_config()
    video_cfg.MODEL.VIDEO.NUM_BLOCKS, video_cfg.MODEL.RESNETS.DEPTH = (), 18
    with pytest.raises(ValueError, match=r"DEPTH must be one of \(50, 101, 152\).*, got 18"):
        build_model(video_cfg)


@pytest.mark.parametrize("norm", ["", "BN"])
def test_new_blocks_change_no_bit(norm, video_cfg, randomize):
    video_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet3d_backbone"
    video_cfg.MODEL.NON_LOCAL.NORM = norm
    video_cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES2 = (0,)
    ours = build_model(video_cfg).eval()
    stock = randomize(build_model(without_blocks(video_cfg))).eval()
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(".non_local" in name for name in missing)
    assert list(find_blocks(ours)) == ["backbone.res2.non_local0", "backbone.res4.non_local0"]
    assert torch.equal(ours(CLIPS), stock(CLIPS))
