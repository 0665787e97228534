"""A model in use has the weights it is given, all of them, and sees what it was evaluated on."""

from __future__ import annotations

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from PIL import Image

from nl_detectron.engine.predictor import Predictor


@pytest.mark.parametrize("given", [True, False])
def test_weights(given, nl_cfg, tmp_path):
    path = str(tmp_path / "model.pth")
    nl_cfg.MODEL.WEIGHTS = "" if given else path
    state = build_model(nl_cfg).state_dict()
    state = {name: torch.rand_like(x, dtype=torch.float32) for name, x in state.items()}
    torch.save({"model": state}, path)
    model = Predictor(nl_cfg, path if given else None).model
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert nl_cfg.MODEL.WEIGHTS == ("" if given else path)

    torch.save({"model": {k: v for k, v in state.items() if "bottom_up" in k}}, path)
    message = "weights .*model.pth: the checkpoint lacks .* A backbone is not enough"
    with pytest.raises(ValueError, match=message):
        Predictor(nl_cfg, path)


def test_no_weights(nl_cfg):
    """The model is as detectron2 builds it."""
    torch.manual_seed(5)
    expected = build_model(nl_cfg).state_dict()
    torch.manual_seed(5)
    for name, value in Predictor(nl_cfg, "").model.state_dict().items():
        assert torch.equal(value, expected[name]), name


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
