"""Proposal files, which detectron2 unpickles: verified before it does."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode

from nl_detectron.config import default_config
from nl_detectron.engine.coco.data_sets import check_proposals
from tests.malicious import MakeFolder


def config(path):
    cfg = default_config()
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(path),)
    return cfg


def proposals(**changes):
    boxes = [np.random.rand(n, 4).astype("f4") for n in (3, 0)]
    scores = [np.random.rand(len(box)) for box in boxes]
    content = {"ids": [7, 9], "boxes": boxes, "objectness_logits": scores}
    return content | {"bbox_mode": BoxMode.XYXY_ABS} | changes


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_good_files(protocol, older, tmp_path):
    content = proposals()
    if older:  # Detectron
        del content["bbox_mode"]
        content |= {"indexes": content.pop("ids"), "scores": content.pop("objectness_logits")}
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    check_proposals(config(path), training=True)
    (record,) = load_proposals_into_dataset([{"image_id": 7}], str(path))
    assert record["proposal_boxes"].shape == (3, 4)


def test_code_is_not_run(tmp_path):
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps(proposals(cfg=MakeFolder(tmp_path / "trace"))))
    cfg = config(path)
    with pytest.raises(ValueError, match=r"PROPOSAL_FILES_TRAIN: .*p.pkl: it contains posix.mkdir"):
        check_proposals(cfg, training=True)
    assert not (tmp_path / "trace").exists()
    check_proposals(cfg, training=False)  # reads those of DATASETS.TEST alone
    cfg.MODEL.LOAD_PROPOSALS = False
    check_proposals(cfg, training=True)
    load_proposals_into_dataset([{"image_id": 7}], str(path))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "content",
    [
        proposals(boxes=[np.zeros((3, 5)), np.zeros((0, 4))]),
        proposals(objectness_logits=[np.zeros(2), np.zeros(0)]),
        proposals(ids=[7]),
        {"ids": []},
        [1, 2],
    ],
)
def test_wrong_files(content, tmp_path):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"DATASETS.PROPOSAL_FILES_TRAIN: .*p.pkl"):
        check_proposals(config(tmp_path / "p.pkl"), training=True)
