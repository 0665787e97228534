"""Which checkpoints a network with non-local blocks accepts."""

from __future__ import annotations

import pickle

import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron.engine.checkpoint import StrictCheckpointer


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
    load(models[1], state, tmp_path, allow_missing=[lost.rsplit(".", 1)[0]])
    load(models[1], state, tmp_path, allow_missing=[""])


def test_other_number_of_classes_is_named(models, tmp_path):
    state = models[0].state_dict()
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(81, 32)
    with pytest.raises(ValueError, match="cls_score.weight"):
        load(models[1], state, tmp_path)
    load(models[1], state, tmp_path, allow_missing=["roi_heads.box_predictor"])


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
    StrictCheckpointer(models[1], backbone_prefix=prefix).load(str(path))

    del state["res4.5.conv1.weight"]
    path.write_bytes(pickle.dumps(checkpoint))
    with pytest.raises(ValueError, match="res4.5.conv1.weight"):
        StrictCheckpointer(models[1], backbone_prefix=prefix).load(str(path))


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
    with pytest.raises(ValueError, match="lacks .* tensors.* A backbone alone is not enough"):
        load(non_local, backbone, tmp_path, complete=True)
    more = {"teacher.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no place for: teacher\.weight"):
        load(stock, {**stock.state_dict(), **more}, tmp_path, complete=True)
    load(stock, {**stock.state_dict(), **more}, tmp_path)


BLOCK = "backbone.bottom_up.res4.non_local4"


class TestTrainedBlocks:
    """A block of the checkpoint is loaded, refused, or left out on purpose; never lost."""

    @pytest.fixture
    def other(self, small_cfg):
        def build(**keys):
            small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
            for key, value in keys.items():
                small_cfg.MODEL.NON_LOCAL[key] = value
            return build_model(small_cfg)

        return build

    @pytest.mark.parametrize("complete", [False, True])
    def test_model_without(self, complete, models, tmp_path):
        stock, non_local = models
        trained = non_local.state_dict()
        with pytest.raises(ValueError, match=rf"blocks that the model has no .*: {BLOCK}, roi_h"):
            load(stock, trained, tmp_path, complete=complete)
        load(stock, trained, tmp_path, complete=complete, strip_blocks=True)
        for name, value in stock.state_dict().items():
            assert torch.equal(value, trained[name]), name

    def test_elsewhere(self, models, other, tmp_path):
        moved = other(AFTER_BLOCKS={"RES2": (), "RES3": (), "RES4": (-1,), "RES5": ()})
        with pytest.raises(ValueError, match=f"has no place for: {BLOCK}. Is its MODEL.NON_LOCAL"):
            load(moved, models[1].state_dict(), tmp_path)

    @pytest.mark.parametrize(
        ("keys", "lost"),
        [({"REDUCTION": 4}, "theta"), ({"NORM": "BN"}, "norm"), ({"PAIRWISE": "gaussian"}, "phi")],
    )
    def test_of_another_form(self, keys, lost, models, other, tmp_path):
        """It would be half trained, half random."""
        state = models[1].state_dict()
        with pytest.raises(ValueError, match=rf"{BLOCK}\.{lost}|no place for: {BLOCK}"):
            load(other(**keys), state, tmp_path)

    def test_stripped_of_all(self, models, tmp_path):
        """The blocks of the model start as the identity, as those of a stock checkpoint do."""
        trained = {name: torch.ones_like(x) for name, x in models[1].state_dict().items()}
        load(models[1], trained, tmp_path, strip_blocks=True)
        state = models[1].state_dict()
        assert not state[f"{BLOCK}.conv_out.weight"].any()
        assert state["backbone.fpn_output2.weight"].all()


class TestResuming:
    def resume(self, model, state, folder, **kwargs):
        torch.save({"model": state}, folder / "model_0001.pth")
        (folder / "last_checkpoint").write_text("model_0001.pth")
        StrictCheckpointer(model, str(folder), **kwargs).resume_or_load("lost.pth")

    def test_the_same_model(self, models, tmp_path):
        """What the first part of the training was allowed does not count any more."""
        trained = {name: torch.ones_like(x) for name, x in models[1].state_dict().items()}
        self.resume(models[1], trained, tmp_path, strip_blocks=True)
        assert models[1].state_dict()[f"{BLOCK}.conv_out.weight"].all()

    @pytest.mark.parametrize("lost", ["roi_heads.box_predictor", BLOCK])
    def test_less(self, lost, models, tmp_path):
        state = {name: x for name, x in models[1].state_dict().items() if not name.startswith(lost)}
        with pytest.raises(ValueError, match=f"{lost}.*of another model than the training"):
            self.resume(models[1], state, tmp_path, allow_missing=[""])

    def test_more(self, models, tmp_path):
        state = {**models[1].state_dict(), "teacher.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"no place for: teacher\.weight"):
            self.resume(models[1], state, tmp_path)
        with pytest.raises(ValueError, match=f"no place for: {BLOCK}"):
            self.resume(models[0], models[1].state_dict(), tmp_path)
