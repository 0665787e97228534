"""Decode and write videos with PyAV.

Frames are found by counting, never by seeking: a seek lands on another frame than the one asked
for in files with unordered or missing time stamps. The number of frames comes from the packets,
which are counted without decoding them; what headers say is often wrong or missing.

Shapes: F frames, H W height and width; colors are RGB, uint8.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from typing import Any

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]
"""Maps a frame (H, W, 3) to another one."""


class UnreadableVideo(ValueError):
    """A video cannot be decoded; the message begins with its name."""


class VideoReader:
    """A video file.

    Attributes:
        path: name of the file.
        times: (F,) seconds from the first frame to each frame.
        fps: frames per second, on average.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Count the frames.

        Raises:
            UnreadableVideo: it is not a video, it has no frames, or its end is missing.
        """
        self.path = os.fspath(path)
        stamps: list[float | None] = []
        end = 0.0
        with _open(self.path) as (container, stream):
            # The packets of all streams, as the longest one tells where the file ends.
            for packet in container.demux():
                if packet.size == 0:
                    continue
                if packet.stream is stream and not packet.is_discard:
                    stamps.append(None if packet.pts is None else _seconds(packet, packet.pts))
                if packet.pts is not None:
                    end = max(end, _seconds(packet, packet.pts + (packet.duration or 0)))
            self.fps = float(stream.average_rate or stream.guessed_rate or 25)
            duration = (container.duration or 0) / 1e6
        if not stamps:
            raise UnreadableVideo(f"{self.path}: no frames")
        if end and duration - end > max(0.1, 2 / self.fps):
            raise UnreadableVideo(
                f"{self.path}: it ends after {end:.2f} of {duration:.2f} seconds, so the file is "
                "not complete"
            )
        self.times = self._times(stamps)

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.times)

    def read(self, indices: Sequence[int], transform: Transform | None = None) -> np.ndarray:
        """Decode frames.

        Everything from the start of the video to the last of these frames is decoded, but only
        these frames are converted to RGB, transformed and kept.

        Args:
            indices: numbers of the frames, from 0, in any order; they may repeat.
            transform: applied to each frame.

        Returns:
            (len(indices), H, W, 3) in the order of ``indices``.

        Raises:
            UnreadableVideo: the video is broken, or has fewer frames than packets.
        """
        wanted, last = {int(i) for i in indices}, int(max(indices))
        if min(wanted) < 0 or last >= self.num_frames:
            raise IndexError(f"{self.path} has {self.num_frames} frames, got {sorted(wanted)}")
        images: dict[int, np.ndarray] = {}
        count = 0
        with closing(_decode(self.path)) as frames:
            for count, (_, to_image) in enumerate(frames, start=1):
                if count - 1 in wanted:
                    image = to_image()
                    images[count - 1] = image if transform is None else transform(image)
                if count > last:
                    break
        if count <= last:
            raise UnreadableVideo(
                f"{self.path}: only {count} of its {self.num_frames} frames can be decoded"
            )
        sizes = {image.shape[:2] for image in images.values()}
        if len(sizes) > 1:
            raise UnreadableVideo(f"{self.path}: the size of its frames changes: {sorted(sizes)}")
        return np.stack([images[int(i)] for i in indices])

    def _times(self, stamps: list[float | None]) -> np.ndarray:
        """Return the seconds of the frames, in the order of display."""
        if None not in stamps:
            times = np.sort(np.array(stamps, dtype=np.float64))
            if (np.diff(times) > 0).all():
                return times - times[0]
        return np.arange(len(stamps)) / self.fps


def iter_frames(path: str | os.PathLike[str]) -> Iterator[tuple[float, np.ndarray]]:
    """Decode a video frame by frame, however long it is.

    Yields:
        The seconds since the first frame, by the time stamps of the file, and the frame,
        (H, W, 3). Where a time stamp is missing or does not increase, the frame comes one average
        frame interval after the one before.

    Raises:
        UnreadableVideo: the video is broken; the frames before that have been yielded.
    """
    path = os.fspath(path)
    with _open(path) as (_, stream):
        interval = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    first, seconds = None, -interval
    for stamp, to_image in _decode(path):
        next_seconds = seconds + interval
        if stamp is not None:
            first = stamp if first is None else first
            next_seconds = stamp - first if stamp - first > seconds else next_seconds
        seconds = next_seconds
        yield seconds, to_image()


def write_video(
    path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float, crf: int = 18
) -> None:
    """Write an H.264 video that browsers play.

    The same frames give the same file: the encoder has one thread.

    Args:
        path: file to write, .mp4.
        frames: each (H, W, 3), all of the same size; taken one at a time. Where H or W is odd, the
            last row or column is repeated.
        fps: frames per second.
        crf: quality, from 1 (best) to 51. 0 is lossless and keeps RGB: for tests, as browsers do
            not play that.

    Raises:
        ValueError: there are no frames.
        OSError: the file cannot be written.
    """
    av = _import_av()
    iterator = iter(frames)
    image = next(iterator, None)
    if image is None:
        raise ValueError(f"{os.fspath(path)}: no frames to write")
    lossless = crf == 0
    height, width = image.shape[:2]
    padding = [(0, 0 if lossless else size % 2) for size in (height, width)]
    with av.open(os.fspath(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(
            "libx264rgb" if lossless else "libx264",
            Fraction(fps).limit_denominator(1001),  # such as 30000/1001
            options={"crf": str(crf), "threads": "1"},
        )
        stream.height, stream.width = height + padding[0][1], width + padding[1][1]
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        while image is not None:
            image = np.pad(image, [*padding, (0, 0)], mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            image = next(iterator, None)
        container.mux(stream.encode())


def _decode(path: str) -> Iterator[tuple[float | None, Callable[[], np.ndarray]]]:
    """Yield the time stamp in seconds and the conversion to an upright RGB image of each frame."""
    with _open(path) as (container, stream):
        # One thread: the workers of a loader are processes already, which more would slow down.
        stream.thread_type = "NONE"
        to_rgb = _import_av().video.reformatter.VideoReformatter()  # one for all: it is costly
        for frame in container.decode(stream):
            yield frame.time, functools.partial(_to_image, path, frame, to_rgb)


def _to_image(path: str, frame: Any, to_rgb: Any) -> np.ndarray:
    with _named_errors(path):
        image = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


@contextmanager
def _open(path: str) -> Iterator[tuple[Any, Any]]:
    """Open a file; yield its container and its video stream."""
    with _named_errors(path), _import_av().open(path, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream is None:
            raise UnreadableVideo(f"{path}: there is no video in it")
        yield container, stream


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Turn what PyAV raises into an error that begins with the name of the file."""
    try:
        yield
    except UnreadableVideo:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableVideo(f"{path}: {reason}") from error


def _seconds(packet: Any, stamp: int) -> float:
    return float(stamp * packet.time_base)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "videos are decoded with PyAV: pip install 'nl_detectron[video]'"
        ) from error
    return av
