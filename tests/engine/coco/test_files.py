"""Custom COCO files in detectron2's catalogues."""

from __future__ import annotations

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.engine.coco.files import register_coco_files


def test_metadata(custom_data):
    for _ in range(2):
        register_coco_files("test_metadata", str(custom_data), str(custom_data.parent / "images"))
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


@pytest.fixture
def write(tmp_path):
    def write(name="a.json", **content):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return str(path)

    return write


OBJECT = {"id": 5, "image_id": 1, "category_id": 7, "bbox": [0, 0, 2, 2]}
IMAGE = {"id": 1, "file_name": "a.jpg", "height": 2, "width": 2}
HAND = {"id": 7, "name": "hand", "keypoints": ["palm", "thumb"]}


@pytest.mark.parametrize(
    ("content", "needs", "message"),
    [
        ({"categories": [{"name": "a"}]}, (), "no 'id' in category number 1, of 1"),
        ({"categories": [HAND, {"id": 8}]}, (), "no 'name' in category number 2, of 2"),
        ({"categories": ["hand"]}, (), "no 'id' in category number 1"),
        ({"categories": [HAND, HAND | {"id": "8"}]}, (), r"ids of different types: \[7, '8'\]"),
        ({"categories": [HAND, HAND]}, (), r"duplicate category ids: \[7, 7\]"),
        ({"images": [{"id": 1}]}, (), "no 'file_name' in image number 1"),
        ({"annotations": [OBJECT | {"category_id": 8}]}, (), "no category 8, but annotation 5"),
        ({"annotations": [OBJECT | {"bbox": []}]}, (), "no 'bbox' in annotation number 1"),
        ({"annotations": [OBJECT]}, ["area"], "no 'area' in annotation number 1"),
        ({"annotations": [OBJECT | {"iscrowd": 1}]}, ["bbox"], "no objects"),
        ({}, ["bbox"], "no objects"),
        (
            {"annotations": [OBJECT | {"keypoints": [0] * 6, "num_keypoints": 0}]},
            ["keypoints"],
            "no objects with keypoints",
        ),
        (
            {"annotations": [OBJECT | {"keypoints": [0] * 5}]},
            ["keypoints"],
            "5 keypoint values in annotation 5, but category 7 needs 6",
        ),
        ({"categories": [HAND | {"keypoints": ["a", "a"]}]}, (), "duplicate keypoint names"),
    ],
)
def test_what_is_wrong_in_a_file(content, needs, message, write, tmp_path):
    file = write(**{"images": [IMAGE], "annotations": [], "categories": [HAND], **content})
    with pytest.raises(ValueError, match=f"'test_wrong': .*a.json has .*{message}"):
        register_coco_files("test_wrong", file, str(tmp_path), needs)


def test_sides_of_keypoints(write, tmp_path):
    hand = HAND | {"keypoints": ["LThumb", "Palm", "RThumb"]}
    file = write(images=[IMAGE], annotations=[], categories=[hand])
    register_coco_files("test_sides", file, str(tmp_path))
    assert MetadataCatalog.get("test_sides").keypoint_flip_map == [("LThumb", "RThumb")]


def test_metadata_agrees_with_the_loader(write, tmp_path):
    """detectron2 sets class names and ids itself when it loads, and refuses other values."""
    categories = [{"id": 999, "name": "c"}, {"id": 7, "name": "a"}, {"id": 50, "name": "b"}]
    file = write(images=[IMAGE], annotations=[OBJECT | {"category_id": 50}], categories=categories)
    register_coco_files("test_loader", file, str(tmp_path))
    (record,) = DatasetCatalog.get("test_loader")
    assert [o["category_id"] for o in record["annotations"]] == [1]
    assert MetadataCatalog.get("test_loader").thing_classes == ["a", "b", "c"]


def test_errors(custom_data, tmp_path):
    images = str(custom_data.parent / "images")
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
    register_coco_files("test_taken", str(custom_data), images)
    with pytest.raises(ValueError, match="'test_taken' is already registered"):
        register_coco_files("test_taken", str(mixed), images)
    with pytest.raises(ValueError, match="'test_taken' is already registered"):
        register_coco_files("test_taken", str(custom_data), str(tmp_path))
