"""A person's own COCO files in detectron2's catalogues."""

from __future__ import annotations

import json

import pytest
from detectron2.data import MetadataCatalog

from nl_detectron.coco_files import register_coco_files, use_coco_files


def test_metadata(own_data):
    for _ in range(2):
        register_coco_files("test_metadata", str(own_data), str(own_data.parent / "images"))
    metadata = MetadataCatalog.get("test_metadata")
    assert metadata.thing_classes == ["bar"]
    assert metadata.keypoint_names == ["left_end", "right_end"]
    assert metadata.keypoint_flip_map == [("left_end", "right_end")]


def test_lines_between_keypoints(tmp_path):
    category = {"id": 1, "name": "hand", "keypoints": ["palm", "thumb", "tip"]}
    skeleton = [[1, 2], [2, 3], [3, 4], [0, 1]]  # two of them to keypoints that are not there
    file = tmp_path / "hands.json"
    file.write_text(json.dumps({"categories": [{**category, "skeleton": skeleton}]}))
    register_coco_files("test_lines", str(file), str(tmp_path))
    lines = [rule[:2] for rule in MetadataCatalog.get("test_lines").keypoint_connection_rules]
    assert lines == [("palm", "thumb"), ("thumb", "tip")]


def test_config_takes_over_classes_and_keypoints(own_data, cfg):
    cfg.MODEL.KEYPOINT_ON = True
    use_coco_files(cfg, "train", str(own_data), str(own_data.parent / "images"))
    assert cfg.DATASETS.TRAIN == ("own_train",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 1
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 2


def test_config_needs_keypoints(cfg, tmp_path):
    cfg.MODEL.KEYPOINT_ON = True
    file = tmp_path / "boxes.json"
    file.write_text('{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}')
    with pytest.raises(ValueError, match="boxes.json name no keypoints"):
        use_coco_files(cfg, "test", str(file), str(tmp_path))


def test_errors(own_data, tmp_path):
    images = str(own_data.parent / "images")
    with pytest.raises(FileNotFoundError, match="lost.json does not exist"):
        register_coco_files("test_errors", str(tmp_path / "lost.json"), images)
    broken = tmp_path / "broken.json"
    for text, message in {
        "{": "is not JSON",
        "\xff": "is not JSON",
        "[1]": "no categories",
    }.items():
        broken.write_bytes(text.encode("latin1"))
        with pytest.raises(ValueError, match=f"'test_errors': .*broken.json.*{message}"):
            register_coco_files("test_errors", str(broken), images)
    empty = tmp_path / "empty.json"
    empty.write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match="empty.json has no categories"):
        register_coco_files("test_errors", str(empty), images)
    mixed = tmp_path / "mixed.json"
    categories = [{"id": i, "name": str(i), "keypoints": ["a"] * i} for i in (1, 2)]
    mixed.write_text(json.dumps({"categories": categories}))
    with pytest.raises(ValueError, match="different keypoints"):
        register_coco_files("test_errors", str(mixed), images)
    register_coco_files("test_taken", str(own_data), images)
    with pytest.raises(ValueError, match="'test_taken' is taken"):
        register_coco_files("test_taken", str(mixed), images)
    with pytest.raises(ValueError, match="'test_taken' is taken"):
        register_coco_files("test_taken", str(own_data), str(tmp_path))
