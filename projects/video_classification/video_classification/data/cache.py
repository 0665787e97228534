"""Keep the videos of a small data set decoded in memory."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .decode import Transform, VideoReader


class DecodedVideo(VideoReader):
    """A video whose frames are in memory, all of them, as decoded."""

    def __init__(self, path: str):
        """Decode the video.

        Raises:
            UnreadableVideo: it is broken.
        """
        super().__init__(path)
        self._frames = super().read(range(self.num_frames))

    def read(self, indices: Sequence[int], transform: Transform | None = None) -> np.ndarray:
        """See :meth:`VideoReader.read`."""
        images = self._frames[np.asarray(indices)]
        return images if transform is None else np.stack([transform(image) for image in images])


# Of this process: workers of a loader have their own.
_videos: OrderedDict[tuple[str, int, int], DecodedVideo] = OrderedDict()


def open_video(path: str, cache_size: int = 0) -> VideoReader:
    """Open a video, or return it from the cache that all mappers of the process share.

    Args:
        path: name of the file.
        cache_size: number of videos to keep; those used least recently make room for others.

    Raises:
        UnreadableVideo: the video is broken.
    """
    if not cache_size or not os.path.exists(path):
        return VideoReader(path)
    status = os.stat(path)
    key = (path, status.st_mtime_ns, status.st_size)  # a file may be replaced
    if key not in _videos:
        _videos[key] = DecodedVideo(path)
    _videos.move_to_end(key)
    while len(_videos) > cache_size:
        _videos.popitem(last=False)
    return _videos[key]
