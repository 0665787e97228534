"""Score a model on a data set: accuracy of clips and videos, or mean average precision.

Shapes: V views and K classes of a video, N videos.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from .confusion import draw_confusion
from .metrics import average_precision, confusion_matrix, top_classes
from .views import combine_views

logger = logging.getLogger("nl_detectron")

MAX_LOGGED_CLASSES, MAX_NAMED_FILES = 30, 8


class VideoEvaluator(DatasetEvaluator):
    """Scores what :class:`.views.MultiViewClassifier` finds in the videos of a data set.

    With one label per video, all numbers in percent: "top1" and "top5" of the videos, "clip_top1"
    and "clip_top5" of all views, "clip1_top1" and "clip1_top5" of the first view of each video.
    Top-5 is left out where there are no more than five classes. With several labels per video:
    "mAP", over the classes that any video has.

    ``OUTPUT_DIR/inference/DATA SET`` receives results.json and, with one label, confusion.png.
    """

    def __init__(self, cfg: CfgNode, dataset_name: str):
        """Create the evaluator.

        Args:
            cfg: config of the model and its views.
            dataset_name: name in detectron2's catalog.
        """
        self.name = dataset_name
        self.classes = list(MetadataCatalog.get(dataset_name).classes)
        self.multi_label = cfg.MODEL.VIDEO.HEAD.MULTI_LABEL
        self.combine = cfg.TEST.VIEWS.COMBINE
        self.max_unreadable = cfg.TEST.MAX_UNREADABLE
        self.protocol = _protocol(cfg)
        self.folder = Path(cfg.OUTPUT_DIR) / "inference" / dataset_name
        self.reset()

    def reset(self) -> None:
        """Forget all videos."""
        self._videos: list[dict[str, Any]] = []
        self._unreadable: list[dict[str, str]] = []

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take the scores of some videos.

        Args:
            inputs: of the model.
            outputs: "scores" (V, K) of each video, or its "error", which names the file.

        Raises:
            ValueError: scores that are not finite.
        """
        for video, output in zip(inputs, outputs):
            if "error" in output:
                entry = {"file_name": video["file_name"], "error": output["error"]}
                self._unreadable.append(entry)
            else:
                self._videos.append(self._tested(video, output["scores"].float().cpu()))

    def _tested(self, video: dict[str, Any], views: Tensor) -> dict[str, Any]:
        if not views.isfinite().all():
            raise ValueError(f"{video['file_name']}: the model's scores are not finite")
        tested = {
            "file_name": video["file_name"],
            "label": video["label"],
            "starts": video["frames"][:, 0].tolist(),
            "scores": combine_views(views, self.combine).numpy(),
        }
        if not self.multi_label:
            tested["right"] = top_classes(views.numpy(), 5) == video["label"]  # (V, 5)
        return tested

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Score the videos of all processes, and write the files.

        Returns:
            ``{"video": scores by name}``; ``None`` except in the main process.

        Raises:
            ValueError: more videos are unreadable than ``TEST.MAX_UNREADABLE`` allows, in
                every process.
        """
        unreadable = list(itertools.chain(*comm.all_gather(self._unreadable)))
        total = sum(comm.all_gather(len(self._videos))) + len(unreadable)
        _check_unreadable(self.name, unreadable, total, self.max_unreadable)
        videos = list(itertools.chain(*comm.gather(self._videos)))
        if not comm.is_main_process():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        score = self._mean_average_precision if self.multi_label else self._accuracy
        metrics, table = score(videos)
        self._log(metrics, table, len(videos), unreadable)
        results = {
            "data_set": self.name,
            "protocol": self.protocol,
            "videos": {"total": total, "scored": len(videos)},
            "unreadable": unreadable,
            "metrics": metrics,
            "classes": table,
            "predictions": [self._prediction(video) for video in videos],
        }
        text = json.dumps(results, indent=1, ensure_ascii=False)
        (self.folder / "results.json").write_text(text, encoding="utf-8")
        return {"video": metrics}

    def _accuracy(self, videos: list[dict[str, Any]]) -> tuple[dict[str, float], list[dict]]:
        best = top_classes(np.stack([video["scores"] for video in videos]), 5)
        labels = np.array([video["label"] for video in videos])
        right = {
            "": best == labels[:, None],
            "clip_": np.concatenate([video["right"] for video in videos]),
            "clip1_": np.stack([video["right"][0] for video in videos]),
        }
        metrics = {}
        for prefix, ranks in right.items():
            for k in (1, 5) if len(self.classes) > 5 else (1,):
                metrics[f"{prefix}top{k}"] = 100 * float(ranks[:, :k].any(1).mean())
        matrix = confusion_matrix(labels, best[:, 0], len(self.classes))
        title = f"{self.name}, {len(videos)} videos, top-1 {metrics['top1']:.1f} %"
        draw_confusion(self.folder / "confusion.png", matrix, self.classes, title)
        table = [
            {"class": name, "videos": int(row.sum()), "top1": _percent(row[k], row.sum())}
            for k, (name, row) in enumerate(zip(self.classes, matrix))
        ]
        return metrics, table

    def _mean_average_precision(
        self, videos: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[dict]]:
        scores = np.stack([video["scores"] for video in videos])
        positive = np.zeros(scores.shape, bool)
        for row, video in zip(positive, videos):
            row[list(video["label"])] = True
        table = [
            {
                "class": name,
                "videos": int(of_class.sum()),
                "AP": 100 * average_precision(found, of_class) if of_class.any() else None,
            }
            for name, found, of_class in zip(self.classes, scores.T, positive.T)
        ]
        known = [row["AP"] for row in table if row["AP"] is not None]
        if not known:
            raise ValueError(f"{self.name}: no video has any label, so there is no mAP")
        if len(known) < len(table):
            logger.warning(
                "%s: %d of %d classes have no videos; the mAP leaves them out.",
                self.name,
                len(table) - len(known),
                len(table),
            )
        return {"mAP": float(np.mean(known))}, table

    def _prediction(self, video: dict[str, Any]) -> dict[str, Any]:
        scores, label = video["scores"], video["label"]
        return {
            "file_name": video["file_name"],
            "label": [self.classes[k] for k in label] if self.multi_label else self.classes[label],
            "top5": [
                {"class": self.classes[k], "score": float(scores[k])}
                for k in top_classes(scores[None], 5)[0]
            ],
            "starts": video["starts"],
        }

    def _log(
        self,
        metrics: dict[str, float],
        table: list[dict[str, Any]],
        scored: int,
        unreadable: list[dict[str, str]],
    ) -> None:
        numbers = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        total = scored + len(unreadable)
        logger.info("%s: %s; %d of %d videos scored", self.name, numbers, scored, total)
        if unreadable:
            logger.warning("Not scored: %s", _name_files(unreadable))
        if len(table) <= MAX_LOGGED_CLASSES:
            score = list(table[0])[-1]
            lines = [f"| class | videos | {score} |", "|---|---:|---:|"]
            for row in table:
                value = "" if row[score] is None else f"{row[score]:.1f}"
                lines.append(f"| {row['class']} | {row['videos']} | {value} |")
            logger.info("%s\n%s", self.name, "\n".join(lines))


def _protocol(cfg: CfgNode) -> dict[str, Any]:
    clip, views, head = cfg.INPUT.CLIP, cfg.TEST.VIEWS, cfg.MODEL.VIDEO.HEAD
    return {
        "frames": clip.NUM_FRAMES,
        "stride": clip.STRIDE,
        "clips": views.NUM_CLIPS,
        "starts": views.STARTS,
        "crops": views.NUM_CROPS or "whole frame",
        "crop_size": views.CROP_SIZE if views.NUM_CROPS else None,
        "short_side": cfg.INPUT.MIN_SIZE_TEST,
        "window": head.POOL_SIZE or "whole map",
        "scores": "sigmoid" if head.MULTI_LABEL else "softmax",
        "combine": views.COMBINE,
    }


def _check_unreadable(
    name: str, unreadable: list[dict[str, str]], total: int, allowed: float
) -> None:
    if len(unreadable) == total:
        raise ValueError(f"no video of {name} can be read: {_name_files(unreadable)}")
    if len(unreadable) > allowed * total:
        raise ValueError(
            f"{len(unreadable)} of {total} videos of {name} cannot be read, more than the share "
            f"that TEST.MAX_UNREADABLE allows, {allowed:g}: {_name_files(unreadable)}"
        )


def _name_files(unreadable: list[dict[str, str]]) -> str:
    errors = [video["error"] for video in unreadable[:MAX_NAMED_FILES]]
    rest = len(unreadable) - len(errors)
    return "; ".join([*errors, *[f"and {rest} more"] * bool(rest)])


def _percent(part: int, whole: int) -> float | None:
    return 100 * float(part) / float(whole) if whole else None
