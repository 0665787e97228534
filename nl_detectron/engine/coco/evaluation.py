"""COCO evaluation on every task of a model, even if nothing was detected."""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator

logger = logging.getLogger(__name__)


def evaluation_tasks(cfg: CfgNode) -> tuple[str, ...]:
    """Return the tasks to evaluate a model on: "bbox", "segm", "keypoints"."""
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return ("bbox",)
    masks, keypoints = cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON
    return ("bbox", *["segm"] * masks, *["keypoints"] * keypoints)


class Evaluator(COCOEvaluator):
    """detectron2's COCO evaluator, with an AP of 0 if a model detects nothing.

    The stock evaluator infers the tasks from the detections, and returns NaN if there are none.
    """

    def __init__(self, cfg: CfgNode, dataset_name: str):
        """See ``COCOEvaluator``; respects ``TEST.KEYPOINT_OKS_SIGMAS``."""
        super().__init__(
            dataset_name,
            evaluation_tasks(cfg),
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if coco_eval is not None:
            return results
        logger.warning("%s: nothing was detected, so the AP is 0.", iou_type)
        classes = class_names if class_names and len(class_names) > 1 else []
        return dict.fromkeys([*results, *[f"AP-{name}" for name in classes]], 0.0)
