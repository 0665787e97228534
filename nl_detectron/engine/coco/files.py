"""Register custom data sets in COCO's format, without writing code."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from nl_detectron.engine.coco.findings import short
from nl_detectron.engine.coco.flipping import flip_pairs

LINE_COLOR = (255, 127, 14)


def register_coco_files(name: str, json_file: str, image_dir: str) -> None:
    """Register a COCO json file and its image folder; repeated calls with the same files are fine.

    The metadata of ``name`` receives the class names, category ids, keypoint names, skeleton and
    flip pairs. The images and annotations are not checked: see ``checking``.

    Args:
        name: name of the data set in detectron2.
        json_file: path of the annotations.
        image_dir: folder that the ``file_name`` entries are relative to.

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
        metadata = coco_metadata(read_coco_json(json_file)["categories"])
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {json_file} {error}") from error
    register_coco_instances(name, metadata, json_file, image_dir)


def read_coco_json(json_file: str) -> dict[str, Any]:
    """Read a COCO file that has categories, and lists of whatever else.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else, or cannot be read by pycocotools.
    """
    try:
        with _garbage_collection_paused():
            content = json.loads(Path(json_file).read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("is not JSON in UTF-8, which pycocotools needs: convert it") from error
    except json.JSONDecodeError as error:
        if error.doc.startswith("\ufeff"):
            raise ValueError(
                "starts with a byte order mark (BOM), which pycocotools cannot read: save it as "
                "UTF-8 without"
            ) from error
        raise ValueError(f"is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, or nested deeply
        raise ValueError(f"is not JSON that Python can read: {error}") from error
    if not isinstance(content, dict) or not content.get("categories"):
        raise ValueError("has no categories")
    for key in ("categories", "images", "annotations"):
        if not isinstance(content.get(key, []), list):
            raise ValueError(f"has {key} that are not a list")
    return content


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Save it going through millions of new lists again and again, which takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def coco_metadata(categories: Sequence[Any]) -> dict[str, Any]:
    """Return the metadata of a data set with these categories.

    Raises:
        ValueError: the categories are not valid.
    """
    for number, category in enumerate(categories, start=1):
        _check_category(category, f"in category number {number}, of {len(categories)}")
    ids = [category["id"] for category in categories]
    if len({type(category_id) for category_id in ids}) > 1:
        raise ValueError(f"has category ids of different types: {short(ids)}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"has duplicate category ids: {short(ids)}")
    ids.sort()
    categories = sorted(categories, key=lambda category: category["id"])
    metadata = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {category_id: i for i, category_id in enumerate(ids)},
    }
    keypoints = {tuple(category["keypoints"]) for category in categories if "keypoints" in category}
    if len(keypoints) > 1:
        raise ValueError(f"has categories with different keypoints: {short(sorted(keypoints))}")
    for names in keypoints:
        if len(set(names)) < len(names):
            raise ValueError(f"has duplicate keypoint names: {short(', '.join(names))}")
        metadata["keypoint_names"] = list(names)
        # Only used for drawing, so lines to undefined keypoints are ignored.
        lines = [line for category in categories for line in category.get("skeleton", ())]
        metadata["keypoint_connection_rules"] = [
            (names[a - 1], names[b - 1], LINE_COLOR)
            for a, b in lines
            if {a, b} <= {*range(1, len(names) + 1)}
        ]
        metadata["keypoint_flip_map"], _ = flip_pairs(names)
    return metadata


def _check_category(category: Any, where: str) -> None:
    for key in ("id", "name"):
        if not isinstance(category, dict) or category.get(key) in (None, "", [], {}):
            raise ValueError(f"has no {key!r} {where}")
    names = category.get("keypoints", [])
    lines = category.get("skeleton", [])
    valid = {
        "id": type(category["id"]) in (int, str),
        "name": is_text(category["name"]),
        "keypoints": isinstance(names, list) and all(map(is_text, names)),
        "skeleton": isinstance(lines, list)
        and all(isinstance(line, list) and [*map(type, line)] == [int, int] for line in lines),
    }
    for key, is_valid in valid.items():
        if not is_valid:
            raise ValueError(f"has a {key!r} that is not valid {where}: {short(category[key])}")


def is_text(value: Any) -> bool:
    """Whether this is a string that can be written, which half a surrogate pair cannot."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False
