"""Frames of clips, against positions computed by hand and loops over exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from video_classification.data import sampling

CLIP = (32, 2)

# First frames of ten clips of 32x2, computed by hand from what each library does.
STARTS = {
    ("released", 300): [0, 30, 60, 90, 120, 150, 180, 210, 240, 270],
    ("released", 250): [0, 25, 50, 75, 100, 125, 150, 175, 200, 225],
    ("released", 60): [0, 6, 12, 18, 24, 30, 36, 42, 48, 54],
    ("released", 47): [0, 4, 9, 14, 18, 23, 28, 32, 37, 42],
    ("mmaction2", 300): [0, 26, 53, 79, 105, 132, 158, 184, 211, 237],
    ("mmaction2", 250): [0, 21, 42, 62, 83, 104, 125, 145, 166, 187],
    ("mmaction2", 60): [0] * 10,
    ("tsm", 300): [0, 26, 52, 78, 104, 131, 157, 183, 209, 236],
    ("tsm", 250): [0, 20, 41, 62, 82, 103, 124, 144, 165, 186],
    ("tsm", 60): [0] * 10,
}


@pytest.mark.parametrize(("starts", "n"), STARTS)
def test_clips_that_repeat_the_video(starts, n):
    clips = sampling.test_clips(starts, n, *CLIP, 10)
    expected = [[(start + 2 * i) % n for i in range(32)] for start in STARTS[starts, n]]
    np.testing.assert_array_equal(clips, expected)


def test_late_released_clips_jump_to_the_start():
    last = sampling.test_clips("released", 300, *CLIP, 10)[9]
    assert last.tolist() == [*range(270, 300, 2), *range(0, 34, 2)]


@pytest.mark.parametrize(
    ("n", "starts"),
    [
        (300, ["0", "23.6", "47.2", "70.8", "94.4", "118", "141.6", "165.2", "188.8", "212.4"]),
        (250, ["0", "18.6", "37.2", "55.8", "74.4", "93", "111.6", "130.2", "148.8", "167.4"]),
        (60, ["0"] * 10),
    ],
)
def test_slowfast_truncates_fractions_and_repeats_the_last_frame(n, starts):
    clips = sampling.test_clips("slowfast", n, *CLIP, 10)
    for clip, start in zip(clips, starts):
        exact = [Fraction(start) + Fraction(63, 31) * i for i in range(32)]
        assert clip.tolist() == [min(int(frame), n - 1) for frame in exact]
    assert (
        clips[1, :4].tolist() == {300: [23, 25, 27, 29], 250: [18, 20, 22, 24], 60: [0, 2, 4, 6]}[n]
    )


def test_charades_centers_clips_in_segments():
    clips = sampling.test_clips("charades", 300, *CLIP, 10)
    # Centers 15, 45, ..., 285, half of the span of 64 earlier; beyond the ends, the outer frames.
    assert clips[0].tolist() == [0] * 9 + list(range(1, 47, 2))
    assert clips[4].tolist() == list(range(135 - 32, 135 + 32, 2))
    assert clips[9].tolist() == list(range(253, 300, 2)) + [299] * 8
    # NumPy rounds halves to even: 0.5, 1.5, 2.5, ...
    centers = sampling.test_clips("charades", 10, 2, 1, 10)[:, 1]
    assert centers.tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 8, 9]


def test_one_clip():
    # (300 - 63) // 2 in mmaction2; the start of the video in all others but Charades.
    firsts = {name: sampling.test_clips(name, 300, *CLIP, 1)[0, 0] for name in sampling.TEST_CLIPS}
    assert firsts == {"released": 0, "slowfast": 0, "mmaction2": 118, "tsm": 0, "charades": 118}


@pytest.mark.parametrize("n", [1, 2, 31, 63, 64, 65, 1000])
@pytest.mark.parametrize("starts", sampling.TEST_CLIPS)
def test_no_frame_is_outside_the_video(starts, n):
    clips = sampling.test_clips(starts, n, 8, 8, 7)
    assert clips.shape == (7, 8)
    assert clips.dtype == np.int64
    assert clips.min() >= 0
    assert clips.max() < n


def test_unknown_starts():
    with pytest.raises(
        ValueError, match=r"TEST.VIEWS.STARTS must be one of \['released', .*'last'"
    ):
        sampling.test_clips("last", 300, *CLIP, 10)


def test_training_clips_start_anywhere_up_to_the_last_whole_one():
    rng = np.random.RandomState(0)
    for n, starts in {67: {0, 1, 2, 3}, 64: {0}, 60: {0}, 3: {0}}.items():
        clips = [sampling.training_clip(n, *CLIP, rng).tolist() for _ in range(100)]
        assert {clip[0] for clip in clips} == starts
        assert all(clip == [(clip[0] + 2 * i) % n for i in range(32)] for clip in clips)
    counts = np.bincount([sampling.training_clip(67, *CLIP, rng)[0] for _ in range(4000)])
    assert (np.abs(counts - 1000) < 120).all()  # 4.4 standard deviations
