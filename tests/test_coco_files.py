"""A person's own COCO files in detectron2's catalogues."""

from __future__ import annotations

import json

import pytest
from detectron2.data import MetadataCatalog

from nl_detectron.coco_files import register_coco_files


def test_metadata(own_data):
    for _ in range(2):
        register_coco_files("test_metadata", str(own_data), str(own_data.parent / "images"))
    metadata = MetadataCatalog.get("test_metadata")
    assert metadata.thing_classes == ["bar"]
    assert metadata.keypoint_names == ["left_end", "right_end"]
    assert metadata.keypoint_flip_map == [("left_end", "right_end")]


def test_errors(own_data, tmp_path):
    images = str(own_data.parent / "images")
    with pytest.raises(FileNotFoundError, match="lost.json does not exist"):
        register_coco_files("test_errors", str(tmp_path / "lost.json"), images)
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
