"""Which checkpoints a network with non-local blocks accepts."""

from __future__ import annotations

import pickle

import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron.checkpoint import StrictCheckpointer


@pytest.fixture
def models(small_cfg):
    stock = build_model(small_cfg)
    small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
    small_cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
    return stock, build_model(small_cfg)


def load(model, state, tmp_path, **kwargs):
    torch.save({"model": state}, tmp_path / "model.pth")
    StrictCheckpointer(model, **kwargs).load(str(tmp_path / "model.pth"))


def test_stock_checkpoint_is_accepted(models, tmp_path):
    stock, non_local = models
    load(non_local, stock.state_dict(), tmp_path)
    assert torch.equal(
        non_local.state_dict()["backbone.bottom_up.res4.5.conv1.weight"],
        stock.state_dict()["backbone.bottom_up.res4.5.conv1.weight"],
    )


@pytest.mark.parametrize(
    "lost", ["backbone.bottom_up.res4.5.conv1.weight", "roi_heads.box_predictor.cls_score.bias"]
)
def test_lost_tensor_is_named(models, tmp_path, lost):
    state = models[0].state_dict()
    del state[lost]
    with pytest.raises(ValueError, match=f"lacks 1 of .*{lost}"):
        load(models[1], state, tmp_path)
    load(models[1], state, tmp_path, may_lack=[lost.rsplit(".", 1)[0]])
    load(models[1], state, tmp_path, may_lack=[""])


def test_other_number_of_classes_is_named(models, tmp_path):
    state = models[0].state_dict()
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(81, 32)
    with pytest.raises(ValueError, match="cls_score.weight"):
        load(models[1], state, tmp_path)
    load(models[1], state, tmp_path, may_lack=["roi_heads.box_predictor"])


def test_backbone_alone_is_accepted_if_whole(models, tmp_path):
    """As ImageNet weights are stored: without the prefix, matched by the ends of the names."""
    prefix = "backbone.bottom_up."
    state = {
        name[len(prefix) :]: value.numpy()
        for name, value in models[0].state_dict().items()
        if name.startswith(prefix)
    }
    checkpoint = {"model": state, "__author__": "test", "matching_heuristics": True}
    path = tmp_path / "imagenet.pkl"
    path.write_bytes(pickle.dumps(checkpoint))
    StrictCheckpointer(models[1]).load(str(path))

    del state["res4.5.conv1.weight"]
    path.write_bytes(pickle.dumps(checkpoint))
    with pytest.raises(ValueError, match="res4.5.conv1.weight"):
        StrictCheckpointer(models[1]).load(str(path))


def test_deeper_network_is_named(models, tmp_path):
    state = models[0].state_dict()
    block = {name: value for name, value in state.items() if "res4.5." in name}
    deeper = {name.replace("res4.5.", "res4.6."): value for name, value in block.items()}
    with pytest.raises(ValueError, match=r"no place for: .*res4\.6\.conv1.*another depth"):
        load(models[1], {**state, **deeper}, tmp_path)
    more = {"fc1000.weight": torch.zeros(1), "res4.5.norm.num_batches_tracked": torch.zeros(1)}
    load(models[1], {**state, **more}, tmp_path)


def test_what_prediction_refuses(models, tmp_path):
    stock, non_local = models
    load(non_local, stock.state_dict(), tmp_path, complete=True)
    backbone = {name: x for name, x in stock.state_dict().items() if "bottom_up" in name}
    with pytest.raises(ValueError, match="lacks .* tensors"):
        load(non_local, backbone, tmp_path, complete=True)
    with pytest.raises(ValueError, match="no place for: .*non_local.* and .* more"):
        load(stock, non_local.state_dict(), tmp_path, complete=True)
    load(stock, non_local.state_dict(), tmp_path)
