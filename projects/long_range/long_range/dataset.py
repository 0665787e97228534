"""Write the scenes to disk as PNG images and COCO annotations, and register them with detectron2.

There are two kinds of data sets:

* ``instances``: discs and triangles. The class of an object is its shape *and* the color of the
  beacon ("disc / red"): box and mask can be seen locally, the class only from far away.
* ``keypoints``: bars with two equal ends. The color of the beacon tells which end is the head.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools import mask as mask_utils

from .scene import (
    BEACON_COLORS,
    HEAD_SIDE,
    HEIGHT,
    INSTANCE_SHAPES,
    KEYPOINT_SHAPE,
    WIDTH,
    Scene,
    SceneObject,
    sample_scene,
)

KINDS = ("instances", "keypoints")
SPLIT_SIZES = {"train": 1200, "val": 120}
KEYPOINT_NAMES = ("head", "tail")


def class_names(kind: str) -> list[str]:
    """Return the class names of a kind of data set, in the order of their ids."""
    check_choice("kind", kind, KINDS)
    if kind == "keypoints":
        return [KEYPOINT_SHAPE]
    return [_class_name(shape, color) for shape, color in product(INSTANCE_SHAPES, BEACON_COLORS)]


def make_scene(kind: str, split: str, seed: int, index: int) -> Scene:
    """Generate a scene of a data set; it depends only on the four arguments."""
    check_choice("kind", kind, KINDS)
    check_choice("split", split, SPLIT_SIZES)
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    rng = np.random.default_rng([seed, KINDS.index(kind), list(SPLIT_SIZES).index(split), index])
    if kind == "keypoints":
        return sample_scene(rng, (KEYPOINT_SHAPE,), tuple(HEAD_SIDE))
    return sample_scene(rng, INSTANCE_SHAPES, tuple(BEACON_COLORS))


def write_dataset(folder: Path, kind: str, split: str, *, seed: int, size: int) -> None:
    """Write ``annotations.json`` and its images, unless the file exists.

    Args:
        folder: folder to write to; created if it does not exist.
        kind: one of `KINDS`.
        split: a key of `SPLIT_SIZES`; splits with the same seed share no scene.
        seed: seed of the data set; the same seed gives the same bytes.
        size: number of images.

    Raises:
        ValueError: unknown ``kind`` or ``split``, negative ``seed``, or ``size`` below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    names = class_names(kind)
    coco: dict[str, Any] = {
        "info": {"description": f"long_range {kind} {split}, seed {seed}", "version": "1"},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
    }
    if kind == "keypoints":
        coco["categories"][0].update(keypoints=list(KEYPOINT_NAMES), skeleton=[[1, 2]])
    if (folder / "annotations.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(size):
        scene = make_scene(kind, split, seed, index)
        file_name = f"{index:06d}.png"
        image = scene.draw()[:, :, ::-1]
        cv2.imwrite(str(folder / file_name), image, [cv2.IMWRITE_PNG_COMPRESSION, 3])
        coco["images"].append(
            {"id": index, "file_name": file_name, "height": HEIGHT, "width": WIDTH}
        )
        for obj in scene.objects:
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": index,
                    "category_id": 1 + names.index(_class_name(obj.shape, scene.beacon_color)),
                    **_annotation(obj, scene.beacon_color),
                }
            )
    # Written last: if it exists, so do all images.
    (folder / "annotations.json").write_text(json.dumps(coco))


def register_dataset(folder: Path, kind: str, split: str) -> str:
    """Register a data set that was written with detectron2, replacing one of the same name.

    Returns:
        Its name, ``long_range_{kind}_{split}``.
    """
    name = f"long_range_{kind}_{split}"
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    metadata: dict[str, Any] = {"thing_classes": class_names(kind)}
    if kind == "instances":
        metadata["thing_colors"] = [BEACON_COLORS[c.split(" / ")[1]] for c in class_names(kind)]
    else:
        metadata["keypoint_names"] = KEYPOINT_NAMES
        # In a flipped image, the color still names the side of the head.
        metadata["keypoint_flip_map"] = (KEYPOINT_NAMES,)
        metadata["keypoint_connection_rules"] = [(*KEYPOINT_NAMES, (255, 127, 14))]
    register_coco_instances(name, metadata, str(folder / "annotations.json"), str(folder))
    return name


def _class_name(shape: str, beacon_color: str) -> str:
    return shape if shape == KEYPOINT_SHAPE else f"{shape} / {beacon_color}"


def _annotation(obj: SceneObject, beacon_color: str) -> dict[str, Any]:
    x0, y0, x1, y1 = obj.box.tolist()
    segmentation = [obj.polygon.round(2).ravel().tolist()]
    mask = mask_utils.merge(mask_utils.frPyObjects(segmentation, HEIGHT, WIDTH))
    annotation = {
        "iscrowd": 0,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(mask_utils.area(mask)),
        "segmentation": segmentation,
    }
    if obj.ends is not None:
        left, right = obj.ends.tolist()
        head, tail = (left, right) if HEAD_SIDE[beacon_color] == "left" else (right, left)
        # 2: labelled and visible
        annotation.update(keypoints=[*head, 2, *tail, 2], num_keypoints=2)
    return annotation


def check_choice(argument: str, value: str, allowed: Any) -> None:
    """Raise a ``ValueError`` unless the value is allowed."""
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {list(allowed)}, got {value!r}")
