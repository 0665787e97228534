"""A person's own data set in COCO's format, made known to detectron2 without writing code."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

LINE_COLOUR = (255, 127, 14)


def use_coco_files(cfg: CfgNode, split: str, json_file: str, image_dir: str) -> None:
    """Let a config train or test on COCO files, with their numbers of classes and keypoints.

    Args:
        cfg: is changed.
        split: "train" or "test"; the data set is registered as ``own_{split}``.
        json_file: as in :func:`register_coco_files`.
        image_dir: as in :func:`register_coco_files`.
    """
    name = f"own_{split}"
    register_coco_files(name, json_file, image_dir)
    cfg.DATASETS[split.upper()] = (name,)
    metadata = MetadataCatalog.get(name)
    num_classes = len(metadata.thing_classes)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    if cfg.MODEL.KEYPOINT_ON:
        if not metadata.get("keypoint_names"):
            raise ValueError(
                f"MODEL.KEYPOINT_ON, but the categories of {json_file} name no keypoints"
            )
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(metadata.keypoint_names)


def register_coco_files(name: str, json_file: str, image_dir: str) -> None:
    """Register a COCO json file and its image folder; a second call with the same files is allowed.

    Class names, keypoint names, the lines between keypoints and the keypoints that swap when an
    image is flipped (by "left" and "right" in their names) go into the metadata of ``name``.

    Args:
        name: name of the data set for detectron2.
        json_file: path of the annotations.
        image_dir: folder that the ``file_name`` entries are relative to.

    Raises:
        FileNotFoundError: one of the two paths is not there.
        ValueError: not JSON, no categories, categories with different keypoints, or ``name`` is
            taken.
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
        content = json.loads(Path(json_file).read_bytes())
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {json_file} is not JSON: {error}") from error
    categories = content.get("categories") if isinstance(content, dict) else None
    if not categories:
        raise ValueError(f"data set {name!r}: {json_file} has no categories")
    keypoints = {tuple(category["keypoints"]) for category in categories if "keypoints" in category}
    if len(keypoints) > 1:
        raise ValueError(f"data set {name!r}: categories with different keypoints: {keypoints}")

    categories = sorted(categories, key=lambda category: category["id"])
    metadata = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    for keypoint_names in keypoints:
        metadata["keypoint_names"] = list(keypoint_names)
        # For pictures alone, so a line to a keypoint that is not there is no reason to stop.
        by_number = dict(enumerate(keypoint_names, start=1))
        metadata["keypoint_connection_rules"] = [
            (by_number[a], by_number[b], LINE_COLOUR)
            for category in categories
            for a, b in category.get("skeleton", ())
            if a in by_number and b in by_number
        ]
        metadata["keypoint_flip_map"] = [
            (keypoint, mirrored)
            for keypoint in keypoint_names
            if "left" in keypoint
            and (mirrored := keypoint.replace("left", "right")) in keypoint_names
        ]
    register_coco_instances(name, metadata, json_file, image_dir)
