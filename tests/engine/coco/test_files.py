"""Custom COCO files in detectron2's catalogs."""

from __future__ import annotations

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from nl_detectron.engine.coco.files import register_coco_files


def test_metadata(custom_data):
    for _ in range(2):
        register_coco_files("test_metadata", str(custom_data), str(custom_data.parent / "images"))
    metadata = MetadataCatalog.get("test_metadata")
    assert metadata.thing_classes == ["bar"]
    assert metadata.keypoint_names == ["left_end", "right_end"]
    assert metadata.keypoint_flip_map == [("left_end", "right_end")]


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "a.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), "latin1")
        return str(path)

    return write


OBJECT = {"id": 5, "image_id": 1, "category_id": 7, "bbox": [0, 0, 2, 2]}
IMAGE = {"id": 1, "file_name": "a.jpg", "height": 2, "width": 2}
HAND = {"id": 7, "name": "hand", "keypoints": ["palm", "thumb"]}
SOUND = {"images": [IMAGE], "annotations": [], "categories": [HAND]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ("[1]", "no categories"),
        ('{"images": [], "annotations": []}', "no categories"),
        ({"categories": [{"name": "a"}]}, "no 'id' in category number 1, of 1"),
        ({"categories": [HAND, {"id": 8}]}, "no 'name' in category number 2, of 2"),
        ({"categories": ["hand"]}, "no 'id' in category number 1"),
        ({"categories": [HAND, HAND | {"id": "8"}]}, r".*ids of different types: \[7, '8'\]"),
        ({"categories": [HAND, HAND]}, r"duplicate category ids: \[7, 7\]"),
        (
            {"categories": [HAND, HAND | {"id": 8, "keypoints": ["a"]}]},
            "categories with different keypoints",
        ),
        ({"categories": [HAND | {"keypoints": ["a", "a"]}]}, "duplicate keypoint names"),
        ({"categories": [HAND | {"keypoints": ["a", 1]}]}, r"'keypoints' .* number 1, of 1: \['a'"),
        ({"categories": [HAND | {"skeleton": [[1, "2"]]}]}, r"'skeleton' .*: \[\[1, '2'\]\]"),
        ({"categories": [HAND | {"id": [1]}]}, "'id' that is not valid in category number 1"),
        ({"categories": [HAND | {"name": "\ud800"}]}, "'name' that is not valid"),
        ({"images": {}}, "images that are not a list"),
        ("[" * 10**5, "not JSON that Python can read: "),
        ('{"categories": 1' + "0" * 5000 + "}", "not JSON that Python can read: .*4300 digits"),
    ],
)
def test_what_is_wrong_in_a_file(content, message, write, tmp_path):
    file = write(content if isinstance(content, str) else SOUND | content)
    with pytest.raises(ValueError, match=f"'test_wrong': .*a.json (has|is) (a )?{message}"):
        register_coco_files("test_wrong", file, str(tmp_path))


@pytest.mark.parametrize(
    ("encoding", "message"), [("utf-8-sig", "byte order mark"), ("utf-16", "in UTF-8")]
)
def test_encodings_that_pycocotools_does_not_read(encoding, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(SOUND), encoding)
    with pytest.raises(ValueError, match="BOM|can't decode"):
        COCO(file)
    with pytest.raises(ValueError, match=message):
        register_coco_files("test_wrong", str(file), str(tmp_path))


def test_other_files(custom_data, write, tmp_path):
    images = str(custom_data.parent / "images")
    with pytest.raises(FileNotFoundError, match="lost.json does not exist"):
        register_coco_files("test_errors", str(tmp_path / "lost.json"), images)
    register_coco_files("test_taken", str(custom_data), images)
    for file, folder in ((write(SOUND), images), (str(custom_data), str(tmp_path))):
        with pytest.raises(ValueError, match="'test_taken' is already registered"):
            register_coco_files("test_taken", file, folder)


def test_keypoints(write, tmp_path):
    """Two of the lines are to keypoints that are not there."""
    hand = {"keypoints": ["LThumb", "Palm", "RThumb"], "skeleton": [[1, 2], [2, 3], [3, 4], [0, 1]]}
    register_coco_files("test_hand", write({"categories": [HAND | hand]}), str(tmp_path))
    metadata = MetadataCatalog.get("test_hand")
    assert metadata.keypoint_flip_map == [("LThumb", "RThumb")]
    lines = [rule[:2] for rule in metadata.keypoint_connection_rules]
    assert lines == [("LThumb", "Palm"), ("Palm", "RThumb")]


def test_metadata_agrees_with_the_loader(write, tmp_path):
    """detectron2 sets class names and ids itself when it loads, and refuses other values."""
    categories = [{"id": 999, "name": "c"}, {"id": 7, "name": "a"}, {"id": 50, "name": "b"}]
    objects = [OBJECT | {"category_id": 50}]
    file = write(SOUND | {"categories": categories, "annotations": objects})
    register_coco_files("test_loader", file, str(tmp_path))
    (record,) = DatasetCatalog.get("test_loader")
    assert [o["category_id"] for o in record["annotations"]] == [1]
    assert MetadataCatalog.get("test_loader").thing_classes == ["a", "b", "c"]
