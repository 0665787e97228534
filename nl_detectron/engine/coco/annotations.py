"""Check the images and annotations of a COCO file, before detectron2 or pycocotools read them.

Both stop with an error that names no annotation, drop objects in silence, or compute with numbers
that are not finite: pycocotools needs 22 GB to draw a polygon with a NaN.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from nl_detectron.engine.coco.files import is_text
from nl_detectron.engine.coco.findings import Findings, Problem, short

# Pillow refuses to read more.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)
MAX_ASPECT_RATIO = 100
MAX_COORDINATE = 1e6  # pycocotools allocates memory by the length of a polygon
MISSING: tuple[Any, ...] = (None, [], {})
Size = tuple[int, int]
"""Width and height."""


def check_images(images: Sequence[Any], findings: Findings) -> list[dict[str, Any]]:
    """Check the records of images.

    Args:
        images: the list in the file.
        findings: receives the problems.

    Returns:
        The records that are valid, each id once.
    """
    valid: dict[Any, dict[str, Any]] = {}
    names = set()
    for number, image in enumerate(images, start=1):
        problem = _record_problem(image)
        if problem:
            findings.add(*problem, f"image number {number}")
            continue
        where = f"image {image['id']!r} ({image['file_name']})"
        for kind, description in _size_problems(image["width"], image["height"]):
            findings.add(kind, description, where)
        if leaves_folder(image["file_name"]):
            findings.add("file-name", "its file name leads out of the image folder", where)
        elif image["id"] in valid:
            findings.add("duplicate-image", f"image number {number} has its id, too", where)
        else:
            valid[image["id"]] = image
            if image["file_name"] in names:
                findings.add("duplicate-file", "another image has its file, too", where)
            names.add(image["file_name"])
    if len({type(image_id) for image_id in valid}) > 1:
        findings.add("image-record", "some ids are numbers, others are strings", "images")
    if not images:
        findings.add("no-images", "lists no images")
    return list(valid.values())


def leaves_folder(file_name: str) -> bool:
    """Whether a file name, relative to a folder, leads out of it."""
    path = os.path.normpath(file_name.replace("\\", "/"))
    return path.split("/")[0] in ("", "..") or os.path.isabs(file_name)


def check_annotations(
    annotations: Sequence[Any],
    images: Iterable[dict[str, Any]],
    categories: Iterable[dict[str, Any]],
    required_keys: Collection[str],
    mask_format: str,
    findings: Findings,
) -> None:
    """Check the annotations.

    Args:
        annotations: the list in the file.
        images: valid records of images.
        categories: valid categories.
        required_keys: keys that every annotation must have, besides those that detectron2 needs.
        mask_format: "polygon" if run-length encoded masks cannot be trained on.
        findings: receives the problems.
    """
    known = {image["id"]: image for image in images}
    num_keypoints = {category["id"]: len(category.get("keypoints", ())) for category in categories}
    required_keys = ("id", "image_id", "category_id", "bbox", *required_keys)
    ids: set[int] = set()
    objects = 0
    for number, annotation in enumerate(annotations, start=1):
        if not isinstance(annotation, dict):
            findings.add("annotation-record", f"annotation number {number} is {short(annotation)}")
            continue
        image_id = annotation.get("image_id")
        image = known.get(image_id) if _is_id(image_id) else None
        problems = [
            ("missing-key", f"has no {key!r}")
            for key in required_keys
            if annotation.get(key) in MISSING
        ]
        size = (image["width"], image["height"]) if image else None
        if not image and image_id not in MISSING:
            kind = "unknown-image" if _is_id(image_id) else "image-id"
            problems.append((kind, f"its image_id is {short(image_id)}"))
        problems += _id_problems(annotation, ids, num_keypoints)
        problems += _flag_problems(annotation)
        if annotation.get("bbox") not in MISSING:
            problems += box_problems(annotation["bbox"], size)
        if annotation.get("keypoints") not in MISSING:
            category_id = annotation.get("category_id")
            count = num_keypoints.get(category_id, 0) if _is_id(category_id) else 0
            values = 3 * count if count or "keypoints" in required_keys else None
            problems += keypoint_problems(annotation, values, size)
        if annotation.get("segmentation") not in MISSING:
            problems += mask_problems(annotation["segmentation"], size)
            if (
                mask_format == "polygon"
                and isinstance(annotation["segmentation"], dict)
                and not annotation.get("iscrowd")
            ):
                problems.append(("mask-format", "its mask is run-length encoded"))
        if problems:
            where = _name(annotation, number, image)
            for kind, description in problems:
                findings.add(kind, description, where)
        if not annotation.get("iscrowd"):
            objects += "keypoints" not in required_keys or _is_labeled(annotation)
    if not objects:
        kind = " with keypoints" * ("keypoints" in required_keys)
        findings.add("no-objects", f"has no objects{kind}")


def box_problems(box: Any, size: Size | None) -> Iterator[Problem]:
    """Yield what is wrong with a box (x, y, width, height) in an image, if its size is known."""
    if not _are_finite(box) or len(box) != 4 or min(box[2:]) < 0:
        yield "box", f"its bbox is {short(box)}"
        return
    x, y, w, h = box
    if not (w and h):
        yield "box-empty", f"its bbox is {short(box)}"
    if size:
        width, height = size
        kind = ""
        ends = (x, y, x + w, y + h)
        if x >= width or y >= height or x + w < 0 or y + h < 0 or _is_far(ends, size):
            kind = "box-outside"
        elif min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
            kind = "box-beyond"
        if kind:
            yield kind, f"its bbox is {short(box)} in an image of {width} x {height}"


def keypoint_problems(
    annotation: dict[str, Any], values: int | None, size: Size | None
) -> Iterator[Problem]:
    """Yield what is wrong with the keypoints of an object, which should have so many values."""
    keypoints, number = annotation["keypoints"], annotation.get("num_keypoints")
    if not _are_finite(keypoints):
        yield "keypoints", f"its keypoints are {short(keypoints)}"
        return
    if values is not None and len(keypoints) != values:
        needed = f"its category needs {values}"
        yield "keypoints-length", f"it has {len(keypoints)} keypoint values, {needed}"
        return
    labeled = sum(visibility > 0 for visibility in keypoints[2::3])
    if number not in (None, labeled):
        yield "num-keypoints", f"its num_keypoints is {short(number)}, {labeled} are labeled"
    if not {*keypoints[2::3]} <= {0, 1, 2}:
        yield "keypoint-visibility", f"its visibilities are {short(keypoints[2::3])}"
    if size:
        width, height = size
        for x, y, visibility in zip(*(keypoints[i::3] for i in range(3))):
            if visibility > 0 and not (0 <= x <= width and 0 <= y <= height):
                yield (
                    "keypoint-outside",
                    f"a keypoint at {x}, {y} in an image of {width} x {height}",
                )
                return


def mask_problems(mask: Any, size: Size | None) -> Iterator[Problem]:
    """Yield what is wrong with the segmentation of an object."""
    if isinstance(mask, dict):
        problem = _rle_problem(mask, size)
        if problem:
            yield "rle", problem
        return
    if (
        not isinstance(mask, list)
        or not all(map(_are_finite, mask))
        or max((abs(number) for polygon in mask for number in polygon), default=0) > MAX_COORDINATE
    ):
        yield "polygon-values", f"its segmentation is {short(mask)}"
        return
    invalid = sum(len(polygon) < 6 or len(polygon) % 2 for polygon in mask)
    if invalid:
        few = f"{invalid} of {len(mask)} polygons have fewer than 3 points or half a point"
        yield ("polygon" if invalid == len(mask) else "polygon-part"), few
    if size and any(_is_far(polygon, size) for polygon in mask):
        yield "polygon-outside", f"its segmentation is {short(mask)}"


def _record_problem(image: Any) -> Problem | None:
    """Return why the record of an image cannot be used."""
    if not isinstance(image, dict):
        return "image-record", f"is {short(image)}"
    for key in ("id", "file_name", "height", "width"):
        if image.get(key) in ("", *MISSING):
            return "missing-key", f"has no {key!r}"
    if not _is_id(image["id"]):
        return "image-record", f"its id is {short(image['id'])}"
    if not is_text(image["file_name"]) or "\0" in image["file_name"]:
        return "image-record", f"its file_name is {short(image['file_name'])}"
    for key in ("height", "width"):
        if type(image[key]) is not int or image[key] < 1:
            return "image-record", f"its {key} is {short(image[key])}"
    return None


def _size_problems(width: int, height: int) -> Iterator[Problem]:
    if width * height > MAX_PIXELS:
        yield "image-huge", f"it has {short(width)} x {short(height)} pixels"
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        yield "image-shape", f"it is {short(width)} x {short(height)}"


def _id_problems(
    annotation: dict[str, Any], ids: set[int], categories: Collection[Any]
) -> Iterator[Problem]:
    """Yield what is wrong with the ids of an annotation and of its category."""
    own, category_id = annotation.get("id"), annotation.get("category_id")
    if own is not None:
        if type(own) is not int or not 0 < own < 2**53:  # pycocotools takes 0 for no match
            yield "annotation-id", f"its id is {short(own)}"
        elif own in ids:
            yield "duplicate-annotation", "another annotation has its id, too"
        else:
            ids.add(own)
    if category_id is not None and not (_is_id(category_id) and category_id in categories):
        yield "unknown-category", f"its category_id is {short(category_id)}"


def _flag_problems(annotation: dict[str, Any]) -> Iterator[Problem]:
    area = annotation.get("area")
    if area is not None and not (_are_finite([area]) and area >= 0):
        yield "area", f"its area is {short(area)}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield "iscrowd", f"its iscrowd is {short(annotation['iscrowd'])}"
    if annotation.get("ignore", 0) != 0:
        yield "ignore", f"its ignore is {short(annotation['ignore'])}"


def _is_labeled(annotation: dict[str, Any]) -> bool:
    """Whether an object has a labeled keypoint."""
    keypoints = annotation.get("keypoints")
    return isinstance(keypoints, list) and any(keypoints[2::3])


def _rle_problem(mask: dict[str, Any], size: Size | None) -> str | None:
    """Return what is wrong with a run-length encoded mask, without decoding it."""
    counts, mask_size = mask.get("counts"), mask.get("size", [])
    if not _are_finite(mask_size) or len(mask_size) != 2:
        return f"the size of its mask is {short(mask_size)}"
    height, width = mask_size
    if (width, height) != size and size:
        return f"its mask is {width} x {height} in an image of {size[0]} x {size[1]}"
    try:
        runs = _decoded_counts(counts) if isinstance(counts, str) else counts
    except ValueError:
        runs = None
    if (
        not isinstance(runs, list)
        or {*map(type, runs)} != {int}
        or min(runs) < 0
        or sum(runs) != width * height
    ):
        return f"the counts of its mask are {short(counts)}, for {width} x {height} pixels"
    return None


def _decoded_counts(text: str) -> list[int]:
    """Decode the counts of pycocotools' compressed masks.

    Each is a number of 5 bits per character, the lowest first, from the fourth one on as the
    difference to the last but one; bit 5 says that another character follows, bit 4 of the last
    one is the sign.

    Raises:
        ValueError: the text ends within a number, or has other characters.
    """
    counts: list[int] = []
    value = shift = 0
    for byte in text.encode():
        bits = byte - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("not a compressed mask")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("not a whole compressed mask")
    return counts


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _are_finite(values: Any) -> bool:
    """Whether this is a list of finite numbers, which JSON's ``true`` is not."""
    try:
        return (
            isinstance(values, list)
            and {*map(type, values)} <= {int, float}
            and all(map(math.isfinite, values))
        )
    except OverflowError:  # an integer beyond the range of floats
        return False


def _is_far(coordinates: Collection[float], size: Size) -> bool:
    """Whether any coordinate is beyond the image by more than its longer side."""
    side = max(size)
    return min(coordinates) < -side or max(coordinates) > 2 * side


def _name(annotation: dict[str, Any], number: int, image: dict[str, Any] | None) -> str:
    own = annotation.get("id")
    name = f"annotation number {number}" if own is None else f"annotation {short(own)}"
    if image:
        return f"{name} of image {image['id']!r} ({image['file_name']})"
    return name
