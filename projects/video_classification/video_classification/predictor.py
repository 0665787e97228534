"""A trained model in use: what it sees in one place of a video.

Shapes: T H W frames, height and width of a clip.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from nl_detectron.engine.frames import Videos
from nl_detectron.engine.predictor import Sample, load_weights, model_errors

from .data.decode import VideoReader
from .data.mapper import VideoMapper
from .data.transforms import resize


class VideoPredictor:
    """A model with all of its weights, for inference."""

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
        with model_errors():
            self.model: Any = build_model(cfg).eval()
        load_weights(self.model, cfg.MODEL.WEIGHTS if weights is None else weights)

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
