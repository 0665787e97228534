"""Map the cells of a feature map, and attention over them, to the original image.

Coordinates x, y are in pixels from the upper left corner of the image, so (0.5, 0.5) is the center
of the first pixel. A cell is one position of a feature map. It stands for the square of the image
that RoIAlign assigns to it: cell i of a stage with stride s covers s * i to s * (i + 1). (In a
ResNet, the center of its receptive field is the upper left corner of that square.)

Shapes: T H W axes of a map; T = 1 for an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class FeatureGrid:
    """Position and size of a feature map's cells in the original image.

    Attributes:
        width: of a cell, in pixels of the original image.
        height: of a cell, in pixels of the original image.
        left: x of the left edge of the first column.
        top: y of the top edge of the first row.
        frames: number of frames that a cell covers.
    """

    width: float
    height: float
    left: float = 0.0
    top: float = 0.0
    frames: int = 1

    @classmethod
    def for_stage(
        cls, stride: int, image_size: Sequence[int], input_size: Sequence[int], frames: int = 1
    ) -> FeatureGrid:
        """Create the grid of a backbone stage.

        Args:
            stride: stride of the stage.
            image_size: H, W of the original image.
            input_size: H, W of the resized image, before padding. detectron2 pads on the right and
                at the bottom only, which does not shift the grid.
            frames: stride of the stage in time.
        """
        return cls(
            width=stride * image_size[1] / input_size[1],
            height=stride * image_size[0] / input_size[0],
            frames=frames,
        )

    @classmethod
    def for_roi(cls, box: Sequence[float], size: Sequence[int]) -> FeatureGrid:
        """Create the grid of RoIAlign's output.

        Args:
            box: the RoI as x0, y0, x1, y1 in the original image.
            size: rows and columns of the pooled map.
        """
        x0, y0, x1, y1 = box
        return cls(width=(x1 - x0) / size[1], height=(y1 - y0) / size[0], left=x0, top=y0)

    def cell(self, x: float, y: float, frame: int = 0) -> tuple[int, int, int]:
        """Return the cell (T, row, column) of a point; it can be outside the map."""
        row, column = (y - self.top) // self.height, (x - self.left) // self.width
        return frame // self.frames, int(row), int(column)

    def pooled(self, window: Sequence[int]) -> FeatureGrid:
        """Return the grid after pooling with ``window`` = (rows, columns)."""
        rows, columns = window
        return replace(self, width=self.width * columns, height=self.height * rows)

    def boxes(self, rows: int, columns: int) -> np.ndarray:
        """Return boxes x0, y0, x1, y1 of the cells in the original image, (rows, columns, 4)."""
        x = self.left + self.width * np.arange(columns + 1)
        y = self.top + self.height * np.arange(rows + 1)
        x0, y0 = np.meshgrid(x[:-1], y[:-1])
        x1, y1 = np.meshgrid(x[1:], y[1:])
        return np.stack([x0, y0, x1, y1], axis=-1)


def middle_frame(position: int, stride: int, length: int) -> int:
    """Return the frame in the middle of those that a position of the map stands for.

    Args:
        position: index into T.
        stride: number of frames that it stands for.
        length: number of frames of the clip.
    """
    return min(position * stride + (stride - 1) // 2, length - 1)


class Key(NamedTuple):
    """A key of an attention map.

    Attributes:
        box: x0, y0, x1, y1 of the key in the original image.
        frame: index into T.
        weight: attention weight.
    """

    box: tuple[float, float, float, float]
    frame: int
    weight: float

    @property
    def center(self) -> tuple[float, float]:
        """x, y of the center of the box."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one point of an image or clip, ready to be drawn.

    Attributes:
        weights: (T, H, W), one per key; T = 1 for an image.
        boxes: x0, y0, x1, y1 of the keys in the original image, clipped to its border; (H, W, 4). A
            key in the padding has an empty box.
        query: x, y in the original image, and index into T.
        hidden: sum of the absolute weights of keys that :meth:`select` left out.
    """

    weights: np.ndarray
    boxes: np.ndarray
    query: tuple[float, float, int]
    hidden: float = 0.0

    @property
    def in_image(self) -> np.ndarray:
        """Whether each key overlaps the image; (H, W) bool."""
        return np.all(self.boxes[..., 2:] > self.boxes[..., :2], axis=-1)

    def select(self, positions: Sequence[int]) -> AttentionMap:
        """Return the map at some indices into T, among which must be the query's."""
        kept = self.weights[list(positions)]
        x, y, t = self.query
        hidden = float(np.abs(self.weights).sum() - np.abs(kept).sum())
        return AttentionMap(kept, self.boxes, (x, y, positions.index(t)), hidden)

    def topk(self, count: int = 20) -> list[Key]:
        """Return the ``count`` keys in the image with the largest absolute weights."""
        magnitudes = np.where(self.in_image, np.abs(self.weights), -np.inf)
        count = min(count, int(np.isfinite(magnitudes).sum()))
        best = np.argsort(-magnitudes, axis=None, kind="stable")[:count]
        keys = zip(*np.unravel_index(best, magnitudes.shape))
        return [
            Key(tuple(self.boxes[h, w].tolist()), int(t), float(self.weights[t, h, w]))
            for t, h, w in keys
        ]
