"""Where to look from in an image: pixels, and joints of what a detector finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata

from nl_detectron.analysis.attention import attention_map, record_attention, stride_of
from nl_detectron.analysis.drawing import Box, Detection
from nl_detectron.analysis.geometry import AttentionMap, CellGrid


class Queries(NamedTuple):
    """What to look from, and through which blocks.

    Attributes:
        pixels: x and y.
        joints: name to index among the model's; of the best detection.
        blocks: patterns as in :func:`nl_detectron.non_local.find_blocks`.
        score_threshold: of detections.
    """

    pixels: Sequence[tuple[int, int]]
    joints: Mapping[str, int]
    blocks: Sequence[str] = ()
    score_threshold: float = 0.5


class Answer(NamedTuple):
    """Attention of one query through one block.

    Attributes:
        block: full name of the block.
        query: name of the joint, or "x_y".
        title: the same, for a reader.
        attention: the map.
        detection: whose joint, or in whose RoI, the query is.
        view: the part of the image around the RoI that the block sees, if it sees no more.
    """

    block: str
    query: str
    title: str
    attention: AttentionMap
    detection: Detection | None
    view: Box | None

    @property
    def in_words(self) -> str:
        """Where it looks most, for a log."""
        attention = self.attention
        key = attention.strongest(1)[0]
        x, y = key.centre
        padding = attention.weights[:, ~attention.in_image].sum()
        return (
            f"most to ({x:.0f}, {y:.0f}), weight {key.weight:.3f} of "
            f"{attention.weights.sum():.3f}, padding {padding:.3f}"
        )


class _Found(NamedTuple):
    """Detections, the best first: boxes (R, 4), scores (R,), classes (R,), joints (R, J, 2)."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    joints: np.ndarray


def joint_indices(joints: Sequence[str], cfg: CfgNode, metadata: Metadata) -> dict[str, int]:
    """Find joints that are given by name or by index.

    Raises:
        ValueError: the model has no such joint.
    """
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
    names = list(metadata.get("keypoint_names", ()))
    indices = {str(i): i for i in range(number)}
    indices.update(zip(names, range(number)))
    for joint in joints:
        if joint not in indices:
            there = ", ".join(names) or (f"0 to {number - 1}" if number else "none")
            raise ValueError(f"no joint {joint!r}; the joints of the model: {there}")
    return {joint: indices[joint] for joint in joints}


def answer(
    queries: Queries, predictor: Any, metadata: Metadata, image: np.ndarray
) -> Iterator[Answer]:
    """Run a detector on an image and tell where its blocks look.

    Args:
        queries: what to look from.
        predictor: a :class:`nl_detectron.engine.predictor.Predictor` of the detector.
        metadata: names of its classes.
        image: BGR, uint8, (H, W, 3).

    Raises:
        ValueError: a query has no place in the image.
    """
    size = image.shape[:2]
    for column, row in queries.pixels:
        if not (0 <= column < size[1] and 0 <= row < size[0]):
            raise ValueError(
                f"--query {column},{row} is outside the image of {size[1]} x {size[0]}"
            )
    model: Any = predictor.model
    inputs = predictor.network_input(image)
    with torch.no_grad(), record_attention(model, *queries.blocks) as recordings:
        found = _detect(model, inputs, size)
    names = metadata.get("thing_classes", ())
    good = found.scores >= queries.score_threshold

    def detection(i: int) -> Detection:
        c = int(found.classes[i])
        name = names[c] if c < len(names) else f"class {c}"
        return Detection(tuple(found.boxes[i].tolist()), f"{name} {found.scores[i]:.0%}")

    for recording in recordings.values():
        for query, title, who, (x, y) in _points(queries, found, good):
            if recording.name.startswith("backbone."):
                stride = stride_of(model.backbone, recording.block)
                grid, view = CellGrid.of_stage(stride, size, inputs["image"].shape[1:]), None
                attention = attention_map(recording, grid, size, x, y)
            else:
                roi = _first_holding(found.boxes[good], x, y) if who is None else who
                grid = CellGrid.of_roi(found.boxes[roi], recording.last_input.shape[2:])
                attention = attention_map(recording, grid, size, x, y, sample=roi)
                view, who = _with_margin(found.boxes[roi], size), roi
            outlined = None if who is None else detection(who)
            yield Answer(recording.name, query, title, attention, outlined, view)


def _detect(model: Any, inputs: dict[str, Any], image_size: Sequence[int]) -> _Found:
    """Run the model; what it finds, in coordinates of the original image."""
    if not hasattr(model, "roi_heads"):
        model([inputs])
        return _Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0), np.zeros((0, 0, 2)))
    # Before postprocessing, which drops detections: these are the RoIs of the heads.
    (found,) = model.inference([inputs], do_postprocess=False)
    height, width = inputs["image"].shape[1:]
    scale = np.array([image_size[1] / width, image_size[0] / height])
    boxes = found.pred_boxes.tensor.cpu().numpy()
    joints = np.zeros((len(boxes), 0, 3))
    if found.has("pred_keypoints"):
        joints = found.pred_keypoints.cpu().numpy()
    return _Found(
        boxes * np.tile(scale, 2),
        found.scores.cpu().numpy(),
        found.pred_classes.cpu().numpy(),
        joints[..., :2] * scale,
    )


def _points(
    queries: Queries, found: _Found, good: np.ndarray
) -> Iterator[tuple[str, str, int | None, tuple[float, float]]]:
    """Name, title, detection if it is a joint's, and coordinates of each query."""
    for x, y in queries.pixels:
        yield f"{x}_{y}", f"query ({x}, {y})", None, (x + 0.5, y + 0.5)
    for joint, index in queries.joints.items():
        if not good.any():
            best = f"; the best has {found.scores.max():.2f}" if len(found.scores) else ""
            raise ValueError(f"no detection of score {queries.score_threshold:g} or more{best}")
        title = f"joint {joint}" if joint.isdecimal() else joint
        yield joint, title, 0, tuple(found.joints[0, index].tolist())


def _first_holding(boxes: np.ndarray, x: float, y: float) -> int:
    """Index of the first box that the point is in."""
    holding = (boxes[:, :2] <= [x, y]).all(axis=1) & ([x, y] < boxes[:, 2:]).all(axis=1)
    if not holding.any():
        raise ValueError(
            f"--query {int(x)},{int(y)} is in none of the {len(boxes)} detections at or above "
            "--score-threshold"
        )
    return int(holding.argmax())


def _with_margin(box: np.ndarray, image_size: Sequence[int]) -> Box:
    """The box and a tenth of its size around it, as far as the image goes."""
    x0, y0, x1, y1 = box.tolist()
    margin = 0.1 * max(x1 - x0, y1 - y0)
    height, width = image_size
    return (
        max(x0 - margin, 0),
        max(y0 - margin, 0),
        min(x1 + margin, width),
        min(y1 + margin, height),
    )
