"""Check image files by their headers and endings; decode only those that leave a doubt."""

from __future__ import annotations

import os
import random
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from nl_detectron.engine.coco.findings import Findings, Problem

EXIF_ORIENTATION = 0x0112
END_OF_JPEG = b"\xff\xd9"


def check_image_files(
    images: Sequence[dict[str, Any]], folder: str, findings: Findings, time_limit: float = 0.0
) -> None:
    """Check the files of images: that they are there, whole, and of the size that is known.

    Args:
        images: valid image records of a COCO file.
        folder: folder that their names are relative to.
        findings: receives the problems, and a note if not all files could be checked.
        time_limit: seconds after which to stop, then with a random choice of files; 0: never.
    """
    if time_limit:
        images = random.Random(0).sample(images, len(images))
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large images and odd metadata
        for image in images:
            if time_limit and time.monotonic() - start > time_limit:
                findings.unchecked = True
                findings.notes.append(
                    f"{findings.files} of {len(images)} image files checked, chosen at random, in "
                    f"{time_limit:g} seconds"
                )
                break
            path = os.path.join(folder, image["file_name"])
            for kind, description in file_problems(path, image["width"], image["height"]):
                findings.add(kind, description, f"image {image['id']!r} ({image['file_name']})")
            findings.files += 1
        else:
            findings.notes.append(f"{len(images)} image files checked")


def file_problems(path: str, width: int, height: int) -> Iterator[Problem]:
    """Yield what is wrong with an image file that should have a width and height."""
    try:
        status = os.stat(path)
    except OSError as error:
        yield "image-missing", f"{path}: {error.strerror}"
        return
    if not stat.S_ISREG(status.st_mode):
        yield "image-missing", f"{path} is not a file"
    elif not status.st_size:
        yield "image-empty", f"{path} has 0 bytes"
    else:
        try:
            with Image.open(path) as image:
                yield from _header_problems(image, width, height)
                if not (image.format == "JPEG" and _ends_with(path, END_OF_JPEG)):
                    image.load()
        except Image.DecompressionBombError as error:
            yield "image-huge", str(error)
        except Exception as error:  # broken files raise many kinds of errors
            yield "image-broken", f"{path}: {error}"


def _header_problems(image: Image.Image, width: int, height: int) -> Iterator[Problem]:
    orientation = image.getexif().get(EXIF_ORIENTATION)
    size = image.size
    if orientation in (5, 6, 7, 8):  # turned by 90 degrees, as detectron2 reads it
        size = size[::-1]
    if size != (width, height):
        said = f"it is {size[0]} x {size[1]}, but the JSON file says {width} x {height}"
        if size == (height, width) != image.size:
            yield "image-turned", f"with its EXIF orientation {orientation} {said}"
        else:
            yield "image-size", said
    elif orientation in (2, 3, 4) or (orientation in (5, 6, 7, 8) and width == height):
        yield "image-orientation", f"its EXIF orientation is {orientation}"
    if image.mode.startswith(("I", "F")):
        yield "image-depth", f"its mode is {image.mode}"


def _ends_with(path: str, ending: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(-len(ending), os.SEEK_END)
        return file.read() == ending
