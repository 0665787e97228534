"""Query the attention of a model from pixels, or from the keypoints of its detections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata

from nl_detectron.analysis.attention import attention_map, record_attention
from nl_detectron.analysis.drawing import Box, Detection
from nl_detectron.analysis.geometry import AttentionMap, FeatureGrid, middle_frame
from nl_detectron.backbone import block_stride


class QuerySpec(NamedTuple):
    """The points to query attention from, and the blocks to query.

    Attributes:
        pixels: x, y of each pixel.
        joints: dict from the name of each joint to its index in the model; taken from the detection
            with the highest score.
        blocks: patterns, see :func:`nl_detectron.non_local.find_blocks`.
        score_threshold: minimum score of a detection.
    """

    pixels: Sequence[tuple[int, int]]
    joints: Mapping[str, int]
    blocks: Sequence[str] = ()
    score_threshold: float = 0.5


class QueryResult(NamedTuple):
    """Attention of one query in one block.

    Attributes:
        block: full name of the block.
        query: name of the joint, or "x_y".
        title: the query in readable form.
        attention: the map.
        detection: the detection that the joint belongs to, or whose RoI contains the query.
        crop: for a block in an RoI head, the region around the RoI; otherwise None.
        clip: number of each frame of the clip in its video; empty for an image.
        stride: number of frames of the clip that a position of the map stands for.
    """

    block: str
    query: str
    title: str
    attention: AttentionMap
    detection: Detection | None
    crop: Box | None
    clip: Sequence[int] = ()
    stride: int = 1

    @property
    def summary(self) -> str:
        """One line for a log: where the attention is highest."""
        attention = self.attention
        key = attention.topk(1)[0]
        x, y = key.center
        where = f"({x:.0f}, {y:.0f})"
        if self.clip:
            middle = middle_frame(key.frame, self.stride, len(self.clip))
            where += f" around frame {self.clip[middle]}"
        padding = attention.weights[:, ~attention.in_image].sum()
        return (
            f"most to {where}, weight {key.weight:.3f} of "
            f"{attention.weights.sum():.3f}, padding {padding:.3f}"
        )


class _Detections(NamedTuple):
    """Detections by descending score: boxes (R, 4), scores (R,), classes (R,), joints (R, J, 2)."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    joints: np.ndarray


def joint_indices(joints: Sequence[str], cfg: CfgNode, metadata: Metadata) -> dict[str, int]:
    """Look up joints by name or by index.

    Raises:
        ValueError: the model has no such joint.
    """
    num_joints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
    names = list(metadata.get("keypoint_names", ()))
    indices = {str(i): i for i in range(num_joints)}
    indices.update(zip(names, range(num_joints)))
    for joint in joints:
        if joint not in indices:
            choices = ", ".join(names) or (f"0 to {num_joints - 1}" if num_joints else "none")
            raise ValueError(
                f"--joint must be one of the model's joints ({choices}), got {joint!r}"
            )
    return {joint: indices[joint] for joint in joints}


def query_attention(
    queries: QuerySpec, predictor: Any, metadata: Metadata, sample: Any
) -> Iterator[QueryResult]:
    """Run a model on an image or a clip, and yield the attention of every query in every block.

    Args:
        queries: the points and blocks to query.
        predictor: what :func:`nl_detectron.engine.predictor.build_predictor` returns.
        metadata: holds the class names.
        sample: a :class:`nl_detectron.engine.predictor.Sample` of the predictor.

    Raises:
        ValueError: a query is outside the image, or no detection matches it.
    """
    size = sample.size
    for column, row in queries.pixels:
        if not (0 <= column < size[1] and 0 <= row < size[0]):
            raise ValueError(
                f"--query {column},{row} is outside the {'frames' if sample.clip else 'image'}, "
                f"{size[1]} x {size[0]} pixels"
            )
    model: Any = predictor.model
    with torch.no_grad(), record_attention(model, *queries.blocks) as recordings:
        detections = _detect(model, sample.inputs, size)
    names = metadata.get("thing_classes", ())
    confident = detections.scores >= queries.score_threshold

    def label(i: int) -> Detection:
        c = int(detections.classes[i])
        name = names[c] if c < len(names) else f"class {c}"
        return Detection(tuple(detections.boxes[i].tolist()), f"{name} {detections.scores[i]:.0%}")

    for recording in recordings.values():
        frames = predictor.frame_stride(recording.name)
        for query, title, index, (x, y) in _query_points(queries, detections, confident):
            if sample.clip:
                query = f"{query}_{sample.clip[sample.frame]}"
                title = f"{title} in frame {sample.clip[sample.frame]}"
            if recording.name.startswith("backbone."):
                stride = block_stride(model.backbone, recording.block)
                grid, crop = FeatureGrid.for_stage(stride, size, sample.input_size, frames), None
                attention = attention_map(recording, grid, size, x, y, frame=sample.frame)
            else:
                roi = index
                if roi is None:
                    roi = _first_box_containing(detections.boxes[confident], x, y)
                grid = FeatureGrid.for_roi(detections.boxes[roi], recording.last_input.shape[2:])
                attention = attention_map(recording, grid, size, x, y, sample=roi)
                crop, index = _expand_box(detections.boxes[roi], size), roi
            outlined = None if index is None else label(index)
            yield QueryResult(
                recording.name, query, title, attention, outlined, crop, sample.clip, frames
            )


def _detect(model: Any, inputs: dict[str, Any], image_size: Sequence[int]) -> _Detections:
    """Run the model and return its detections in coordinates of the original image."""
    if not hasattr(model, "roi_heads"):
        model([inputs])
        return _Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0), np.zeros((0, 0, 2)))
    # Skip postprocessing, which drops detections: these boxes are the RoIs of the heads.
    (detections,) = model.inference([inputs], do_postprocess=False)
    height, width = inputs["image"].shape[1:]
    scale = np.array([image_size[1] / width, image_size[0] / height])
    boxes = detections.pred_boxes.tensor.cpu().numpy()
    joints = np.zeros((len(boxes), 0, 3))
    if detections.has("pred_keypoints"):
        joints = detections.pred_keypoints.cpu().numpy()
    return _Detections(
        boxes * np.tile(scale, 2),
        detections.scores.cpu().numpy(),
        detections.pred_classes.cpu().numpy(),
        joints[..., :2] * scale,
    )


def _query_points(
    queries: QuerySpec, detections: _Detections, confident: np.ndarray
) -> Iterator[tuple[str, str, int | None, tuple[float, float]]]:
    """Yield name, title, index of the detection (None for pixels) and x, y of each query."""
    for x, y in queries.pixels:
        yield f"{x}_{y}", f"query ({x}, {y})", None, (x + 0.5, y + 0.5)
    for joint, index in queries.joints.items():
        if not confident.any():
            best = (
                ""
                if not len(detections.scores)
                else f"; the highest is {detections.scores.max():.2f}"
            )
            raise ValueError(
                f"no detection reaches --score-threshold {queries.score_threshold:g}{best}"
            )
        title = f"joint {joint}" if joint.isdecimal() else joint
        yield joint, title, 0, tuple(detections.joints[0, index].tolist())


def _first_box_containing(boxes: np.ndarray, x: float, y: float) -> int:
    """Return the index of the first box that contains the point."""
    inside = (boxes[:, :2] <= [x, y]).all(axis=1) & ([x, y] < boxes[:, 2:]).all(axis=1)
    if not inside.any():
        raise ValueError(
            f"--query {int(x)},{int(y)} is in none of the {len(boxes)} detections that reach "
            "--score-threshold"
        )
    return int(inside.argmax())


def _expand_box(box: np.ndarray, image_size: Sequence[int]) -> Box:
    """Expand a box by a tenth of its longer side, and clip it to the image."""
    x0, y0, x1, y1 = box.tolist()
    margin = 0.1 * max(x1 - x0, y1 - y0)
    height, width = image_size
    return (
        max(x0 - margin, 0),
        max(y0 - margin, 0),
        min(x1 + margin, width),
        min(y1 + margin, height),
    )
