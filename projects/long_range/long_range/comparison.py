"""Draw the predictions of models from the files that COCOEvaluator writes."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from .scene import BEACON_COLORS, HEIGHT, WIDTH

_HALO = [patheffects.withStroke(linewidth=2, foreground="white")]


def draw_predictions(
    path: Path, data: Path, predictions: Mapping[str, Path], image_ids: Sequence[int]
) -> None:
    """Draw images side by side, and below each the ground truth and every model's predictions.

    Args:
        path: PNG file to write.
        data: folder of the data set.
        predictions: label of a model to its ``coco_instances_results.json``.
        image_ids: ids of the images, one column each.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations.json"))
        sources = {"image": None, "truth": truth}
        for label, file in predictions.items():
            found = json.loads(file.read_text())
            sources[label] = truth.loadRes(found) if found else COCO()
    figure = Figure(figsize=(5 * len(image_ids), 1.43 * len(sources)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(sources), len(image_ids), squeeze=False)
    for axes, (label, image_id) in zip(grid.flat, product(sources, image_ids)):
        image = cv2.imread(str(data / truth.loadImgs(image_id)[0]["file_name"]))[:, :, ::-1]
        axes.imshow(image)
        axes.set(xticks=[], yticks=[], ylabel=label if image_id == image_ids[0] else "")
        if label == "image":
            _mark_beacon(axes, image)
        else:
            objects = len(truth.getAnnIds(imgIds=image_id))
            for annotation in _best(sources[label], image_id, objects):
                _draw_object(axes, sources[label], annotation)
    figure.savefig(path, dpi=96)


def _best(source: COCO, image_id: int, count: int) -> list[dict]:
    """Return the highest-scoring predictions that do not overlap, at most ``count``."""
    annotations = source.loadAnns(source.getAnnIds(imgIds=image_id))
    kept: list[dict] = []
    for candidate in sorted(annotations, key=lambda a: -a.get("score", 1.0)):
        boxes = [other["bbox"] for other in kept]
        if not kept or mask_utils.iou([candidate["bbox"]], boxes, [0] * len(kept)).max() < 0.5:
            kept.append(candidate)
    return kept[:count]


def _draw_object(axes: Axes, source: COCO, annotation: dict) -> None:
    name = source.loadCats(annotation["category_id"])[0]["name"]
    score = f" {annotation['score']:.0%}" if "score" in annotation else ""
    x, y, width, height = annotation["bbox"]
    if "keypoints" in annotation:
        head, tail = annotation["keypoints"][0:2], annotation["keypoints"][3:5]
        axes.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": "C1", "lw": 2.5})
        return
    color = np.array(BEACON_COLORS[name.split(" / ")[1]]) / 255
    axes.contour(source.annToMask(annotation), [0.5], colors=[color], linewidths=2)
    # Below the object, or above it if there is no room.
    below = y + height < HEIGHT - 10
    axes.text(
        np.clip(x + width / 2, 50, WIDTH - 50),
        y + height + 2 if below else y - 2,
        name + score,
        color=color,
        fontsize=8,
        ha="center",
        va="top" if below else "bottom",
        path_effects=_HALO,
    )


def _mark_beacon(axes: Axes, image: np.ndarray) -> None:
    # Only the beacon is not gray.
    y, x = np.argwhere(np.ptp(image.astype(int), axis=2) > 60).mean(axis=0)
    on_left = x < image.shape[1] / 2
    axes.annotate(
        "beacon",
        (x + 16 if on_left else x - 16, y),
        (x + 45 if on_left else x - 45, y),
        ha="left" if on_left else "right",
        va="center",
        arrowprops={"arrowstyle": "->"},
    )
