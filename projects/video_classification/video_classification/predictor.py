"""A trained model in use: classify videos and parts of them, or look at the model with a clip.

Shapes: V views and K classes of a video, C channels, T frames of a clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from nl_detectron.engine.frames import Videos
from nl_detectron.engine.predictor import Sample, load_weights, model_errors

from .data.decode import VideoReader
from .data.mapper import VideoMapper
from .data.transforms import resize
from .views import MultiViewClassifier, combine_views
from .windows import Window, sliding_windows


class Prediction(NamedTuple):
    """What a model finds in a video, or in a window of it.

    Attributes:
        scores: (K,) probabilities, those of the views combined as in the evaluation.
        features: (V, C) what the linear layer of the head gets from each view; from larger crops,
            the mean over its positions (``MODEL.VIDEO.HEAD.POOL_SIZE``).
        frames: (V, T) numbers of the frames of each view.
        times: (V, T) seconds of these frames.
    """

    scores: np.ndarray
    features: np.ndarray
    frames: np.ndarray
    times: np.ndarray


class VideoPredictor:
    """A model with all of its weights, which classifies videos as the evaluation does."""

    open = Videos  # finds the videos that a user names

    def __init__(self, cfg: CfgNode, weights: str | None = None):
        """Build the model and load its weights.

        Args:
            cfg: config of the model.
            weights: checkpoint; default: ``MODEL.WEIGHTS``. "" keeps the initial values.

        Raises:
            ValueError: the config does not build a model, or the weights do not match it exactly.
        """
        self.cfg = cfg
        self.mapper = VideoMapper(cfg, is_train=False)
        combine_views(torch.zeros(1, 1), cfg.TEST.VIEWS.COMBINE)  # raises for an unknown value
        with model_errors():
            self.model: Any = build_model(cfg).eval()
        load_weights(self.model, cfg.MODEL.WEIGHTS if weights is None else weights)
        self._classifier = MultiViewClassifier(self.model, cfg.TEST.VIEWS.BATCH_SIZE)

    def __call__(self, path: Path) -> Prediction:
        """Classify a video on the views of ``TEST.VIEWS``.

        Raises:
            UnreadableVideo: the video cannot be read.
        """
        return self._predict(VideoReader(path))

    def windows(
        self, frames: Iterable[tuple[float, np.ndarray]], length: float, step: float
    ) -> Iterator[tuple[float, float, Prediction]]:
        """Classify a stream, however long, in windows, each as a video of its own.

        Args:
            frames: seconds and image, (H, W, 3) in RGB, of each.
            length: of a window, in seconds, see :func:`sliding_windows`.
            step: from the start of a window to that of the next.

        Yields:
            Start and end of each window in seconds, and what is found in it.
        """
        small = ((t, resize(image, self.cfg.INPUT.MIN_SIZE_TEST)) for t, image in frames)
        for window in sliding_windows(small, length, step):
            yield window.start, window.end, self._predict(window)

    def _predict(self, video: VideoReader | Window) -> Prediction:
        views, inputs = self.mapper.views(video, {}), []
        with self.model.head.linear.register_forward_pre_hook(lambda _, x: inputs.append(x[0])):
            (output,) = self._classifier([views])
        frames = np.repeat(views["frames"].numpy(), len(views["crops"]), axis=0)
        return Prediction(
            combine_views(output["scores"].float().cpu(), self.cfg.TEST.VIEWS.COMBINE).numpy(),
            torch.cat(inputs).mean(1).float().cpu().numpy(),
            frames,
            video.times[frames],
        )

    def sample(self, path: Path, frame: int | None = None) -> Sample:
        """Read the clip around a frame, at the size of the evaluation, but uncropped.

        Args:
            path: file of the video.
            frame: its number in the video; default: the one in the middle.

        Raises:
            ValueError: the video cannot be read, or has no such frame.
        """
        video, options = VideoReader(path), self.cfg.INPUT.CLIP
        frame = video.num_frames // 2 if frame is None else frame
        if frame >= video.num_frames:
            raise ValueError(
                f"--frame must be from 0 to {video.num_frames - 1} in this video, got {frame}"
            )
        clip, query = clip_around(frame, video.num_frames, options.NUM_FRAMES, options.STRIDE)
        size = video.read([frame])[0].shape[:2]
        pixels = video.read(clip, lambda image: resize(image, self.cfg.INPUT.MIN_SIZE_TEST))
        numbers = ", ".join(map(str, clip if len(clip) < 4 else [*clip[:2], "…", clip[-1]]))
        if clip != sorted(clip):
            numbers += " (the video is repeated)"
        return Sample(
            {"video": self.mapper.to_tensor(pixels)},
            size,
            pixels.shape[1:3],
            f"{path.name}, {len(clip)} frames: {numbers}",
            lambda indices: list(video.read([clip[i] for i in indices])),
            clip,
            query,
        )

    def frame_stride(self, block: str) -> int:
        """Return the stride in time of a block's map, by the name of the block."""
        backbone = self.model.backbone
        layers = [backbone.stem.conv1, backbone.stem.pool]
        if not block.startswith("backbone.res2."):
            layers.append(backbone.pool2)
        return prod(layer.stride[0] for layer in layers if hasattr(layer, "stride"))


def clip_around(frame: int, num_frames: int, length: int, stride: int) -> tuple[list[int], int]:
    """Choose the clip that has a frame in its middle, or as near to it as the video allows.

    A video that is shorter than the clip is repeated, as in the evaluation.

    Args:
        frame: number of the frame in the video.
        num_frames: of the video.
        length: T of the clip.
        stride: distance of its frames in the video.

    Returns:
        The numbers of the clip's frames in the video, and the index of ``frame`` among them.
    """
    shift_back = length - 1 - (num_frames - 1 - frame) // stride  # what does not fit behind it
    index = min(max(length // 2, shift_back), frame // stride)
    return [(frame + (i - index) * stride) % num_frames for i in range(length)], index
