"""Models and images reach the tools as detectron2's own evaluation would have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from PIL import Image

from nl_detectron.inference import for_each_image, load_detector, network_input
from tests.test_tools import QUICK

CONFIG = str(QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml")


@pytest.fixture
def folder(tmp_path):
    """Two images, one of them upside down by its EXIF, and files that are none."""
    pixels = np.zeros((37, 53, 3), dtype=np.uint8)
    pixels[:20, :30] = 40, 100, 200
    Image.fromarray(pixels).save(tmp_path / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "c.JPG", quality=100, exif=exif)
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:99])
    (tmp_path / "d.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


class TestForEachImage:
    def test_folder(self, folder, capsys):
        seen = {}
        for_each_image(folder, lambda path, image: seen.update({path.name: image}))
        assert list(seen) == ["b.png", "c.JPG"]
        assert seen["b.png"].shape == (37, 53, 3)
        assert np.abs(seen["c.JPG"][::-1, ::-1].astype(int) - seen["b.png"]).mean() < 3
        out, err = capsys.readouterr()
        assert out == "2 images done, 2 skipped\n"
        assert [line.split(":")[0] for line in err.splitlines()] == [
            f"skipped {folder / 'a.png'}",
            f"skipped {folder / 'd.jpg'}",
        ]

    def test_image_that_is_refused(self, folder, capsys):
        def refuse(path, image):
            raise ValueError("too dull")

        with pytest.raises(SystemExit) as stop:
            for_each_image(folder / "b.png", refuse)
        assert stop.value.code == 1
        assert f"skipped {folder / 'b.png'}: too dull" in capsys.readouterr().err

    def test_nothing_there(self, tmp_path):
        with pytest.raises(SystemExit, match="no image in this folder"):
            for_each_image(tmp_path, print)
        with pytest.raises(SystemExit):
            for_each_image(tmp_path / "none.png", print)


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_network_input_is_that_of_the_evaluation(cfg, folder, channels):
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = channels, 80, 111
    inputs = []
    for_each_image(folder / "b.png", lambda _, image: inputs.append(network_input(cfg, image)))
    mapper = DatasetMapper(cfg, is_train=False)
    expected = mapper({"file_name": str(folder / "b.png"), "height": 37, "width": 53})
    assert expected["image"].shape == (3, 77, 111)
    assert torch.equal(inputs[0]["image"], expected["image"].float())
    assert (inputs[0]["height"], inputs[0]["width"]) == (37, 53)


class TestLoadDetector:
    def test_loads_weights(self, tmp_path):
        torch.manual_seed(1)
        _, model = load_detector(CONFIG)
        assert not model.training
        torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
        cfg, loaded = load_detector(
            CONFIG, str(tmp_path / "model.pth"), ["INPUT.MIN_SIZE_TEST", "64"]
        )
        assert cfg.INPUT.MIN_SIZE_TEST == 64
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name

    def test_weights_of_another_depth(self, tmp_path):
        _, model = load_detector(CONFIG)
        torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
        options = ["MODEL.RESNETS.DEPTH", "34"]
        with pytest.raises(ValueError, match="Is it of another depth"):
            load_detector(CONFIG, str(tmp_path / "model.pth"), options)
