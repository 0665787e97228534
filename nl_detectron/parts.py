"""Which positions of a map attend to each other.

A map falls into parts of equal size, and a position attends to those of its own part. To compute
with them, each part becomes a sample of its own.

Shapes: N batch, C channels, P positions of a part, G groups of frames; "map" is (N, C, W),
(N, C, H, W) or (N, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AXES = ("spacetime", "space", "time")


def check_parts(dim: int, axes: str, group_frames: int) -> None:
    """Check that maps with ``dim`` axes besides N and C have such parts.

    Raises:
        ValueError: they do not.
    """
    if dim < 3 and (axes != "spacetime" or group_frames):
        what = f"group_frames {group_frames}" if group_frames else f"axes {axes!r}"
        raise ValueError(f"{what}: dim (config key DIM) must be 3, got {dim}")
    if axes == "space" and group_frames:
        raise ValueError(
            "axes 'space' leaves no frames to group: group_frames (config key GROUP_FRAMES) must "
            f"be 0, got {group_frames}"
        )


def part_size(size: Sequence[int], axes: str, group_frames: int) -> tuple[int, ...]:
    """Size of each part of a map of this size, ([[T,] H,] W).

    ``axes`` and ``group_frames`` are those of :class:`~nl_detectron.NonLocalBlock`, here and below.
    """
    if axes == "space":
        return 1, *size[1:]
    if axes == "time":
        return group_frames or size[0], 1, 1
    return group_frames or size[0], *size[1:]


def to_rows(x: Tensor, axes: str, group_frames: int) -> Tensor:
    """Map -> (N * number of parts, P, C).

    Raises:
        ValueError: T is not a multiple of ``group_frames``.
    """
    frames = 1 if axes == "space" else group_frames
    if frames:
        # In a trace, a comparison would fix T; there, unflatten raises an error of its own.
        if not torch.jit.is_tracing() and x.shape[2] % frames:
            raise ValueError(
                "the number of frames of the map must be a multiple of group_frames (config key "
                f"GROUP_FRAMES) = {frames}, got {x.shape[2]}"
            )
        x = x.unflatten(2, (-1, frames)).transpose(1, 2).flatten(0, 1)
    if axes == "time":
        x = x.permute(0, 3, 4, 1, 2).flatten(0, 2)
    return x.flatten(2).transpose(1, 2)


def to_map(rows: Tensor, like: Tensor, axes: str, group_frames: int) -> Tensor:
    """Undo :func:`to_rows`; all axes of the map but that of its channels are as in ``like``."""
    rows, channels = rows.transpose(1, 2), rows.shape[-1]
    if axes == "spacetime" and not group_frames:
        return rows.reshape(like.shape[0], channels, *like.shape[2:])
    n, _, t, h, w = like.shape
    frames = 1 if axes == "space" else group_frames or t
    groups = t // frames
    if axes == "time":
        x = rows.reshape(n, groups, h, w, channels, frames).permute(0, 4, 1, 5, 2, 3)
    else:
        x = rows.reshape(n, groups, channels, frames, h, w).transpose(1, 2)
    return x.flatten(2, 3)  # (N, C, G, T / G, H, W)
