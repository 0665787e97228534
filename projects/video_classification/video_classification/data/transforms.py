"""Sizes and crops of frames.

Boxes are y, x, height, width. Random numbers come from ``rng``, for which ``numpy.random`` itself
will do: detectron2 seeds it in every worker of a loader.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

Box = tuple[int, int, int, int]


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return the height and width of a frame whose shorter side is scaled to ``short_side``.

    The other side is truncated to an integer, as in video-nonlocal-net (``ScaleTransform``). That
    computes the ratio in single precision, and so loses a pixel of either side now and then.
    """
    if height <= width:
        return short_side, width * short_side // height
    return height * short_side // width, short_side


def resize(image: np.ndarray, short_side: int) -> np.ndarray:
    """Scale a frame (H, W, 3), uint8, by bilinear interpolation, as in video-nonlocal-net."""
    height, width = scaled_size(*image.shape[:2], short_side)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def random_side(sides: Sequence[int], sampling: str, rng: np.random.RandomState) -> int:
    """Draw the shorter side of a clip's frames, as detectron2 draws that of images.

    Args:
        sides: ``INPUT.MIN_SIZE_TRAIN``.
        sampling: "range": any integer from the first side to the second, inclusive; "choice": one
            of the sides.
        rng: source of random numbers.
    """
    if sampling == "range":
        return int(rng.randint(sides[0], sides[1] + 1))
    return int(sides[rng.randint(len(sides))])


def random_crop(height: int, width: int, size: tuple[int, int], rng: np.random.RandomState) -> Box:
    """Draw a box (height and width: ``size``) in a frame; all positions are equally likely.

    Raises:
        ValueError: the frame is smaller than the box.
    """
    if size[0] > height or size[1] > width:
        raise ValueError(
            f"INPUT.CROP.SIZE {size} (height, width) is larger than a frame of {height}x{width}: "
            "raise INPUT.MIN_SIZE_TRAIN"
        )
    y, x = rng.randint(0, height - size[0] + 1), rng.randint(0, width - size[1] + 1)
    return int(y), int(x), *size


def test_crops(height: int, width: int, size: int, num_crops: int) -> list[Box]:
    """Return the boxes that a frame is tested on.

    Three crops lie 0, w and 2w along the longer side, where w is half of what the frame is longer
    than the box, truncated: of an odd rest, the last column or row is never seen. That is how
    video-nonlocal-net does it (``ClipTransformFlex``).

    Args:
        height: of the frame.
        width: of the frame.
        size: height and width of the box.
        num_crops: 3, 1 (in the center), or 0 for the whole frame.

    Raises:
        ValueError: the frame is smaller than the box, or ``num_crops`` is none of these.
    """
    if num_crops not in (0, 1, 3):
        raise ValueError(f"TEST.VIEWS.NUM_CROPS must be 0, 1 or 3, got {num_crops}")
    if num_crops == 0:
        return [(0, 0, height, width)]
    if size > min(height, width):
        raise ValueError(
            f"TEST.VIEWS.CROP_SIZE {size} is larger than a frame of {height}x{width}: raise "
            "INPUT.MIN_SIZE_TEST"
        )
    y, x = (height - size) // 2, (width - size) // 2
    if num_crops == 1:
        return [(y, x, size, size)]
    if height > width:
        return [(k * y, x, size, size) for k in range(3)]
    return [(y, k * x, size, size) for k in range(3)]


def flip(images: np.ndarray) -> np.ndarray:
    """Mirror frames (..., H, W, 3), left to right."""
    return images[..., ::-1, :]
