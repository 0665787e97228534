"""The meta-architecture ``VideoClassifier``: a backbone and a head.

Shapes: N clips, C colors, K classes, T H W frames, height and width of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from .head import ClassificationHead


@META_ARCH_REGISTRY.register()
class VideoClassifier(nn.Module):
    """Classifies clips."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: ClassificationHead,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """Create the model.

        Args:
            backbone: its last output, (N, C, T, H, W), goes to the head.
            head: the classifier.
            pixel_mean: per color, subtracted from the pixels.
            pixel_std: per color, by which the difference is divided.
        """
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature = list(backbone.output_shape())[-1]
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments of ``__init__`` from a config."""
        backbone, node = build_backbone(cfg), cfg.MODEL.VIDEO.HEAD
        *_, last = backbone.output_shape().values()
        return {
            "backbone": backbone,
            "head": ClassificationHead(
                last.channels,
                node.NUM_CLASSES,
                pool_size=node.POOL_SIZE,
                dropout=node.DROPOUT,
                multi_label=node.MULTI_LABEL,
                init_std=node.INIT_STD,
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(
        self, inputs: Tensor | Sequence[dict[str, Any]]
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """Classify clips.

        Args:
            inputs: (N, C, T, H, W) with pixels from 0 to 255; or a dict for each clip, with
                "video", (C, T, H, W), and in training "label", see
                :meth:`ClassificationHead.losses`.

        Returns:
            The logits (N, K); for dicts in training, the losses by name, else a dict for each clip
            with "scores", (K,), see :meth:`scores`.
        """
        if isinstance(inputs, Tensor):
            return self.logits(inputs)
        clips = torch.stack([clip["video"].to(self.device) for clip in inputs])
        if self.training:
            return self.head.losses(self.logits(clips), [clip["label"] for clip in inputs])
        return [{"scores": scores} for scores in self.scores(clips)]

    def logits(self, clips: Tensor) -> Tensor:
        """Return (N, K) for clips (N, C, T, H, W)."""
        return self.head(self.features(clips))

    def scores(self, clips: Tensor) -> Tensor:
        """Return probabilities (N, K) for clips (N, C, T, H, W), see the head's ``scores``."""
        return self.head.scores(self.features(clips))

    def features(self, clips: Tensor) -> Tensor:
        """Return the last map of the backbone, which the head classifies."""
        return self.backbone((clips - self.pixel_mean) / self.pixel_std)[self.feature]
