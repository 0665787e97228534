"""The model zoo against the folder configs/, and against what detectron2's own does."""

from __future__ import annotations

import pickle

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone

from nl_detectron import NonLocalBlock, add_non_local_config, model_zoo
from tests.running import ROOT

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
class TestFiles:
    @pytest.mark.parametrize("name", [f"{MASK_RCNN}.yaml", f"{MASK_RCNN}.py", "Base-RCNN-FPN.yaml"])
    def test_file_by_name(self, name):
        assert model_zoo.get_config_file(name) == str(ROOT / "configs" / name)
        assert model_zoo.find_config_file(name) == str(ROOT / "configs" / name)

    def test_names_are_those_of_whole_configs(self):
        names = model_zoo.names()
        assert len(names) == len(set(names)) > 20
        assert f"{MASK_RCNN}.yaml" in names
        assert "Base-RCNN-FPN.yaml" not in names
        assert not any("common" in name for name in names)

    @pytest.mark.parametrize("name", [MASK_RCNN, f"{MASK_RCNN[:-1]}.yaml", f"./{MASK_RCNN}.yml"])
    def test_unknown_name_is_told_the_nearest(self, name):
        with pytest.raises(RuntimeError, match="not in the model zoo; did you mean COCO-Inst") as e:
            model_zoo.get_config_file(name)
        assert "COCO-Keypoints/keypoint_rcnn_R_101_FPN_NLhead_3x.py" in str(e.value)
        with pytest.raises(ValueError, match=r"neither a file nor in .*; did you mean COCO-Inst"):
            model_zoo.find_config_file(name)

    @pytest.mark.parametrize("name", ["", "COCO-Keypoints", "../setup.py", "/etc/passwd", "\0"])
    def test_what_is_no_config_is_refused(self, name):
        with pytest.raises(RuntimeError, match="is not in the model zoo"):
            model_zoo.get_config_file(name)

    def test_an_existing_file_goes_before_the_zoo(self, tmp_path):
        (tmp_path / "COCO-InstanceSegmentation").mkdir()
        (tmp_path / f"{MASK_RCNN}.yaml").touch()
        assert model_zoo.find_config_file(f"{MASK_RCNN}.yaml") == f"{MASK_RCNN}.yaml"
        assert model_zoo.find_config_file("https://x/y.yaml") == "https://x/y.yaml"


def test_config_is_the_file_and_nothing_more():
    expected = get_cfg()
    add_non_local_config(expected)
    expected.merge_from_file(str(ROOT / "configs" / f"{MASK_RCNN}.yaml"))
    assert model_zoo.get_config(f"{MASK_RCNN}.yaml") == expected
    lazy = model_zoo.get_config(f"{MASK_RCNN}.py")
    assert LazyConfig.to_py(lazy) == LazyConfig.to_py(
        LazyConfig.load(str(ROOT / "configs" / f"{MASK_RCNN}.py"))
    )


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_no_trained_model_is_published(suffix):
    with pytest.raises(RuntimeError, match=f"no trained model of {MASK_RCNN}{suffix} is published"):
        model_zoo.get(f"{MASK_RCNN}{suffix}", trained=True)


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_model_has_its_blocks_and_the_weights_of_its_config(suffix, tmp_path, monkeypatch):
    """Weights lie where detectron2 would have downloaded them to."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    cfg = model_zoo.get_config(f"{MASK_RCNN}.yaml")
    resnet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    weights = {name: torch.rand_like(value).numpy() for name, value in resnet.state_dict().items()}
    file = tmp_path / cfg.MODEL.WEIGHTS.replace("detectron2://", "detectron2/")
    file.parent.mkdir(parents=True)
    file.write_bytes(
        pickle.dumps({"model": weights, "__author__": "", "matching_heuristics": True})
    )

    model = model_zoo.get(f"{MASK_RCNN}{suffix}", device="cpu")
    assert model.training
    assert isinstance(model.backbone.bottom_up.res4.non_local4, NonLocalBlock)
    loaded = model.backbone.bottom_up.state_dict()
    for name, value in weights.items():
        assert torch.equal(loaded[name], torch.from_numpy(value)), name
