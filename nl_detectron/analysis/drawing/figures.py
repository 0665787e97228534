"""Draw attention as a heat map over the image, or as arrows like Figure 3 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from nl_detectron.analysis.drawing.canvas import Canvas, FigureData
from nl_detectron.analysis.drawing.colors import ColorScale

MAX_ARROWS, WEIGHT_SHARE = 20, 0.9  # stop at this number, or at this share of the total weight
SAMPLES = 16  # per side of a key in a heat map


def draw_heat_map(data: FigureData, *, smooth: bool = True) -> Figure:
    """Draw the weights as colors over the gray image, and outline the strongest key.

    Interpolation is bilinear between the centers of the keys, on the logarithmic color scale.
    Outside the outermost centers the values are constant.

    Args:
        data: contents of the figure.
        smooth: interpolate; otherwise each key is a rectangle of one color.

    Raises:
        ValueError: ``data.frames`` does not match the number of frames of the map.
    """
    attention = data.attention
    scale = ColorScale.from_attention(attention)
    canvas = Canvas(data._replace(frames=[_to_gray(frame) for frame in data.frames]), scale)
    rows, columns = attention.in_image.any(axis=1), attention.in_image.any(axis=0)
    boxes = attention.boxes[rows][:, columns]
    (left, top), (right, bottom) = boxes[0, 0, :2], boxes[-1, -1, 2:]
    for t, weights in enumerate(attention.weights[:, rows][:, :, columns]):
        values = _resample(scale.normalize(weights).T, boxes[:, 0, 1::2], smooth).T
        values = _resample(values, boxes[0, :, ::2], smooth)
        x = canvas.frame_left(t)
        extent = (x + left, x + right, bottom, top)
        canvas.axes.imshow(
            scale.cmap(values),
            extent=extent,
            aspect="auto",
            interpolation="bilinear" if smooth else "nearest",
        )
    key = attention.topk(1)[0]
    outline = canvas.outline(key.box, key.frame, "white")
    here = " in these frames" if attention.hidden else ""
    return canvas.finish({f"strongest key{here}, weight {key.weight:.2g}": outline})


def draw_arrows(data: FigureData) -> Figure:
    """Draw arrows from the query to the centers of the keys with the largest weights (Figure 3).

    Arrows are drawn to the strongest keys in the image until they hold 90% of the total weight, but
    at most 20; the legend gives their number and share, and the share of frames that are not drawn.
    The width and opacity of an arrow grow with the square root of its share, so arrows of a flat
    map are faint. Negative weights count by their absolute value.

    Args:
        data: contents of the figure.

    Raises:
        ValueError: ``data.frames`` does not match the number of frames of the map.
    """
    attention = data.attention
    scale = ColorScale.from_attention(attention, opaque=True)
    total = float(np.abs(attention.weights).sum()) + attention.hidden
    keys, covered = [], 0.0
    for key in attention.topk(MAX_ARROWS):
        if covered >= WEIGHT_SHARE or key.weight == 0:
            break
        keys.append(key)
        covered += abs(key.weight) / total
    canvas = Canvas(data, scale)
    x, y, query_frame = attention.query
    for key in reversed(keys):  # the strongest on top
        key_x, key_y = key.center
        strength = np.sqrt(abs(key.weight) / total)
        width, opacity = 0.4 + 1.6 * strength, 0.25 + 0.75 * strength
        halo = withStroke(linewidth=width + 0.8, foreground="black", alpha=0.3 * opacity)
        canvas.axes.annotate(
            "",
            (key_x + canvas.frame_left(key.frame), key_y),
            (x + canvas.frame_left(query_frame), y),
            arrowprops={
                "arrowstyle": "-|>,head_length=0.4,head_width=0.2",
                "mutation_scale": 5 + 7 * strength,
                "color": scale.cmap(scale.normalize(np.array(key.weight)))[:3],
                "linewidth": width,
                "alpha": opacity,
                "path_effects": [halo],
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    handle = Line2D([], [], color="0.3", linewidth=1.5, marker=">", markersize=3)
    here = " in these frames" if attention.hidden else ""
    statement = (
        f"top {len(keys)} of {attention.weights.size} keys{here}: {covered:.0%} of the weight"
    )
    if attention.hidden:
        statement += f", {attention.hidden / total:.0%} in other frames"
    return canvas.finish({statement: handle})


def save_image_grid(path: Path, files: Sequence[Path], columns: int) -> None:
    """Tile image files into one image, row by row, without resizing.

    Args:
        path: file to write.
        files: images to tile.
        columns: images per row.
    """
    images = [Image.open(file).convert("RGB") for file in files]
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    width = max(image.width for image in images)
    heights = [max(image.height for image in row) for row in rows]
    grid = Image.new("RGB", (min(columns, len(images)) * width, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            grid.paste(image, (j * width, sum(heights[:i])))
    grid.save(path)


def _to_gray(frame: np.ndarray) -> np.ndarray:
    """Convert to a gray image (H, W) with reduced contrast, so that overlaid colors stand out."""
    return 30 + 0.7 * frame @ [0.299, 0.587, 0.114]


def _resample(values: np.ndarray, spans: np.ndarray, smooth: bool) -> np.ndarray:
    """Resample the values of keys to ``SAMPLES`` points per key along the last axis.

    Args:
        values: (..., K).
        spans: start and end of each key; (K, 2).
        smooth: interpolate linearly between the centers of the keys.
    """
    points = np.linspace(spans[0, 0], spans[-1, 1], SAMPLES * len(spans) + 1)
    points = (points[:-1] + points[1:]) / 2
    if not smooth:
        return values[..., np.searchsorted(spans[:, 1], points)]
    return np.stack([np.interp(points, spans.mean(axis=1), row) for row in values])
