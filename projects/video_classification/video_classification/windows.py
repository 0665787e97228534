"""Cut a long video, or a stream without an end, into windows of some seconds.

Only the frames of the current window are kept in memory.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nl_detectron.engine.frames import Video

from .data.decode import Transform

_ROUNDING = 1e-6  # seconds


class Window(NamedTuple):
    """The frames of a window, which are read as those of a video file are.

    Attributes:
        start: of the window, in seconds.
        end: likewise.
        times: (F,) seconds of each frame.
        frames: the frames, (H, W, 3), RGB.
    """

    start: float
    end: float
    times: np.ndarray
    frames: Sequence[np.ndarray]

    def read(self, indices: Sequence[int], transform: Transform | None = None) -> np.ndarray:
        """See :meth:`VideoReader.read`."""
        frames = [self.frames[i] for i in indices]
        return np.stack(frames if transform is None else [transform(frame) for frame in frames])


def sliding_windows(
    frames: Iterable[tuple[float, np.ndarray]], length: float, step: float
) -> Iterator[Window]:
    """Yield a window every ``step`` seconds; the last one ends with the last frame.

    A window has the frames from its start to before its end. If the video is shorter than
    ``length``, it is one window.

    Args:
        frames: seconds and image of each, in order.
        length: of a window, in seconds.
        step: from the start of a window to that of the next.
    """
    kept: deque[tuple[float, np.ndarray]] = deque()
    number, covered, interval = 0, 0.0, 0.04
    for seconds, image in frames:
        while seconds >= number * step + length - _ROUNDING:
            yield from _window(kept, number * step, number * step + length)
            covered, number = number * step + length, number + 1
        interval = seconds - kept[-1][0] if kept else interval
        kept.append((seconds, image))
        while kept[0][0] < min(number * step, seconds - length) - _ROUNDING:
            kept.popleft()
    if kept and kept[-1][0] >= max(covered, number * step) - _ROUNDING:
        end = kept[-1][0] + interval
        yield from _window(kept, max(end - length, 0.0), end)


def camera_frames(camera: Video) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the seconds since the first frame, by the clock, and the frame, (H, W, 3), RGB.

    Frames that come while a window is being classified are lost, except for those that the camera's
    driver keeps.
    """
    begin = None
    for frame in camera:
        now = time.monotonic()
        begin = now if begin is None else begin
        yield now - begin, frame.image[:, :, ::-1]


def _window(kept: Iterable[tuple[float, np.ndarray]], start: float, end: float) -> Iterator[Window]:
    inside = [entry for entry in kept if start - _ROUNDING <= entry[0] < end - _ROUNDING]
    if inside:  # a step may be longer than a window, and a stream may pause
        times, frames = zip(*inside)
        yield Window(start, end, np.array(times), frames)
