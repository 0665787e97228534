"""From the record of a video to the frames that a model sees.

Letters: T frames in a clip, F decoded frames, H W their height and width; Vt clips and Vs crops of
a video in a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from . import sampling, transforms
from .cache import open_video
from .decode import UnreadableVideo, VideoReader

Record = Mapping[str, Any]
"""An entry of a data set, see `video_classification.data.catalog`."""


class VideoMapper:
    """Decodes a video: a random clip of it for training, all its views for testing."""

    def __init__(self, cfg: CfgNode, is_train: bool):
        """Read the config.

        Raises:
            ValueError: unknown or contradictory values of keys.
        """
        self.is_train = is_train
        clip, crop, views = cfg.INPUT.CLIP, cfg.INPUT.CROP, cfg.TEST.VIEWS
        for key, value in (("NUM_FRAMES", clip.NUM_FRAMES), ("STRIDE", clip.STRIDE)):
            if value < 1:
                raise ValueError(f"INPUT.CLIP.{key} must be at least 1, got {value}")
        self._clip = (clip.NUM_FRAMES, clip.STRIDE)
        self._bgr = _choice("INPUT.FORMAT", cfg.INPUT.FORMAT, ("RGB", "BGR")) == "BGR"
        self._cache_size = cfg.DATALOADER.CACHE_VIDEOS
        if is_train:
            self._sides = cfg.INPUT.MIN_SIZE_TRAIN
            self._sampling = _choice(
                "INPUT.MIN_SIZE_TRAIN_SAMPLING",
                cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
                ("range", "choice"),
            )
            if self._sampling == "range" and not (
                len(self._sides) == 2 and self._sides[0] <= self._sides[1]
            ):
                raise ValueError(
                    "INPUT.MIN_SIZE_TRAIN must be the smallest and the largest size for "
                    f"INPUT.MIN_SIZE_TRAIN_SAMPLING range, got {self._sides}"
                )
            self._flip = _choice("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("horizontal", "none"))
            self._crop: tuple[int, int] | None = None
            if crop.ENABLED:
                _choice("INPUT.CROP.TYPE", crop.TYPE, ("absolute",))
                self._crop = tuple(crop.SIZE)
                if min(self._sides) < min(self._crop):
                    raise ValueError(
                        f"INPUT.CROP.SIZE {self._crop} must not be larger than the frames: "
                        f"INPUT.MIN_SIZE_TRAIN is {self._sides}"
                    )
        else:
            self._side = cfg.INPUT.MIN_SIZE_TEST
            self._views = (views.STARTS, views.NUM_CLIPS)
            self._crops = (views.CROP_SIZE, views.NUM_CROPS)
            if views.NUM_CLIPS < 1:
                raise ValueError(f"TEST.VIEWS.NUM_CLIPS must be at least 1, got {views.NUM_CLIPS}")
            # Errors that the videos have no part in.
            sampling.test_clips(views.STARTS, 1, *self._clip, views.NUM_CLIPS)
            transforms.test_crops(self._side, self._side, *self._crops)

    def __call__(self, record: Record) -> dict[str, Any]:
        """Decode the video of a record; NumPy's global generator chooses the clip in training.

        Args:
            record: of a data set.

        Returns:
            In training: "video", a clip (3, T, H, W), uint8; "label"; "file_name". In testing:
            "video" (3, F, H, W), the frames that any view uses, before they are cropped; "clips"
            (Vt, T), which of the F frames make up each clip; "frames" (Vt, T), their numbers in the
            file; "crops" (Vs, 4), boxes y, x, height, width; "label"; "file_name". If the video
            cannot be decoded: "error", the message, and only "label" and "file_name" besides.

        Raises:
            UnreadableVideo: in training, the video cannot be decoded.
        """
        result = {"file_name": record["file_name"], "label": record["label"]}
        if self.is_train:
            return result | self._random_clip(record)
        try:
            video = open_video(record["file_name"], self._cache_size)
            return result | self.views(video, record)
        except UnreadableVideo as error:
            return result | {"error": str(error)}

    def _random_clip(self, record: Record) -> dict[str, Any]:
        video = open_video(record["file_name"], self._cache_size)
        first, count = _frame_range(video, record)
        numbers = first + sampling.training_clip(count, *self._clip, np.random)
        side = transforms.random_side(self._sides, self._sampling, np.random)
        images = video.read(numbers, lambda image: transforms.resize(image, side))
        if self._crop:
            y, x, height, width = transforms.random_crop(*images.shape[1:3], self._crop, np.random)
            images = images[:, y : y + height, x : x + width]
        if self._flip == "horizontal" and np.random.rand() < 0.5:
            images = transforms.flip(images)
        result = {"video": self.to_tensor(images)}
        if "actions" in record:
            result["label"] = _label(record["actions"], video.times[numbers])
        return result

    def views(self, video: Any, record: Record) -> dict[str, Any]:
        """Decode the views for a test: "video", "clips", "frames" and "crops", as above.

        Args:
            video: a :class:`VideoReader`, or what has ``times`` and ``read`` as it does.
            record: its "start" and "end", if it has any.

        Raises:
            UnreadableVideo: the video cannot be decoded.
        """
        first, count = _frame_range(video, record)
        starts, num_clips = self._views
        frames = first + sampling.test_clips(starts, count, *self._clip, num_clips)
        used, clips = np.unique(frames, return_inverse=True)
        images = video.read(used, lambda image: transforms.resize(image, self._side))
        crops = transforms.test_crops(*images.shape[1:3], *self._crops)
        return {
            "video": self.to_tensor(images),
            "clips": torch.from_numpy(clips.reshape(frames.shape)),
            "crops": torch.tensor(crops),
            "frames": torch.from_numpy(frames),
        }

    def to_tensor(self, images: np.ndarray) -> Tensor:
        """Convert frames (F, H, W, 3), RGB, to (3, F, H, W) in the order of ``INPUT.FORMAT``."""
        if self._bgr:
            images = images[..., ::-1]
        return torch.from_numpy(np.ascontiguousarray(images.transpose(3, 0, 1, 2)))


def _frame_range(video: VideoReader, record: Record) -> tuple[int, int]:
    """Return the first frame and the number of frames from "start" to before "end".

    Raises:
        UnreadableVideo: the video has no frame there.
    """
    times = video.times + 1e-6  # against rounding
    first = int(np.searchsorted(times, record.get("start", 0.0)))
    stop = int(np.searchsorted(times, record.get("end", np.inf)))
    if first >= stop:
        raise UnreadableVideo(
            f"{video.path}: no frame from {record.get('start', 0.0)} to "
            f"{record.get('end', 'its end')} seconds; the last one is at {video.times[-1]:.2f}"
        )
    return first, stop - first


def _label(actions: tuple[tuple[int, float, float], ...], times: np.ndarray) -> tuple[int, ...]:
    """Return the classes of the actions that go on at any of these times."""
    found = {c for c, start, end in actions if ((start <= times) & (times <= end)).any()}
    return tuple(sorted(found))


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{key} must be one of {list(allowed)}, got {value!r}")
    return value
