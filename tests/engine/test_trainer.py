"""What the tools have in common; the whole of it runs in the tests of the tools."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from PIL import Image

from nl_detectron.engine.predictor import Predictor


class TestBuildPredictor:
    @pytest.fixture
    def nl_cfg(self, small_cfg):
        small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
        return small_cfg

    @pytest.mark.parametrize("given", [True, False])
    def test_weights(self, given, nl_cfg, tmp_path):
        path = str(tmp_path / "model.pth")
        nl_cfg.MODEL.WEIGHTS = "" if given else path
        state = {
            name: torch.rand_like(value, dtype=torch.float32)
            for name, value in build_model(nl_cfg).state_dict().items()
        }
        torch.save({"model": state}, path)
        model = Predictor(nl_cfg, path if given else None).model
        assert not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert nl_cfg.MODEL.WEIGHTS == ("" if given else path)

    def test_no_weights(self, nl_cfg):
        """The model is as detectron2 builds it."""
        torch.manual_seed(5)
        expected = build_model(nl_cfg).state_dict()
        torch.manual_seed(5)
        for name, value in Predictor(nl_cfg, "").model.state_dict().items():
            assert torch.equal(value, expected[name]), name

    def test_weights_that_are_not_its_own(self, nl_cfg, tmp_path):
        state = Predictor(nl_cfg, "").model.state_dict()
        path = str(tmp_path / "model.pth")
        for kept, message in {
            "backbone.bottom_up": "lacks .* A backbone alone is not enough",
            "roi_heads": "lacks .* Is it of another depth",
        }.items():
            torch.save({"model": {k: v for k, v in state.items() if k.startswith(kept)}}, path)
            with pytest.raises(ValueError, match=f"weights .*model.pth: the checkpoint {message}"):
                Predictor(nl_cfg, path)
        torch.save({"model": state, "numbers": np.ones(3)}, path)
        with pytest.raises(ValueError, match="weights .*: this file does not hold tensors alone"):
            Predictor(nl_cfg, path)


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_network_input_is_that_of_the_evaluation(small_cfg, tmp_path, channels):
    cfg = small_cfg
    cfg.MODEL.KEYPOINT_ON = False
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = channels, 80, 111
    pixels = torch.randint(0, 256, (37, 53, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels[:, :, ::-1]).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": 37, "width": 53}
    expected = DatasetMapper(cfg, is_train=False)(record)
    inputs = Predictor(cfg, "").network_input(pixels)
    assert inputs["image"].shape == (3, 77, 111)
    assert torch.equal(inputs["image"], expected["image"].float())
    assert (inputs["height"], inputs["width"]) == (37, 53)
