"""The scenes on disk, as PNG pictures and COCO annotations, and in detectron2's catalogue.

Two kinds of data set:

* ``instances``: discs and triangles. The class of an object is its shape *and* the colour of the
  beacon ("disc / red"): its box and mask are plain to see, its class only far away.
* ``keypoints``: bars, the same at both ends. The colour of the beacon says which end is the head.
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
    BEACON_COLOURS,
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


def categories(kind: str) -> list[str]:
    """Returns the class names of a kind of data set, in the order of their ids."""
    check_choice("kind", kind, KINDS)
    if kind == "keypoints":
        return [KEYPOINT_SHAPE]
    return [
        _class_name(shape, colour) for shape, colour in product(INSTANCE_SHAPES, BEACON_COLOURS)
    ]


def make_scene(kind: str, split: str, seed: int, index: int) -> Scene:
    """Returns one scene of a data set; it depends on these four values and on nothing else."""
    check_choice("kind", kind, KINDS)
    check_choice("split", split, SPLIT_SIZES)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    rng = np.random.default_rng([seed, KINDS.index(kind), list(SPLIT_SIZES).index(split), index])
    if kind == "keypoints":
        return sample_scene(rng, (KEYPOINT_SHAPE,), tuple(HEAD_SIDE))
    return sample_scene(rng, INSTANCE_SHAPES, tuple(BEACON_COLOURS))


def write_dataset(folder: Path, kind: str, split: str, *, seed: int, size: int) -> None:
    """Writes ``annotations.json`` and the pictures it names; does nothing if it is there already.

    Args:
        folder: where to write; made if it does not exist.
        kind: one of `KINDS`.
        split: a key of `SPLIT_SIZES`; splits of one seed have no scene in common.
        seed: makes the data set; the same seed gives the same bytes.
        size: number of pictures.

    Raises:
        ValueError: unknown ``kind`` or ``split``, negative ``seed``, ``size`` below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    class_names = categories(kind)
    coco: dict[str, Any] = {
        "info": {"description": f"long_range {kind} {split}, seed {seed}", "version": "1"},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)],
    }
    if kind == "keypoints":
        coco["categories"][0].update(keypoints=list(KEYPOINT_NAMES), skeleton=[[1, 2]])
    if (folder / "annotations.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(size):
        scene = make_scene(kind, split, seed, index)
        file_name = f"{index:06d}.png"
        picture = scene.draw()[:, :, ::-1]
        cv2.imwrite(str(folder / file_name), picture, [cv2.IMWRITE_PNG_COMPRESSION, 3])
        coco["images"].append(
            {"id": index, "file_name": file_name, "height": HEIGHT, "width": WIDTH}
        )
        for thing in scene.objects:
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": index,
                    "category_id": 1
                    + class_names.index(_class_name(thing.shape, scene.beacon_colour)),
                    **_annotation(thing, scene.beacon_colour),
                }
            )
    # Written last: where it exists, all pictures do.
    (folder / "annotations.json").write_text(json.dumps(coco))


def register(folder: Path, kind: str, split: str) -> str:
    """Makes a written data set known to detectron2, in place of one of the same name.

    Returns:
        Its name, ``long_range_{kind}_{split}``.
    """
    name = f"long_range_{kind}_{split}"
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    metadata: dict[str, Any] = {"thing_classes": categories(kind)}
    if kind == "instances":
        metadata["thing_colors"] = [BEACON_COLOURS[c.split(" / ")[1]] for c in categories(kind)]
    else:
        metadata["keypoint_names"] = KEYPOINT_NAMES
        # In a mirrored picture the head is still on the side that the colour says.
        metadata["keypoint_flip_map"] = (KEYPOINT_NAMES,)
        metadata["keypoint_connection_rules"] = [(*KEYPOINT_NAMES, (255, 127, 14))]
    register_coco_instances(name, metadata, str(folder / "annotations.json"), str(folder))
    return name


def _class_name(shape: str, beacon_colour: str) -> str:
    return shape if shape == KEYPOINT_SHAPE else f"{shape} / {beacon_colour}"


def _annotation(thing: SceneObject, beacon_colour: str) -> dict[str, Any]:
    x0, y0, x1, y1 = thing.box.tolist()
    segmentation = [thing.polygon.round(2).ravel().tolist()]
    mask = mask_utils.merge(mask_utils.frPyObjects(segmentation, HEIGHT, WIDTH))
    annotation = {
        "iscrowd": 0,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(mask_utils.area(mask)),
        "segmentation": segmentation,
    }
    if thing.ends is not None:
        left, right = thing.ends.tolist()
        head, tail = (left, right) if HEAD_SIDE[beacon_colour] == "left" else (right, left)
        # 2 means labelled and visible.
        annotation.update(keypoints=[*head, 2, *tail, 2], num_keypoints=2)
    return annotation


def check_choice(argument: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {list(allowed)}, got {value!r}")
