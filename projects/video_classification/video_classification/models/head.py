"""The head: mean over space and time, dropout, one linear layer; and its loss.

Shapes: N clips, C channels, K classes, T H W axes of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassificationHead(nn.Module):
    """Classifies a map (N, C, T, H, W) as a whole.

    The order of mean and linear layer makes no difference: the logits are also the mean of the
    logits of all frames, as TSM says it.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        dropout: float = 0.5,
        multi_label: bool = False,
        init_std: float = 0.01,
    ):
        """Create the head.

        Args:
            in_channels: C.
            num_classes: K.
            dropout: probability to drop a channel of the mean in training.
            multi_label: a clip may have any number of classes.
            init_std: standard deviation of the initial weights.
        """
        super().__init__()
        self.multi_label = multi_label
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.linear.weight, std=init_std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K)."""
        return self.linear(self.dropout(x.mean((2, 3, 4))))

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
