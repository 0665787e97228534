"""Test a model on many views of each video: several clips, and several crops of each.

Shapes: F frames and H W height and width of the resized video, T frames and h w of a view, V views
= clips x crops, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .models import VideoClassifier

COMBINE = {"mean": lambda scores: scores.mean(0), "max": lambda scores: scores.amax(0)}


def combine_views(scores: Tensor, how: str) -> Tensor:
    """Return the scores of a video, (K,), from those of its views, (V, K).

    Args:
        scores: probabilities.
        how: a key of :data:`COMBINE` (config key TEST.VIEWS.COMBINE).

    Raises:
        ValueError: another value of ``how``.
    """
    if how not in COMBINE:
        raise ValueError(
            f"how (config key TEST.VIEWS.COMBINE) must be one of {tuple(COMBINE)}, got {how!r}"
        )
    return COMBINE[how](scores)


class MultiViewClassifier(nn.Module):
    """Wraps a model for test-time views, as ``GeneralizedRCNNWithTTA`` does for detectors."""

    def __init__(self, model: VideoClassifier, batch_size: int = 1):
        """Wrap a model.

        Args:
            model: classifies the views.
            batch_size: number of views in one forward pass (config key TEST.VIEWS.BATCH_SIZE).

        Raises:
            ValueError: a batch size below 1.
        """
        super().__init__()
        if batch_size < 1:
            raise ValueError(
                f"batch_size (config key TEST.VIEWS.BATCH_SIZE) must be 1 or more, got {batch_size}"
            )
        self.model = model
        self.batch_size = batch_size
        self.training = model.training  # which detectron2 restores after a test

    @torch.no_grad()
    def forward(self, inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Classify the views of each video.

        Args:
            inputs: a dict for each video, with "video" (3, F, H, W), "clips" (clips, T), numbers
                of frames, and "crops" (crops, 4), the y, x, h, w of equally large boxes. Or with
                "error", if it cannot be read.

        Returns:
            For each video, "scores" (V, K), probabilities, all crops of the first clip first; or
            its "error".
        """
        return [
            {"error": video["error"]} if "error" in video else {"scores": self._scores(video)}
            for video in inputs
        ]

    def _scores(self, video: dict[str, Any]) -> Tensor:
        views, scores = _views(video), []
        while batch := list(itertools.islice(views, self.batch_size)):
            scores.append(self.model.scores(torch.stack(batch).to(self.model.device)))
        return torch.cat(scores)


def _views(video: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the views, (3, T, h, w)."""
    for frames in video["clips"]:
        for y, x, h, w in video["crops"].tolist():
            yield video["video"][:, :, y : y + h, x : x + w][:, frames]
