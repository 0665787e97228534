"""The temporal shift of TSM (https://arxiv.org/abs/1811.08383): some channels from another frame.

Shapes: N batch, C channels, T H W axes of a map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nl_detectron.non_local import NonLocalBlock

DIRECTIONS = ("bidirectional", "unidirectional")


def temporal_shift(x: Tensor, channels: int, direction: str) -> Tensor:
    """Shift channels of a map (N, C, T, H, W) by one frame, with zeros at the ends of the clip.

    Args:
        x: the map.
        channels: number of channels to shift in each direction.
        direction: "bidirectional": the first channels come from the next frame, as many after them
            from the previous one. "unidirectional": the first come from the previous frame.
    """
    out = torch.zeros_like(x)
    backward, forward, end = 0, channels, 2 * channels  # where the channels of each kind begin
    if direction == "bidirectional":
        out[:, backward:forward, :-1] = x[:, backward:forward, 1:]
    else:
        forward, end = 0, channels
    out[:, forward:end, 1:] = x[:, forward:end, :-1]
    out[:, end:] = x[:, end:]
    return out


class TemporalShift(nn.Module):
    """Applies :func:`temporal_shift` to a fraction of the channels; has no parameters.

    Within :func:`online`, the first frame of a clip follows the last frame of the previous call.
    """

    def __init__(self, in_channels: int, divisor: int = 8, direction: str = "bidirectional"):
        """Create the module.

        Args:
            in_channels: C.
            divisor: C / divisor channels are shifted in each direction.
            direction: one of :data:`DIRECTIONS`.

        Raises:
            ValueError: no such direction, or a divisor for which there are too few channels.
        """
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(
                "direction (config key MODEL.VIDEO.SHIFT.DIRECTION) must be one of "
                f"{DIRECTIONS}, or empty for no shift, got {direction!r}"
            )
        if not 2 <= divisor <= in_channels:
            raise ValueError(
                "divisor (config key MODEL.VIDEO.SHIFT.DIVISOR) must be at least 2 and at most "
                f"the number of channels, {in_channels}, got {divisor}"
            )
        self.channels = in_channels // divisor
        self.direction = direction
        self.online = False
        self.last_frame: Tensor | None
        self.register_buffer("last_frame", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shift a map (N, C, T, H, W)."""
        out = temporal_shift(x, self.channels, self.direction)
        if self.online:
            if self.last_frame is not None:
                out[:, : self.channels, 0] = self.last_frame
            self.last_frame = x[:, : self.channels, -1].detach().clone()
        return out

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"channels={self.channels}, direction={self.direction}"


@contextmanager
def online(model: nn.Module) -> Iterator[None]:
    """Let a model process a video frame by frame, or a few frames at a time.

    Each call continues where the last one ended, and gives the results of a single call on the
    whole video, because no frame depends on a later one. The logits of the video are the mean of
    the logits of its frames.

    Args:
        model: in evaluation mode, with unidirectional shifts, and nothing else that mixes frames.

    Raises:
        ValueError: the model is in training mode, has no shifts, or mixes frames.
    """
    if model.training:
        raise ValueError("a model that runs online must be in evaluation mode: model.eval()")
    shifts = [module for module in model.modules() if isinstance(module, TemporalShift)]
    if not shifts:
        raise ValueError("the model has no temporal shifts: MODEL.VIDEO.SHIFT.DIRECTION is empty")
    mixing = [name for name, module in model.named_modules() if _mixes_frames(module)]
    if mixing:
        raise ValueError(
            f"online, only unidirectional shifts may mix frames; so do {', '.join(mixing)}"
        )
    for shift in shifts:
        shift.online = True
    try:
        yield
    finally:
        for shift in shifts:
            shift.online, shift.last_frame = False, None


def _mixes_frames(module: nn.Module) -> bool:
    """Whether a layer gives a frame what comes from others, or gives fewer frames."""
    if isinstance(module, NonLocalBlock):
        return module.part_size((2, 1, 1))[0] > 1
    if isinstance(module, (nn.Conv3d, nn.MaxPool3d)):
        return (module.kernel_size[0], module.stride[0]) != (1, 1)
    return isinstance(module, TemporalShift) and module.direction == "bidirectional"
