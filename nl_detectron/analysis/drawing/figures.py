"""Figures of attention for a paper: a heat map over the image, and the arrows of Figure 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from nl_detectron.analysis.drawing.canvas import Canvas, Subject
from nl_detectron.analysis.drawing.colors import WeightScale

MOST_ARROWS, ENOUGH = 20, 0.9  # arrows: at most, and the share of the weight at which they end
SAMPLES = 16  # along a side of a key in a heat map


def draw_heat_map(subject: Subject, *, smooth: bool = True) -> Figure:
    """Draw the weights as colours over the grey image, and outline the strongest key.

    What is interpolated, bilinearly between the centres of the keys, is the place of a weight on
    the logarithmic colour scale; beyond the outermost centres it is constant.

    Args:
        subject: what to draw.
        smooth: interpolate; otherwise every key is a rectangle of one colour.

    Raises:
        ValueError: the map has another number of frames.
    """
    attention = subject.attention
    scale = WeightScale.of(attention)
    canvas = Canvas(subject._replace(frames=[_grey(frame) for frame in subject.frames]), scale)
    rows, columns = attention.in_image.any(axis=1), attention.in_image.any(axis=0)
    boxes = attention.boxes[rows][:, columns]
    (left, top), (right, bottom) = boxes[0, 0, :2], boxes[-1, -1, 2:]
    for t, weights in enumerate(attention.weights[:, rows][:, :, columns]):
        level = _resampled(scale.level(weights).T, boxes[:, 0, 1::2], smooth).T
        level = _resampled(level, boxes[0, :, ::2], smooth)
        x = canvas.left_of(t)
        extent = (x + left, x + right, bottom, top)
        canvas.axes.imshow(
            scale.cmap(level),
            extent=extent,
            aspect="auto",
            interpolation="bilinear" if smooth else "nearest",
        )
    key = attention.strongest(1)[0]
    outline = canvas.outline(key.box, key.frame, "white")
    return canvas.finish({f"strongest key, weight {key.weight:.2g}": outline})


def draw_arrows(subject: Subject) -> Figure:
    """Draw arrows from the query to the centres of the keys with the largest weights (Figure 3).

    The strongest keys in the image get one until they hold nine tenths of all weight, twenty at
    most; the legend says how many they are and what they hold. Width and opacity of an arrow grow
    with the root of its share of all weight, so that those of a flat map are faint. Where weights
    have signs, their absolute values count.

    Args:
        subject: what to draw.

    Raises:
        ValueError: the map has another number of frames.
    """
    attention = subject.attention
    scale = WeightScale.of(attention, opaque=True)
    whole = float(np.abs(attention.weights).sum())
    keys, held = [], 0.0
    for key in attention.strongest(MOST_ARROWS):
        if held >= ENOUGH or key.weight == 0:
            break
        keys.append(key)
        held += abs(key.weight) / whole
    canvas = Canvas(subject, scale)
    x, y, query_frame = attention.query
    for key in reversed(keys):  # the strongest on top
        key_x, key_y = key.centre
        strength = np.sqrt(abs(key.weight) / whole)
        width, opacity = 0.4 + 1.6 * strength, 0.25 + 0.75 * strength
        halo = withStroke(linewidth=width + 0.8, foreground="black", alpha=0.3 * opacity)
        canvas.axes.annotate(
            "",
            (key_x + canvas.left_of(key.frame), key_y),
            (x + canvas.left_of(query_frame), y),
            arrowprops={
                "arrowstyle": "-|>,head_length=0.4,head_width=0.2",
                "mutation_scale": 5 + 7 * strength,
                "color": scale.cmap(scale.level(np.array(key.weight)))[:3],
                "linewidth": width,
                "alpha": opacity,
                "path_effects": [halo],
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    handle = Line2D([], [], color="0.3", linewidth=1.5, marker=">", markersize=3)
    statement = f"top {len(keys)} of {attention.weights.size} keys: {held:.0%} of the weight"
    return canvas.finish({statement: handle})


def save_grid(path: Path, files: Sequence[Path], columns: int) -> None:
    """Put picture files into one, row by row, each in its own size.

    Args:
        path: file to write.
        files: pictures.
        columns: pictures in a row.
    """
    pictures = [Image.open(file).convert("RGB") for file in files]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    grid = Image.new("RGB", (min(columns, len(pictures)) * width, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            grid.paste(picture, (j * width, sum(heights[:i])))
    grid.save(path)


def _grey(frame: np.ndarray) -> np.ndarray:
    """A grey image (H, W) of less contrast, so that colours over it can be told apart."""
    return 30 + 0.7 * frame @ [0.299, 0.587, 0.114]


def _resampled(level: np.ndarray, spans: np.ndarray, smooth: bool) -> np.ndarray:
    """Values of keys at ``SAMPLES`` points per key along the last axis.

    Args:
        level: (..., K).
        spans: where each key begins and ends; (K, 2).
        smooth: whether to interpolate linearly between their centres.
    """
    points = np.linspace(spans[0, 0], spans[-1, 1], SAMPLES * len(spans) + 1)
    points = (points[:-1] + points[1:]) / 2
    if not smooth:
        return level[..., np.searchsorted(spans[:, 1], points)]
    return np.stack([np.interp(points, spans.mean(axis=1), row) for row in level])
