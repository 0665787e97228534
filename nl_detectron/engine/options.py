"""How a training run deals with what goes wrong, what it keeps, and what makes it faster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """Options of a training run that are not part of its config.

    Attributes:
        keep_last: number of periodic checkpoints to keep; 0 keeps all.
        keep_best: metric whose best checkpoint is kept, too, such as "bbox/AP"; "" for none.
        max_nonfinite: number of iterations to skip because the loss or a gradient is not finite;
            one more ends the training.
        max_bad_images: share of the training images, or videos, that may be unreadable.
        channels_last: store maps and weights of convolutions channels-last.
        fold_norms: let convolutions apply the frozen batch norms that follow them.
    """

    keep_last: int = 0
    keep_best: str = ""
    max_nonfinite: int = 10
    max_bad_images: float = 0.0
    channels_last: bool = False
    fold_norms: bool = False


DEFAULT_OPTIONS = RunOptions()
