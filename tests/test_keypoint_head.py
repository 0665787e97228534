"""The keypoint head: blocks between the convolutions of a head that is otherwise the stock one."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead, build_keypoint_head
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from nl_detectron import NonLocalKeypointHead
from nl_detectron.non_local import find_blocks

SHAPE = ShapeSpec(channels=6, height=14, width=14)
J = 5


def make(cls=NonLocalKeypointHead, **kwargs):
    return cls(SHAPE, num_keypoints=J, conv_dims=[32] * 8, **kwargs)


def make_pair(**kwargs):
    """A stock head, and one of ours with its weights."""
    stock, ours = make(KRCNNConvDeconvUpsampleHead), make(**kwargs)
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert unexpected == []
    assert all(key.startswith("non_local") for key in missing)
    return stock, ours


def targets(rois=(2, 1), keypoints=J):
    """RoIs of one image each, with the fields that training and inference read."""
    images = []
    for number in rois:
        image = Instances((64, 64))
        boxes = Boxes(torch.tensor([[4.0, 8.0, 52.0, 60.0]]).repeat(number, 1))
        image.proposal_boxes, image.pred_boxes = boxes, boxes.clone()
        points = torch.rand(number, keypoints, 2) * 40 + 10
        visible = torch.full((number, keypoints, 1), 2.0)
        image.gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
        images.append(image)
    return images


def order_with(after_convs):
    order = []
    for i in range(1, 9):
        order += [f"conv_fcn{i}", f"conv_fcn_relu{i}"]
        order += [f"non_local{i}"] if i in after_convs else []
    return [*order, "score_lowres"]


@pytest.mark.parametrize("after_convs", [None, (), (1,), (8, 3), range(1, 9)], ids=str)
def test_order(after_convs):
    head = make() if after_convs is None else make(after_convs=after_convs)
    expected = order_with((2, 4, 6, 8) if after_convs is None else after_convs)
    assert [name for name, _ in head.named_children()] == expected


def test_blocks_have_the_channels_of_their_convolution():
    head = NonLocalKeypointHead(SHAPE, num_keypoints=J, conv_dims=[8, 12], after_convs=[1, 2])
    assert (head.non_local1.in_channels, head.non_local2.in_channels) == (8, 12)
    assert head.layers(torch.randn(1, 6, 14, 14)).shape == (1, J, 56, 56)


def test_stock_parameters_keep_names_and_initial_values():
    torch.manual_seed(1)
    stock = make(KRCNNConvDeconvUpsampleHead)
    torch.manual_seed(1)
    ours = make()
    for key, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize("norm", ["", "BN", "GN"])
def test_zero_init_survives_the_stock_init(norm):
    head = make(block_options={"norm": norm})
    for i in (2, 4, 6, 8):
        block = getattr(head, f"non_local{i}")
        zero = block.norm.weight if norm else block.conv_out.weight
        assert_close(zero, torch.zeros_like(zero))
        # He by fan-in, as in any other block: sqrt(2 / 32). The stock init, by fan-out, is 0.35.
        assert_close(block.theta.weight.std(), torch.tensor(0.25), rtol=0.2, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["", "BN"])
def test_new_head_is_the_stock_head(norm, training):
    stock, ours = make_pair(block_options={"norm": norm, "subsample": 2})
    stock.train(training), ours.train(training)
    x, images = torch.randn(3, 6, 14, 14), targets()
    assert torch.equal(ours.layers(x), stock.layers(x))
    with EventStorage():
        expected, got = (head(x, copy.deepcopy(images)) for head in (stock, ours))
    if training:
        assert list(expected) == list(got) == ["loss_keypoint"]
        assert torch.equal(got["loss_keypoint"], expected["loss_keypoint"])
    else:
        for a, b in zip(expected, got):
            assert torch.equal(a.pred_keypoints, b.pred_keypoints)
            assert torch.equal(a.pred_keypoint_heatmaps, b.pred_keypoint_heatmaps)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["", "BN", "SyncBN", "GN"])
def test_no_rois(norm, training):
    head = make(block_options={"norm": norm, "subsample": 2}).train(training)
    x = torch.randn(0, 6, 14, 14, requires_grad=True)
    assert head.layers(x).shape == (0, J, 56, 56)
    with EventStorage():
        out = head(x, targets(rois=(0, 0)))
    if training:
        assert out["loss_keypoint"] == 0
        out["loss_keypoint"].backward()
        assert all(p.grad.isfinite().all() for p in head.parameters())
    else:
        assert [image.pred_keypoints.shape for image in out] == [(0, J, 3)] * 2
    assert all(b.isfinite().all() for b in head.buffers())


@pytest.fixture
def head_cfg(small_cfg):
    small_cfg.MODEL.MASK_ON = False
    small_cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
    return small_cfg


def test_from_config(head_cfg):
    head_cfg.MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT = 3.0
    head = build_keypoint_head(head_cfg, SHAPE)
    stock_cfg = head_cfg.clone()
    stock_cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "KRCNNConvDeconvUpsampleHead"
    stock = build_keypoint_head(stock_cfg, SHAPE)
    assert (head.num_keypoints, head.loss_weight) == (J, 3.0)
    assert head.loss_normalizer == stock.loss_normalizer
    assert [name for name, _ in head.named_children()] == order_with((2, 4, 6, 8))
    assert [block.subsample for block in find_blocks(head).values()] == [1] * 4
    head_cfg.MODEL.NON_LOCAL.KEYPOINT_HEAD.AFTER_CONVS = (3,)
    head = build_keypoint_head(head_cfg, SHAPE)
    assert [name for name, _ in head.named_children()] == order_with((3,))


@pytest.mark.parametrize("number", [J - 2, J + 12])
def test_targets_with_another_number_of_keypoints(head_cfg, number):
    """In a training step of a whole detector, where it happens."""
    model = build_model(head_cfg).train()
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes([[10.0, 5.0, 70.0, 60.0]])
    instances.gt_classes = torch.tensor([0])
    instances.gt_keypoints = targets(rois=[1], keypoints=number)[0].gt_keypoints
    batch = [{"image": torch.zeros(3, 64, 96, dtype=torch.uint8), "instances": instances}]
    message = f"ROI_KEYPOINT_HEAD.NUM_KEYPOINTS.* is {J}, but the annotations have {number} "
    with EventStorage(), pytest.raises(ValueError, match=message):
        model(batch)
    instances.gt_keypoints = targets(rois=[1])[0].gt_keypoints
    with EventStorage():
        assert model(batch)["loss_keypoint"] > 0


def test_images_without_instances_have_any_number_of_keypoints():
    head, images = make(), targets(rois=(2, 0))
    images[1].gt_keypoints = Keypoints(torch.zeros(0, 17, 3))
    with EventStorage():
        assert head(torch.randn(2, 6, 14, 14), images)["loss_keypoint"] > 0


@pytest.mark.parametrize("after_convs", [(0,), (9,), (-1,), (2, 2)], ids=str)
def test_wrong_convolutions(after_convs):
    with pytest.raises(ValueError, match="KEYPOINT_HEAD.AFTER_CONVS.*from 1 to 8") as error:
        make(after_convs=after_convs)
    assert f"got {after_convs}" in str(error.value)
