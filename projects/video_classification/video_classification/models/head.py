"""The head: mean over space and time, dropout, one linear layer; its scores and its loss.

Shapes: N clips, C channels, K classes, P windows of a map, T H W its axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassificationHead(nn.Module):
    """Classifies a map (N, C, T, H, W): each of its windows, which span all frames.

    The order of mean and linear layer makes no difference: the logits are also the mean of the
    logits of all frames, as TSM says it.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        pool_size: int = 0,
        dropout: float = 0.5,
        multi_label: bool = False,
        init_std: float = 0.01,
    ):
        """Create the head.

        Args:
            in_channels: C.
            num_classes: K.
            pool_size: height and width of a window; they start at every position of the map, as
                long as they fit. 0, or a map that is smaller: one window, the whole map.
            dropout: probability to drop a channel of the mean in training.
            multi_label: a clip may have any number of classes.
            init_std: standard deviation of the initial weights.

        Raises:
            ValueError: a negative ``pool_size``.
        """
        super().__init__()
        if pool_size < 0:
            raise ValueError(
                "pool_size (config key MODEL.VIDEO.HEAD.POOL_SIZE) must be 0 or more, got "
                f"{pool_size}"
            )
        self.pool_size = pool_size
        self.multi_label = multi_label
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.linear.weight, std=init_std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K), the mean over the windows."""
        return self.window_logits(x).mean(1)

    def scores(self, x: Tensor) -> Tensor:
        """Return probabilities (N, K): those of each window, then their mean.

        video-nonlocal-net: lib/models/resnet_video.py (softmax), tools/test_net_video.py (mean).
        """
        logits = self.window_logits(x)
        return (logits.sigmoid() if self.multi_label else logits.softmax(-1)).mean(1)

    def window_logits(self, x: Tensor) -> Tensor:
        """Return the logits of every window, (N, P, K)."""
        frames = x.mean(2)
        height, width = frames.shape[2:]
        window = (self.pool_size or height, self.pool_size or width)
        means = F.avg_pool2d(frames, (min(window[0], height), min(window[1], width)), 1)
        return self.linear(self.dropout(means.flatten(2).transpose(1, 2)))

    def losses(self, logits: Tensor, labels: Sequence) -> dict[str, Tensor]:
        """Return the loss by its name.

        Args:
            logits: (N, K).
            labels: of each clip the number of its class, or with ``multi_label`` those of all its
                classes. The loss is then the mean binary cross-entropy of all N x K decisions.

        Raises:
            ValueError: a number that no class has.
        """
        classes = logits.shape[1]
        numbers = [
            [int(k) for k in label] if self.multi_label else [int(label)] for label in labels
        ]
        wrong = [k for clip in numbers for k in clip if not 0 <= k < classes]
        if wrong:
            raise ValueError(
                f"labels must be from 0 to {classes - 1}, as MODEL.VIDEO.HEAD.NUM_CLASSES is "
                f"{classes}, got {wrong[0]}"
            )
        if not self.multi_label:
            target = torch.tensor(numbers, device=logits.device)[:, 0]
            return {"loss_cls": F.cross_entropy(logits, target)}
        target = torch.zeros_like(logits)
        for row, clip in zip(target, numbers):
            row[clip] = 1
        return {"loss_cls": F.binary_cross_entropy_with_logits(logits, target)}
