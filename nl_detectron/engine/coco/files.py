"""Register custom data sets in COCO's format, without writing code."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from nl_detectron.engine.coco.flipping import flip_pairs

LINE_COLOR = (255, 127, 14)


def register_coco_files(
    name: str, json_file: str, image_dir: str, required_keys: Collection[str] = ()
) -> None:
    """Register a COCO json file and its image folder; repeated calls with the same files are fine.

    The metadata of ``name`` receives the class names, category ids, keypoint names, skeleton and
    flip pairs.

    Args:
        name: name of the data set in detectron2.
        json_file: path of the annotations.
        image_dir: folder that the ``file_name`` entries are relative to.
        required_keys: keys that every annotation must have, such as "segmentation". If given, the
            file must hold annotations.

    Raises:
        OSError: a path does not exist, or cannot be read.
        ValueError: the file is not valid COCO json, or ``name`` is registered for other files.
    """
    for path in (json_file, image_dir):
        if not Path(path).exists():
            raise FileNotFoundError(f"data set {name!r}: {path} does not exist")
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if (known.json_file, known.image_root) != (json_file, image_dir):
            raise ValueError(
                f"data set {name!r} is already registered, for {known.json_file} and "
                f"{known.image_root}"
            )
        return
    try:
        content = _read_json(json_file)
        _check_annotations(content.get("annotations", ()), content["categories"], required_keys)
        metadata = _metadata(content["categories"])
        first = next(iter(content.get("images", ())), None)
        if required_keys and first and not Path(image_dir, first["file_name"]).exists():
            raise ValueError(f"lists the image {first['file_name']}, which is not in {image_dir}")
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {json_file} {error}") from error
    register_coco_instances(name, metadata, json_file, image_dir)


def _read_json(json_file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(json_file).read_bytes())
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(content, dict) or not content.get("categories"):
        raise ValueError("has no categories")
    _check_required_keys(content["categories"], "category", ("id", "name"))
    _check_required_keys(content.get("images", ()), "image", ("id", "file_name", "height", "width"))
    return content


def _check_annotations(
    annotations: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    required_keys: Collection[str],
) -> None:
    """Find errors that detectron2 and pycocotools would raise later, without explanation."""
    _check_required_keys(
        annotations, "annotation", ("id", "image_id", "category_id", "bbox", *required_keys)
    )
    num_keypoints = {category["id"]: len(category.get("keypoints", ())) for category in categories}
    for annotation in annotations:
        category_id = annotation["category_id"]
        if category_id not in num_keypoints:
            raise ValueError(
                f"has no category {category_id!r}, but annotation {annotation['id']} uses it"
            )
        numbers = len(annotation.get("keypoints", ()))
        if "keypoints" in required_keys and numbers != 3 * num_keypoints[category_id]:
            raise ValueError(
                f"has {numbers} keypoint values in annotation {annotation['id']}, but category "
                f"{category_id} needs {3 * num_keypoints[category_id]}"
            )
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    if "keypoints" in required_keys:
        objects = [annotation for annotation in objects if annotation.get("num_keypoints", 1)]
    if required_keys and not objects:
        raise ValueError("has no objects" + " with keypoints" * ("keypoints" in required_keys))


def _metadata(categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ids = [category["id"] for category in categories]
    if len({type(category_id) for category_id in ids}) > 1:
        raise ValueError(f"has category ids of different types: {ids}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"has duplicate category ids: {ids}")
    ids.sort()
    categories = sorted(categories, key=lambda category: category["id"])
    metadata = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {category_id: i for i, category_id in enumerate(ids)},
    }
    keypoints = {tuple(category["keypoints"]) for category in categories if "keypoints" in category}
    if len(keypoints) > 1:
        raise ValueError(f"has categories with different keypoints: {sorted(keypoints)}")
    for names in keypoints:
        if len(set(names)) < len(names):
            raise ValueError(f"has duplicate keypoint names: {', '.join(names)}")
        metadata["keypoint_names"] = list(names)
        # Only used for drawing, so lines to undefined keypoints are ignored.
        by_number = dict(enumerate(names, start=1))
        metadata["keypoint_connection_rules"] = [
            (by_number[a], by_number[b], LINE_COLOR)
            for category in categories
            for a, b in category.get("skeleton", ())
            if a in by_number and b in by_number
        ]
        metadata["keypoint_flip_map"], _ = flip_pairs(names)
    return metadata


def _check_required_keys(entries: Any, what: str, keys: Sequence[str]) -> None:
    for number, entry in enumerate(entries, start=1):
        for key in keys:
            if not isinstance(entry, dict) or entry.get(key) in (None, [], {}):
                raise ValueError(f"has no {key!r} in {what} number {number}, of {len(entries)}")
