"""Names of classes and keypoints that travel with the weights."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.coco.files import register_coco_files
from nl_detectron.engine.coco.metadata import check_names, dataset_metadata, model_metadata

CATEGORIES = [
    {"id": 999, "name": "wand"},
    {"id": 7, "name": "hand", "keypoints": ["left_tip", "right_tip", "palm"]},
    {"id": 50, "name": "glove"},
]
CATEGORIES[1]["skeleton"] = [[1, 3], [3, 2]]
NAMES, IDS = ["hand", "glove", "wand"], [7, 50, 999]
SIGMAS = [0.1, 0.25, 0.5]


@pytest.fixture
def hands(tmp_path):
    """Name of a data set with ids out of order and with gaps, known for one test."""
    file = tmp_path / "hands.json"
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": CATEGORIES}))
    register_coco_files("hands", str(file), str(tmp_path))
    MetadataCatalog.get("hands").keypoint_oks_sigmas = SIGMAS
    yield "hands"
    if "hands" in DatasetCatalog.list():
        DatasetCatalog.remove("hands")
        MetadataCatalog.remove("hands")


@pytest.fixture
def hands_cfg(cfg):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.KEYPOINT_ON, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = True, 3
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("hands",), ("unheard_of",)
    return cfg


def save(folder, metadata):
    StrictCheckpointer(nn.Linear(1, 1), str(folder), metadata=metadata).save("model_final")
    return str(folder / "model_final.pth")


def check(metadata):
    assert metadata.thing_classes == NAMES
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 50: 1, 999: 2}
    assert metadata.keypoint_names == ["left_tip", "right_tip", "palm"]
    assert metadata.keypoint_flip_map == [("left_tip", "right_tip")]
    lines = metadata.keypoint_connection_rules
    assert [rule[:2] for rule in lines] == [("left_tip", "palm"), ("palm", "right_tip")]
    assert all(isinstance(colour, tuple) and len(colour) == 3 for _, _, colour in lines)
    assert metadata.keypoint_oks_sigmas == SIGMAS


def test_of_a_data_set(hands):
    metadata = dataset_metadata(hands)
    assert metadata["category_ids"] == IDS
    assert metadata["thing_classes"] == NAMES
    assert metadata == json.loads(json.dumps(metadata))  # lists, numbers and text alone


@pytest.mark.parametrize("source", ["checkpoint", "file beside it", "catalog"])
def test_of_a_model(source, hands, hands_cfg, tmp_path):
    weights = save(tmp_path, dataset_metadata(hands))
    if source != "checkpoint":  # as saved by a tool that knows no metadata
        torch.save({"model": {}}, weights)
    if source != "file beside it":
        (tmp_path / "metadata.json").unlink()
    if source != "catalog":
        DatasetCatalog.remove(hands)
        MetadataCatalog.remove(hands)
    check(model_metadata(hands_cfg, weights))
    hands_cfg.MODEL.WEIGHTS = weights
    check(model_metadata(hands_cfg))


def test_coco_by_its_name(cfg):
    """Weights of others, such as the model zoo's."""
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    found = model_metadata(cfg, "detectron2://model_zoo.pkl")
    assert found.thing_classes[16] == "dog"  # category 18 of COCO
    assert found.thing_dataset_id_to_contiguous_id[18] == 16


@pytest.mark.parametrize("weights", ["", "lost.pth", "R-50.pkl"])
def test_nothing_is_known(weights, hands, hands_cfg):
    hands_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4  # so `hands` is not what it was trained on
    found = model_metadata(hands_cfg, weights)
    assert found.get("thing_classes") is None
    assert found.get("thing_dataset_id_to_contiguous_id") is None


@pytest.mark.parametrize("metadata", [None, {"thing_classes": NAMES}])
def test_loading_with_and_without(metadata, tmp_path):
    weights = save(tmp_path, metadata)
    model = nn.Linear(1, 1)
    StrictCheckpointer(model, complete=True).load(weights)
    assert torch.equal(model.weight, torch.load(weights, weights_only=True)["model"]["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thing_classes": ["hand"]}, "my.json has 1 classes, but the model has 3"),
        ({"thing_classes": ["hand", "wand", "glove"]}, "number 2 is 'wand' there, 'glove' in"),
        ({"keypoint_names": ["a", "b"]}, "my.json has 2 keypoints, but the model has 3"),
        ({"keypoint_names": ["left_tip", "right_tip", "wrist"]}, "number 3 is 'wrist' there"),
    ],
)
def test_other_names(change, message, hands, hands_cfg):
    found = dataset_metadata(hands)
    check_names(hands_cfg, found, "my.json", MetadataCatalog.get(hands))
    with pytest.raises(ValueError, match=message):
        check_names(hands_cfg, {**found, **change}, "my.json", found)
    hands_cfg.MODEL.KEYPOINT_ON = False
    if "keypoint_names" in change:  # no matter to a model without
        check_names(hands_cfg, {**found, **change}, "my.json", found)


@pytest.mark.parametrize(("architecture", "classes"), [("RetinaNet", 2), ("ProposalNetwork", 9)])
def test_names_in_other_architectures(architecture, classes, cfg):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES = architecture, 2
    check_names(cfg, {"thing_classes": ["a"] * classes}, "my.json")
    if architecture == "RetinaNet":
        with pytest.raises(ValueError, match="3 classes, but the model has 2"):
            check_names(cfg, {"thing_classes": ["a"] * 3}, "my.json")
