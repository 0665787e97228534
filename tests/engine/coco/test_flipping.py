"""Left and right keypoints by their names."""

from __future__ import annotations

import pytest
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)

from nl_detectron.engine.coco.flipping import flip_pairs


def test_coco():
    pairs, unpaired = flip_pairs(COCO_PERSON_KEYPOINT_NAMES)
    assert pairs == list(COCO_PERSON_KEYPOINT_FLIP_MAP)
    assert unpaired == []


@pytest.mark.parametrize(
    "pair",
    """left_wrist right_wrist, LShoulder RShoulder, shoulder_l shoulder_r, Left Wrist:Right Wrist,
    leftWrist rightWrist, lwrist rwrist, LWRIST RWRIST, wristL wristR, HIP_LEFT HIP_RIGHT,
    hip-L hip-R, l.hip r.hip, eyeleft2 eyeright2, right left, l_ear_tip r_ear_tip""".split(","),
)
def test_pair(pair):
    left, right = pair.strip().split(":" if ":" in pair else " ")
    assert flip_pairs(["nose", left, "tail", right]) == ([(left, right)], [])
    assert flip_pairs([right, "nose", left]) == ([(right, left)], [])


def test_corners():
    corners = ["top_left", "top_right", "bottom_right", "bottom_left"]
    pairs = [("top_left", "top_right"), ("bottom_right", "bottom_left")]
    assert flip_pairs(corners) == (pairs, [])


def test_no_sides():
    assert flip_pairs(["nose", "tail", "leg", "root", "ear1", "ear2"]) == ([], [])


@pytest.mark.parametrize(
    ("names", "unpaired"),
    [
        (["left_eye", "right_eye", "left_ear"], ["left_ear"]),
        (["LShoulder", "Nose"], ["LShoulder"]),
        (["Left Wrist", "right wrist"], ["Left Wrist", "right wrist"]),
        (["wing_l", "tail"], ["wing_l"]),
        # Two ways to mirror each: the left eye's left corner is the right eye's right corner.
        (
            ["l_eye_l", "l_eye_r", "r_eye_l", "r_eye_r"],
            ["l_eye_l", "l_eye_r", "r_eye_l", "r_eye_r"],
        ),
    ],
)
def test_side_without_one_partner(names, unpaired):
    assert flip_pairs(names)[1] == unpaired
