"""Sizes and crops, against hand-computed ones."""

import numpy as np
import pytest
from video_classification.data import transforms


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((480, 640), 256, (256, 341)),  # 341.33
        ((240, 320), 257, (257, 342)),  # 342.67
        ((640, 360), 256, (455, 256)),  # 455.11
        ((720, 1280), 320, (320, 568)),  # 568.89
        ((256, 256), 224, (224, 224)),
        ((100, 227), 256, (256, 581)),  # 581.12
    ],
)
def test_the_longer_side_is_truncated(size, side, expected):
    assert transforms.scaled_size(*size, side) == expected
    assert transforms.resize(np.zeros((*size, 3), np.uint8), side).shape == (*expected, 3)


def test_resizes_by_bilinear_interpolation():
    # Half the size: each pixel is the mean of four.
    image = np.array([[0, 40, 1, 1], [80, 120, 1, 5]], np.uint8)[..., None].repeat(3, axis=2)
    assert transforms.resize(image, 1)[0, :, 1].tolist() == [60, 2]
    # Three times the size: thirds between the centers of two pixels; 33.3 and 66.7.
    image = np.array([[0, 100]], np.uint8)[..., None].repeat(3, axis=2)
    assert transforms.resize(image, 3)[1, :, 2].tolist() == [0, 0, 33, 67, 100, 100]


def test_three_crops_along_the_longer_side():
    # (341 - 256) // 2 = 42: the last column, 340, is never seen.
    assert transforms.test_crops(256, 341, 256, 3) == [
        (0, 0, 256, 256),
        (0, 42, 256, 256),
        (0, 84, 256, 256),
    ]
    assert transforms.test_crops(455, 256, 256, 3) == [
        (0, 0, 256, 256),
        (99, 0, 256, 256),
        (198, 0, 256, 256),
    ]
    # Frames larger than the crops on both sides: centered on the shorter one.
    assert transforms.test_crops(320, 428, 256, 3) == [(32, 86 * k, 256, 256) for k in range(3)]
    assert transforms.test_crops(256, 256, 256, 3) == [(0, 0, 256, 256)] * 3


def test_one_crop_or_none():
    assert transforms.test_crops(256, 341, 224, 1) == [(16, 58, 224, 224)]
    assert transforms.test_crops(455, 256, 256, 0) == [(0, 0, 455, 256)]


def test_useless_crops():
    with pytest.raises(ValueError, match="TEST.VIEWS.NUM_CROPS must be 0, 1 or 3, got 2"):
        transforms.test_crops(256, 341, 256, 2)
    with pytest.raises(
        ValueError, match="TEST.VIEWS.CROP_SIZE 257 is larger than a frame of 256x341"
    ):
        transforms.test_crops(256, 341, 257, 3)
    with pytest.raises(ValueError, match=r"INPUT.CROP.SIZE \(4, 9\) .* larger than a frame of 6x8"):
        transforms.random_crop(6, 8, (4, 9), np.random)


def test_random_numbers_reach_both_ends():
    rng = np.random.RandomState(0)
    crops = [transforms.random_crop(6, 7, (5, 5), rng) for _ in range(100)]
    assert set(crops) == {(y, x, 5, 5) for y in range(2) for x in range(3)}
    sides = [transforms.random_side((5, 8), "range", rng) for _ in range(100)]
    assert set(sides) == {5, 6, 7, 8}
    assert {transforms.random_side((5, 8), "choice", rng) for _ in range(100)} == {5, 8}
