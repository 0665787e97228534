"""The layout that all figures of attention share: title, image, color bar and legend.

Figures are sized for inclusion in a paper: one text column wide for an image, two for a clip, whose
frames are drawn side by side.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from nl_detectron.analysis.drawing.colors import ColorScale
from nl_detectron.analysis.geometry import AttentionMap

Box = tuple[float, float, float, float]

COLUMN, TWO_COLUMNS, MAX_HEIGHT = 3.25, 6.75, 3.4  # inches: figure widths, image height
MARGIN, LINE, BAR = 0.06, 0.125, 0.07  # inches: outer margin, height of a text line and color bar
FONT_SIZE, DPI = 7, 300
GAP = 8  # image pixels between frames
QUERY = "#3fd0ff"
HALO = [withStroke(linewidth=2, foreground="black")]


class Detection(NamedTuple):
    """A detection to draw.

    Attributes:
        box: x0, y0, x1, y1 in the original image.
        label: class and score.
    """

    box: Box
    label: str


class FigureData(NamedTuple):
    """The contents of a figure.

    Attributes:
        frames: T images (H, W, 3), uint8 in RGB; T = 1 for an image.
        attention: the map to draw.
        title: names the block, the query and the image.
        detection: detection to outline.
        crop: x0, y0, x1, y1 of the region to draw; default: the whole image.
        labels: of the frames of a clip; default: "t = 0" and so on.
    """

    frames: Sequence[np.ndarray]
    attention: AttentionMap
    title: str = ""
    detection: Detection | None = None
    crop: Box | None = None
    labels: Sequence[str] = ()


class Canvas:
    """A figure to draw attention on.

    Attributes:
        figure: the figure.
        axes: the axes that hold the frames, in pixels of the image; frame t starts at
            ``frame_left(t)``.
    """

    def __init__(self, data: FigureData, scale: ColorScale):
        """Lay out the figure, and draw the title, the frames and the color bar.

        Args:
            data: contents of the figure.
            scale: color scale of the attention weights.

        Raises:
            ValueError: ``data.frames`` does not match the number of frames of the map.
        """
        frames, attention = data.frames, data.attention
        if len(frames) != len(attention.weights):
            raise ValueError(
                f"frames must have one image per frame of the map, {len(attention.weights)}, "
                f"got {len(frames)}"
            )
        self._data = data
        height, width = frames[0].shape[:2]
        x0, y0, x1, y1 = data.crop or (0, 0, self.frame_left(len(frames)) - GAP, height)
        column = COLUMN if len(frames) == 1 else TWO_COLUMNS
        inches = min((column - 2 * MARGIN) / (x1 - x0), MAX_HEIGHT / (y1 - y0))
        self._inches_per_pixel = inches
        lines = [
            part
            for line in data.title.splitlines()
            for part in textwrap.wrap(line, int((column - 2 * MARGIN) * 72 / (0.62 * FONT_SIZE)))
        ]
        image_top = 1.5 * MARGIN + LINE * len(lines)
        bar_top = image_top + inches * (y1 - y0) + MARGIN
        legend_top = bar_top + BAR + 2.4 * LINE  # ticks and label
        figure_height = legend_top + LINE + MARGIN
        self.figure = Figure(figsize=(column, figure_height), dpi=DPI)

        def axes_at(top: float, height: float, share: float = 1.0) -> Axes:
            width = share * inches * (x1 - x0) / column
            bottom = (figure_height - top - height) / figure_height
            return self.figure.add_axes(((1 - width) / 2, bottom, width, height / figure_height))

        self.axes = axes_at(image_top, inches * (y1 - y0))
        self.axes.set_axis_off()
        labels = data.labels or [f"t = {t}" for t in range(len(frames))]
        for t, frame in enumerate(frames):
            extent = (self.frame_left(t), self.frame_left(t) + width, height, 0)
            self.axes.imshow(frame, extent=extent, cmap="gray", vmin=0, vmax=255)
            if len(frames) > 1:
                self._label(self.frame_left(t), 0, labels[t], "left", "top")
        self.axes.set(xlim=(x0, x1), ylim=(y1, y0), aspect="auto")
        scale.draw_bar(axes_at(bar_top, BAR, share=0.9), FONT_SIZE)  # room for the outer ticks
        self.figure.text(
            0.5,
            1 - MARGIN / figure_height,
            "\n".join(lines),
            ha="center",
            va="top",
            fontsize=FONT_SIZE,
        )
        self._legend_at = (0.5, 1 - legend_top / figure_height)

    def frame_left(self, t: int) -> int:
        """Return the x coordinate of the left edge of frame t."""
        return t * (self._data.frames[0].shape[1] + GAP)

    def outline(self, box: Sequence[float], t: int, color: str) -> Rectangle:
        """Outline a box in frame t."""
        x0, y0, x1, y1 = box
        outline = Rectangle(
            (x0 + self.frame_left(t), y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=color,
            linewidth=1,
            path_effects=HALO,
            clip_on=False,  # keep the full line width at the image border
        )
        self.axes.add_patch(outline)
        return outline

    def finish(self, legend: Mapping[str, Artist]) -> Figure:
        """Draw the detection, the query and the legend, and return the figure.

        Args:
            legend: dict from labels to the artists drawn in addition.
        """
        x, y, t = self._data.attention.query
        if detection := self._data.detection:
            self.outline(detection.box, t, QUERY)
            x0, y0, x1, _ = detection.box
            # Above the box; inside it, or right-aligned, if there is not enough room.
            left, right = self.axes.get_xlim()
            top = self.axes.get_ylim()[1]
            ha = "right" if x0 + x1 + 2 * self.frame_left(t) > left + right else "left"
            va = "bottom" if (y0 - top) * self._inches_per_pixel > LINE else "top"
            self._label(
                (x0 if ha == "left" else x1) + self.frame_left(t), y0, detection.label, ha, va
            )
        (query,) = self.axes.plot(
            x + self.frame_left(t), y, "o", ms=5, mfc=QUERY, mec="black", mew=0.8, zorder=9, ls=""
        )
        legend = {"query": query, **legend}
        self.figure.legend(
            legend.values(),
            legend.keys(),
            loc="upper center",
            bbox_to_anchor=self._legend_at,
            ncols=len(legend),
            fontsize=FONT_SIZE,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handletextpad=0.5,
            columnspacing=1.5,
            handlelength=1.5,
        )
        return self.figure

    def _label(self, x: float, y: float, text: str, ha: str, va: str) -> None:
        """Write text whose ``ha`` and ``va`` corner is at x, y."""
        self.axes.annotate(
            text,
            (x, y),
            (1.5 if ha == "left" else -1.5, 1.5 if va == "bottom" else -1.5),
            textcoords="offset points",
            ha=ha,
            va=va,
            color="white",
            fontsize=FONT_SIZE,
            path_effects=HALO,
        )
