"""A custom data set in COCO's format, made known to detectron2 without writing code."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from nl_detectron.engine.coco.flipping import flip_pairs

LINE_COLOUR = (255, 127, 14)


def register_coco_files(
    name: str, json_file: str, image_dir: str, needs: Collection[str] = ()
) -> None:
    """Register a COCO json file and its image folder; a second call with the same files is allowed.

    Class names, category ids, keypoint names, the lines between keypoints and the keypoints that
    swap when an image is flipped go into the metadata of ``name``.

    Args:
        name: name of the data set for detectron2.
        json_file: path of the annotations.
        image_dir: folder that the ``file_name`` entries are relative to.
        needs: what every annotation must have to train or score on, such as "segmentation"; there
            must be annotations then.

    Raises:
        OSError: one of the two paths is not there, or cannot be read.
        ValueError: not JSON, or not what detectron2 takes; or ``name`` is taken.
    """
    for path in (json_file, image_dir):
        if not Path(path).exists():
            raise FileNotFoundError(f"data set {name!r}: {path} does not exist")
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if (known.json_file, known.image_root) != (json_file, image_dir):
            raise ValueError(f"data set name {name!r} is taken by {known}")
        return
    try:
        content = _read(json_file)
        _check_annotations(content.get("annotations", ()), content["categories"], needs)
        metadata = _metadata(content["categories"])
        first = next(iter(content.get("images", ())), None)
        if needs and first and not Path(image_dir, first["file_name"]).exists():
            raise ValueError(f"names the image {first['file_name']}, which is not in {image_dir}")
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {json_file} {error}") from error
    register_coco_instances(name, metadata, json_file, image_dir)


def _read(json_file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(json_file).read_bytes())
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(content, dict) or not content.get("categories"):
        raise ValueError("has no categories")
    _check_keys(content["categories"], "category", ("id", "name"))
    _check_keys(content.get("images", ()), "image", ("id", "file_name", "height", "width"))
    return content


def _check_annotations(
    annotations: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    needs: Collection[str],
) -> None:
    """Check all that detectron2 and pycocotools would find out later, and not in words."""
    _check_keys(annotations, "annotation", ("id", "image_id", "category_id", "bbox", *needs))
    num_keypoints = {category["id"]: len(category.get("keypoints", ())) for category in categories}
    for annotation in annotations:
        category_id = annotation["category_id"]
        if category_id not in num_keypoints:
            raise ValueError(
                f"has no category {category_id!r}, which annotation {annotation['id']} names"
            )
        numbers = len(annotation.get("keypoints", ()))
        if "keypoints" in needs and numbers != 3 * num_keypoints[category_id]:
            raise ValueError(
                f"has {num_keypoints[category_id]} keypoints in category {category_id}, but "
                f"{numbers} numbers instead of three for each in annotation {annotation['id']}"
            )
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    if "keypoints" in needs:
        objects = [annotation for annotation in objects if annotation.get("num_keypoints", 1)]
    if needs and not objects:
        raise ValueError("has no objects" + " with keypoints" * ("keypoints" in needs))


def _metadata(categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ids = [category["id"] for category in categories]
    if len({type(category_id) for category_id in ids}) > 1:
        raise ValueError(f"has category ids of different types: {ids}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"has several categories of one id: {ids}")
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
            raise ValueError(f"has several keypoints of one name: {', '.join(names)}")
        metadata["keypoint_names"] = list(names)
        # For pictures alone, so a line to a keypoint that is not there is no reason to stop.
        by_number = dict(enumerate(names, start=1))
        metadata["keypoint_connection_rules"] = [
            (by_number[a], by_number[b], LINE_COLOUR)
            for category in categories
            for a, b in category.get("skeleton", ())
            if a in by_number and b in by_number
        ]
        metadata["keypoint_flip_map"], _ = flip_pairs(names)
    return metadata


def _check_keys(entries: Any, what: str, keys: Sequence[str]) -> None:
    for number, entry in enumerate(entries, start=1):
        for key in keys:
            if not isinstance(entry, dict) or entry.get(key) in (None, [], {}):
                raise ValueError(f"has no {key!r} in {what} number {number}, of {len(entries)}")
