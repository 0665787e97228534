"""The results file: hand-written boxes come back, and it is whole JSON at any time."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from nl_detectron.engine.coco.results import ResultsFile


@pytest.fixture
def found():
    found = Instances((20, 30))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 2, 4, 8], [0, 0, 10, 5]]))
    found.scores = torch.tensor([0.75, 0.5])
    found.pred_classes = torch.tensor([2, 0])
    return found


def read(path):
    return json.loads(path.read_text())


def test_whole_after_every_image(found, tmp_path):
    path = tmp_path / "found.json"
    metadata = Metadata(thing_dataset_id_to_contiguous_id={7: 0, 50: 1, 999: 2})
    expected = [
        {"image_id": 139, "category_id": 999, "bbox": [1, 2, 3, 6], "score": 0.75},
        {"image_id": 139, "category_id": 7, "bbox": [0, 0, 10, 5], "score": 0.5},
    ]
    path.write_text("of a run before, and longer" * 99)
    with ResultsFile(path, metadata) as results:
        assert read(path) == []
        results.add(found[:0], 1)
        assert read(path) == []
        results.add(found, 139)
        assert read(path) == expected
        results.add(found[:0], 2)
        results.add(found[1:], "cat")
        assert read(path) == [*expected, {**expected[1], "image_id": "cat"}]


def test_classes_are_counted_where_no_ids_are_known(found, tmp_path):
    with ResultsFile(tmp_path / "found.json", Metadata()) as results:
        results.add(found, 1)
    assert [result["category_id"] for result in read(tmp_path / "found.json")] == [3, 1]


def test_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="cannot be written: Is a directory"):
        ResultsFile(tmp_path, Metadata())
