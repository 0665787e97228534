"""Pictures of attention: a heat map over the image, and the arrows of the paper's Figure 3.

A clip is drawn as its frames side by side, an image as a clip of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from nl_detectron.cells import AttentionMap

Box = tuple[float, float, float, float]

GAP = 8  # pixels between frames
LONG_SIDE, DPI = 8, 150  # inches of an image's longer side, pixels per inch
LEAST_SHARE = 0.01  # of the largest weight, for an arrow
HEAT = matplotlib.colormaps["inferno"]
ARROW, QUERY = "#ffd21f", "#e8112d"


def draw_heat_map(
    frames: Sequence[np.ndarray], attention: AttentionMap, view: Box | None = None
) -> Figure:
    """Draw the weights as colours over the image, bright where they are large.

    Args:
        frames: T images (H, W, 3), uint8 in RGB.
        attention: the map to draw.
        view: x0, y0, x1, y1 of the part of the image to draw, with the outline of the map in it;
            without it, the whole image.

    Raises:
        ValueError: the map has another number of frames.
    """
    grey = [np.repeat(frame.mean(axis=2, keepdims=True), 3, axis=2) / 255 for frame in frames]
    figure, axes = _canvas(grey, attention, view)
    weights, boxes = attention.weights, attention.boxes
    shown = weights[:, attention.in_image]
    level_of = Normalize(min(shown.min(), 0.0), shown.max(), clip=True)
    x = np.append(boxes[0, :, 0], boxes[0, -1, 2])
    y = np.append(boxes[:, 0, 1], boxes[-1, 0, 3])
    for t, frame_weights in enumerate(weights):
        level = level_of(frame_weights)
        # What has little weight is seen through.
        axes.pcolormesh(
            x + _shift(frames, t), y, level, cmap=HEAT, vmin=0, vmax=1, alpha=0.25 + 0.5 * level
        )
    _mark_query(axes, frames, attention)
    return figure


def draw_arrows(
    frames: Sequence[np.ndarray],
    attention: AttentionMap,
    view: Box | None = None,
    count: int = 20,
) -> Figure:
    """Draw arrows from the query to the centres of the keys with the largest weights (Figure 3).

    The larger the weight, the thicker the arrow. Keys in the padding get none, nor do those with
    less than a hundredth of the largest weight.

    Args:
        frames: as in :func:`draw_heat_map`.
        attention: likewise.
        view: likewise.
        count: number of arrows, at most.

    Raises:
        ValueError: the map has another number of frames.
    """
    figure, axes = _canvas(frames, attention, view)
    x, y, query_frame = attention.query
    keys = attention.strongest(count)
    largest = keys[0][3]
    for key_x, key_y, t, weight in reversed(keys):  # the strongest on top
        if weight <= LEAST_SHARE * max(largest, 0.0):
            continue
        share = weight / largest
        axes.annotate(
            "",
            (key_x + _shift(frames, t), key_y),
            (x + _shift(frames, query_frame), y),
            arrowprops={
                "arrowstyle": "-|>,head_length=0.5,head_width=0.25",
                "color": ARROW,
                "linewidth": 0.7 + 1.3 * share,
                "alpha": 0.5 + 0.5 * share,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    _mark_query(axes, frames, attention)
    return figure


def save_grid(path: Path, files: Sequence[Path], columns: int, width: int = 480) -> None:
    """Put picture files side by side into one, row by row, in places of one size.

    Args:
        path: file to write.
        files: pictures.
        columns: places in a row.
        width: of a place, in pixels; its height suits the median picture.
    """
    tiles = []
    for file in files:
        with Image.open(file) as image:
            tiles.append(image.resize((width, round(width * image.height / image.width))))
    height = int(np.median([tile.height for tile in tiles]))
    rows = -(-len(tiles) // columns)
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    grid = Image.new("RGB", size, "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        place = ImageOps.pad(tile, (width, height), color="white")
        grid.paste(place, (column * (width + GAP), row * (height + GAP)))
    grid.save(path)


def _canvas(
    frames: Sequence[np.ndarray], attention: AttentionMap, view: Box | None
) -> tuple[Figure, Axes]:
    if len(frames) != len(attention.weights):
        raise ValueError(f"{len(frames)} frames, but the map has {len(attention.weights)}")
    height, width = frames[0].shape[:2]
    x0, y0, x1, y1 = view or (0, 0, _shift(frames, len(frames)) - GAP, height)
    # The frames of a clip are drawn half as large as an image.
    longest = max(height, width) * min(len(frames), 2) if view is None else max(x1 - x0, y1 - y0)
    inches = LONG_SIDE / longest
    figure = Figure(figsize=(inches * (x1 - x0), inches * (y1 - y0)), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for t, frame in enumerate(frames):
        left = _shift(frames, t)
        axes.imshow(frame, extent=(left, left + width, height, 0))
    axes.set(xlim=(x0, x1), ylim=(y1, y0))
    if view is not None:
        (left, top), (right, bottom) = attention.boxes[0, 0, :2], attention.boxes[-1, -1, 2:]
        outline = Rectangle((left, top), right - left, bottom - top, fill=False, color="white")
        axes.add_patch(outline)
    return figure, axes


def _shift(frames: Sequence[np.ndarray], t: int) -> int:
    """The x at which frame t begins."""
    return t * (frames[0].shape[1] + GAP)


def _mark_query(axes: Axes, frames: Sequence[np.ndarray], attention: AttentionMap) -> None:
    x, y, t = attention.query
    axes.plot(x + _shift(frames, t), y, "o", ms=9, mfc=QUERY, mec="white", zorder=9)
