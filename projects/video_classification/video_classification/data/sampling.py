"""Which frames of a video make up its clips.

Letters: n frames in the video, T frames in a clip, V clips of a video. A clip spans ``T * stride``
frames, 64 for 32x2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def training_clip(n: int, clip: int, stride: int, rng: np.random.RandomState) -> np.ndarray:
    """Sample a clip at random, as video-nonlocal-net does.

    The start is uniform from 0 to n minus the span, inclusive; a shorter video is repeated.
    video-nonlocal-net: ``customized_video_io.cc``, ``DecodeClipFromMemoryBufferFlex``.

    Args:
        n: number of frames of the video.
        clip: number of frames of the clip.
        stride: distance of two of its frames in the video.
        rng: source of random numbers; ``numpy.random`` itself will do.

    Returns:
        (T,) frame numbers.
    """
    start = rng.randint(0, max(n - clip * stride, 0) + 1)
    return (start + stride * np.arange(clip)) % n


def test_clips(starts: str, n: int, clip: int, stride: int, num_clips: int) -> np.ndarray:
    """Return the clips that a library tests a video on.

    Args:
        starts: one of `TEST_CLIPS`.
        n: number of frames of the video.
        clip: number of frames of a clip.
        stride: distance of two frames of a clip in the video.
        num_clips: number of clips.

    Returns:
        (V, T) frame numbers.

    Raises:
        ValueError: unknown ``starts``.
    """
    if starts not in TEST_CLIPS:
        raise ValueError(f"TEST.VIEWS.STARTS must be one of {list(TEST_CLIPS)}, got {starts!r}")
    return TEST_CLIPS[starts](n, clip, stride, num_clips)


def _released(n: int, clip: int, stride: int, num_clips: int) -> np.ndarray:
    """Start every n / V frames; clips that reach the end go on at the start of the video.

    video-nonlocal-net: ``customized_video_io.cc``, ``DecodeClipFromVideoFileFlex``.
    """
    return _clips(n * np.arange(num_clips) // num_clips, clip, stride) % n


def _slowfast(n: int, clip: int, stride: int, num_clips: int) -> np.ndarray:
    """Start at fractions; the T frames divide the span, less one frame, evenly.

    The distance of two frames is thus a bit more than the stride: 63/31 for 32x2. Frame numbers are
    truncated; beyond the end, the last frame is repeated. Equal to PySlowFast's frames for videos
    of 30 frames a second, its default target. PySlowFast: ``datasets/decoder.py``,
    ``get_start_end_idx`` and ``temporal_sampling``.
    """
    span = clip * stride
    starts = [max(n - span, 0) * k / num_clips for k in range(num_clips)]
    # torch.linspace, as its rounding decides what is truncated.
    frames = torch.stack([torch.linspace(start, start + span - 1, clip) for start in starts])
    return frames.clamp(0, n - 1).long().numpy()


def _mmaction2(n: int, clip: int, stride: int, num_clips: int) -> np.ndarray:
    """Spread the clips from the first frame to the last, of which one clip is in the center.

    What a clip spans ends with its last frame here: 63 for 32x2. Shorter videos are repeated.
    mmaction2: ``datasets/transforms/loading.py``, ``SampleFrames``.
    """
    space = max(n - ((clip - 1) * stride + 1), 0)
    if num_clips == 1:
        return _clips(np.array([space // 2]), clip, stride) % n
    starts = np.round(np.arange(num_clips) * (space / (num_clips - 1)))
    return _clips(starts.astype(np.int64), clip, stride) % n


def _tsm(n: int, clip: int, stride: int, num_clips: int) -> np.ndarray:
    """Spread the clips from the first frame to the last, by truncated ``linspace``.

    Shorter videos are repeated. temporal-shift-module: ``ops/dataset.py``, dense sampling.
    """
    space = max(n - clip * stride, 0)
    return _clips(np.linspace(0, space, num_clips, dtype=np.int64), clip, stride) % n


def _charades(n: int, clip: int, stride: int, num_clips: int) -> np.ndarray:
    """Center the clips in V segments of equal length; repeat the first and last frames.

    video-long-term-feature-banks: ``lib/datasets/charades.py``, ``sample_center_of_segments``.
    """
    centers = np.round(n / num_clips * (np.arange(num_clips) + 0.5)).astype(np.int64)
    return _clips(centers - clip * stride // 2, clip, stride).clip(0, n - 1)


def _clips(starts: np.ndarray, clip: int, stride: int) -> np.ndarray:
    return starts[:, None] + stride * np.arange(clip)


TEST_CLIPS: dict[str, Callable[[int, int, int, int], np.ndarray]] = {
    "released": _released,
    "slowfast": _slowfast,
    "mmaction2": _mmaction2,
    "tsm": _tsm,
    "charades": _charades,
}
"""Clips of a test by the name of the library: (n, clip, stride, num_clips) -> (V, T)."""
