"""Scores of detections that are known."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from detectron2.structures import Boxes, Instances

from nl_detectron.engine.coco.trainer import CocoTrainer


@pytest.fixture
def evaluate(cfg, custom_data_name, custom_data, tmp_path):
    """Score the squares of ``custom_data`` themselves, or nothing."""
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]

    def evaluate(found):
        evaluator = CocoTrainer.build_evaluator(cfg, custom_data_name)
        evaluator.reset()
        for a in json.loads(custom_data.read_text())["annotations"]:
            x, y, width, height = a["bbox"]
            instances = Instances((64, 96))
            instances.pred_boxes = Boxes(torch.tensor([[x, y, x + width, y + height]]))
            instances.scores, instances.pred_classes = torch.ones(1), torch.tensor([0])
            if cfg.MODEL.MASK_ON:
                instances.pred_masks = torch.zeros(1, 64, 96, dtype=torch.bool)
                instances.pred_masks[0, y : y + height, x : x + width] = True
            if cfg.MODEL.KEYPOINT_ON:
                instances.pred_keypoints = torch.tensor(a["keypoints"]).float().view(1, -1, 3)
                instances.pred_keypoints[:, :, :2] += 0.5  # pixels are counted from their centres
            instances = instances[torch.tensor([found])]
            evaluator.process([{"image_id": a["image_id"]}], [{"instances": instances}])
        return evaluator.evaluate()

    return evaluate


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("keypoints", [False, True])
def test_all_or_nothing(masks, keypoints, evaluate, cfg, caplog):
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = masks, keypoints
    tasks = {"bbox", *["segm"] * masks, *["keypoints"] * keypoints}
    everything = evaluate(found=True)
    assert {task: round(scores["AP"]) for task, scores in everything.items()} == dict.fromkeys(
        tasks, 100
    )
    with caplog.at_level(logging.WARNING, "nl_detectron"):
        nothing = evaluate(found=False)
    assert nothing.keys() == tasks
    for task, scores in nothing.items():
        assert scores.keys() == everything[task].keys()
        assert set(scores.values()) == {0.0}
        assert f"{task}: nothing was detected, so the AP is 0." in caplog.messages


def test_retinanet_has_boxes_alone(evaluate, cfg):
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.MASK_ON = True  # no matter to it
    assert set(evaluate(found=False)) == {"bbox"}
