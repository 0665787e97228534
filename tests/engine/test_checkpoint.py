"""Which checkpoints a network with non-local blocks accepts."""

from __future__ import annotations

import pickle

import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron.config import without_blocks
from nl_detectron.engine.checkpoint import StrictCheckpointer

RESNET = "backbone.bottom_up."
BLOCK = f"{RESNET}res4.non_local4"
WEIGHT = "res4.5.conv1.weight"
CLASSES = "roi_heads.box_predictor.cls_score"


@pytest.fixture
def stock(nl_cfg):
    return build_model(without_blocks(nl_cfg))


@pytest.fixture
def non_local(nl_cfg):
    return build_model(nl_cfg)


@pytest.fixture
def load(tmp_path):
    def load(model, state, refused=None, file="model.pth", **kwargs):
        if file == "model.pth":
            torch.save({"model": state}, tmp_path / file)
        checkpointer = StrictCheckpointer(model, **kwargs)
        if refused:
            with pytest.raises(ValueError, match=refused):
                checkpointer.load(str(tmp_path / file))
        else:
            checkpointer.load(str(tmp_path / file))

    return load


def test_stock_checkpoint_is_accepted(stock, non_local, load):
    load(non_local, stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(non_local.state_dict()[name], value), name


@pytest.mark.parametrize("lost", [RESNET + WEIGHT, f"{CLASSES}.bias"])
@pytest.mark.parametrize("shape", [None, (81, 32)], ids=["lost", "another shape"])
def test_lost_tensor_is_named(lost, shape, stock, non_local, load):
    state = stock.state_dict()
    del state[lost]
    if shape:  # as for another number of classes
        state[lost] = torch.zeros(shape)
    load(non_local, state, f"lacks 1 of .*{lost}")
    load(non_local, state, allow_missing=[lost.rsplit(".", 1)[0]])
    load(non_local, state, allow_missing=[""])


@pytest.mark.parametrize("norm", ["", "BN"])
def test_backbone_alone_is_accepted_if_whole(norm, stock, nl_cfg, load, tmp_path):
    """As ImageNet weights are stored: without the prefix, matched by the ends of the names."""
    nl_cfg.MODEL.NON_LOCAL.NORM = norm
    non_local = build_model(nl_cfg)
    state = stock.backbone.bottom_up.state_dict()
    for refused in (None, WEIGHT):
        state = {name: torch.as_tensor(x).numpy() for name, x in state.items() if name != refused}
        checkpoint = {"model": state, "__author__": "test", "matching_heuristics": True}
        (tmp_path / "imagenet.pkl").write_bytes(pickle.dumps(checkpoint))
        load(non_local, None, refused, file="imagenet.pkl", backbone_prefix=RESNET)


def test_deeper_network_is_named(stock, non_local, load):
    state = stock.state_dict()
    deeper = {name.replace("res4.5.", "res4.6."): x for name, x in state.items()}
    load(non_local, {**state, **deeper}, r"does not have: .*res4\.6\.conv1.*another depth")
    more = {"fc1000.weight": torch.zeros(1), "res4.5.norm.num_batches_tracked": torch.zeros(1)}
    load(non_local, {**state, **more})


def test_what_prediction_refuses(stock, non_local, load):
    load(non_local, stock.state_dict(), complete=True)
    backbone = {name: x for name, x in stock.state_dict().items() if "bottom_up" in name}
    refused = "lacks .* tensors.* A backbone is not enough"
    load(non_local, backbone, refused, backbone_prefix=RESNET, complete=True)
    more = {**stock.state_dict(), "teacher.weight": torch.zeros(1)}
    load(stock, more, r"does not have: teacher\.weight", complete=True)
    load(stock, more)


class TestTrainedBlocks:
    """A block of the checkpoint is loaded, refused, or left out on purpose; never lost."""

    @pytest.mark.parametrize("complete", [False, True])
    def test_model_without(self, complete, stock, non_local, load):
        trained = non_local.state_dict()
        refused = rf"blocks that the model does not have: {BLOCK}, roi_h"
        load(stock, trained, refused, complete=complete)
        load(stock, trained, complete=complete, strip_blocks=True)
        for name, value in stock.state_dict().items():
            assert torch.equal(value, trained[name]), name

    @pytest.mark.parametrize(
        ("keys", "refused"),
        [
            (["AFTER_BLOCKS.RES4", (-1,)], f"does not have: {BLOCK}. Was it trained with"),
            # It would be half trained, half random.
            (["REDUCTION", 4], rf"{BLOCK}\.theta"),
            (["NORM", "BN"], rf"{BLOCK}\.norm"),
            (["PAIRWISE", "gaussian"], f"does not have: {BLOCK}"),
        ],
    )
    def test_elsewhere_or_of_another_form(self, keys, refused, non_local, nl_cfg, load):
        nl_cfg.merge_from_list([f"MODEL.NON_LOCAL.{keys[0]}", keys[1]])
        load(build_model(nl_cfg), non_local.state_dict(), refused)

    def test_stripped_of_all(self, non_local, load):
        """The blocks of the model start as the identity, as those of a stock checkpoint do."""
        trained = {name: torch.ones_like(x) for name, x in non_local.state_dict().items()}
        load(non_local, trained, strip_blocks=True)
        state = non_local.state_dict()
        assert not state[f"{BLOCK}.conv_out.weight"].any()
        assert state["backbone.fpn_output2.weight"].all()


class TestResuming:
    @pytest.fixture
    def resume(self, tmp_path):
        def resume(model, state, **kwargs):
            torch.save({"model": state, "iteration": 1}, tmp_path / "model_0001.pth")
            StrictCheckpointer(model, str(tmp_path), **kwargs).resume_or_load("lost.pth")

        return resume

    def test_the_same_model(self, non_local, resume):
        """What the first part of the training was allowed does not count any more."""
        trained = {name: torch.ones_like(x) for name, x in non_local.state_dict().items()}
        resume(non_local, trained, strip_blocks=True)
        assert non_local.state_dict()[f"{BLOCK}.conv_out.weight"].all()

    @pytest.mark.parametrize("lost", ["roi_heads.box_predictor", BLOCK])
    def test_less(self, lost, non_local, resume):
        state = {name: x for name, x in non_local.state_dict().items() if not name.startswith(lost)}
        with pytest.raises(ValueError, match=f"{lost}.*of the same model"):
            resume(non_local, state, allow_missing=[""])

    def test_more(self, stock, non_local, resume):
        state = non_local.state_dict()
        with pytest.raises(ValueError, match=r"does not have: teacher\.weight"):
            resume(non_local, {**state, "teacher.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=f"does not have: {BLOCK}"):
            resume(stock, state)
