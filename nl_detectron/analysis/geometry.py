"""Where the cells of a feature map lie in the original image, and attention seen from there.

Coordinates x, y count pixels of the image from its upper left corner, so (0.5, 0.5) is the centre
of the first pixel. A cell is one position of a feature map, and is the square of the image that
RoIAlign takes it for: cell i of a stage of stride s covers s * i to s * (i + 1). (In a ResNet the
centre of its receptive field is the upper left corner of that square.)

Shapes: T H W axes of a map; T = 1 for an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class CellGrid:
    """Where the cells of a map lie in the original image.

    Attributes:
        width: of a cell, in pixels of the original image.
        height: likewise.
        left: x where the first column begins.
        top: y where the first row begins.
        frames: frames of the clip that a cell covers.
    """

    width: float
    height: float
    left: float = 0.0
    top: float = 0.0
    frames: int = 1

    @classmethod
    def of_stage(
        cls, stride: int, image_size: Sequence[int], input_size: Sequence[int]
    ) -> CellGrid:
        """The grid of a backbone stage.

        Args:
            stride: of the stage.
            image_size: H, W of the original image.
            input_size: H, W of the image as it was resized for the network, before padding, which
                detectron2 adds on the right and below and which therefore moves nothing.
        """
        return cls(
            width=stride * image_size[1] / input_size[1],
            height=stride * image_size[0] / input_size[0],
        )

    @classmethod
    def of_roi(cls, box: Sequence[float], size: Sequence[int]) -> CellGrid:
        """The grid of RoIAlign.

        Args:
            box: the RoI as x0, y0, x1, y1 in the original image.
            size: rows and columns of the pooled map.
        """
        x0, y0, x1, y1 = box
        return cls(width=(x1 - x0) / size[1], height=(y1 - y0) / size[0], left=x0, top=y0)

    def cell(self, x: float, y: float, frame: int = 0) -> tuple[int, int, int]:
        """The cell (T, row, column) of a point; it may be outside the map."""
        row, column = (y - self.top) // self.height, (x - self.left) // self.width
        return frame // self.frames, int(row), int(column)

    def coarsened(self, window: Sequence[int]) -> CellGrid:
        """The grid of keys that each cover ``window`` = (rows, columns) of cells."""
        rows, columns = window
        return replace(self, width=self.width * columns, height=self.height * rows)

    def boxes(self, rows: int, columns: int) -> np.ndarray:
        """Boxes x0, y0, x1, y1 of the cells in the original image, (rows, columns, 4)."""
        x = self.left + self.width * np.arange(columns + 1)
        y = self.top + self.height * np.arange(rows + 1)
        x0, y0 = np.meshgrid(x[:-1], y[:-1])
        x1, y1 = np.meshgrid(x[1:], y[1:])
        return np.stack([x0, y0, x1, y1], axis=-1)


class Key(NamedTuple):
    """A key of an attention map.

    Attributes:
        box: x0, y0, x1, y1 of its part in the original image.
        frame: T.
        weight: its weight.
    """

    box: tuple[float, float, float, float]
    frame: int
    weight: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box, x and y."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one point of an image or clip, ready to be drawn.

    Attributes:
        weights: (T, H, W), one per key; T = 1 for an image.
        boxes: x0, y0, x1, y1 of the keys in the original image, cut off at its border; (H, W, 4). A
            key in the padding has an empty box.
        query: x, y in the original image, and T.
    """

    weights: np.ndarray
    boxes: np.ndarray
    query: tuple[float, float, int]

    @property
    def in_image(self) -> np.ndarray:
        """Which keys lie in the image, at least in part; (H, W) bool."""
        return np.all(self.boxes[..., 2:] > self.boxes[..., :2], axis=-1)

    def strongest(self, count: int = 20) -> list[Key]:
        """The keys in the image with the largest weights, regardless of signs."""
        sizes = np.where(self.in_image, np.abs(self.weights), -np.inf)
        count = min(count, int(np.isfinite(sizes).sum()))
        best = np.argsort(-sizes, axis=None, kind="stable")[:count]
        keys = zip(*np.unravel_index(best, sizes.shape))
        return [
            Key(tuple(self.boxes[h, w].tolist()), int(t), float(self.weights[t, h, w]))
            for t, h, w in keys
        ]
