"""What all figures of attention have in common: title, image, colour bar and legend.

A figure of an image is as wide as a column of text, that of a clip, whose frames stand side by
side, as two; both are meant to be included as they are.
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

from nl_detectron.analysis.drawing.colors import WeightScale
from nl_detectron.analysis.geometry import AttentionMap

Box = tuple[float, float, float, float]

COLUMN, TWO_COLUMNS, TALLEST = 3.25, 6.75, 3.4  # inches: widths of figures, height of an image
MARGIN, LINE, BAR = 0.06, 0.125, 0.07  # inches: around all, of a line of text, of the colour bar
FONT_SIZE, DPI = 7, 300
GAP = 8  # pixels of the image between frames
QUERY = "#3fd0ff"
HALO = [withStroke(linewidth=2, foreground="black")]


class Detection(NamedTuple):
    """What is drawn of a detection.

    Attributes:
        box: x0, y0, x1, y1 in the original image.
        label: its class and score.
    """

    box: Box
    label: str


class Subject(NamedTuple):
    """What a figure is about.

    Attributes:
        frames: T images (H, W, 3), uint8 in RGB; T = 1 for an image.
        attention: the map to draw.
        title: names the block, the query and the image.
        detection: to be outlined.
        view: x0, y0, x1, y1 of the part of the image to draw; without it, the whole image.
    """

    frames: Sequence[np.ndarray]
    attention: AttentionMap
    title: str = ""
    detection: Detection | None = None
    view: Box | None = None


class Canvas:
    """A figure to draw attention into.

    Attributes:
        figure: the figure.
        axes: where the frames are, in pixels of the image; frame t begins at ``left_of(t)``.
    """

    def __init__(self, subject: Subject, scale: WeightScale):
        """Lay out the figure, and draw the title, the frames and the colour bar.

        Args:
            subject: what the figure is about.
            scale: of the colour bar.

        Raises:
            ValueError: the map has another number of frames.
        """
        frames, attention = subject.frames, subject.attention
        if len(frames) != len(attention.weights):
            raise ValueError(f"{len(frames)} frames, but the map has {len(attention.weights)}")
        self._subject = subject
        height, width = frames[0].shape[:2]
        x0, y0, x1, y1 = subject.view or (0, 0, self.left_of(len(frames)) - GAP, height)
        column = COLUMN if len(frames) == 1 else TWO_COLUMNS
        self._inches = inches = min((column - 2 * MARGIN) / (x1 - x0), TALLEST / (y1 - y0))
        lines = [
            part
            for line in subject.title.splitlines()
            for part in textwrap.wrap(line, int((column - 2 * MARGIN) * 72 / (0.62 * FONT_SIZE)))
        ]
        image_top = 1.5 * MARGIN + LINE * len(lines)
        bar_top = image_top + inches * (y1 - y0) + MARGIN
        legend_top = bar_top + BAR + 2.4 * LINE  # its ticks and its label
        whole = legend_top + LINE + MARGIN
        self.figure = Figure(figsize=(column, whole), dpi=DPI)

        def axes_at(top: float, height: float, part: float = 1.0) -> Axes:
            width = part * inches * (x1 - x0) / column
            bottom = (whole - top - height) / whole
            return self.figure.add_axes(((1 - width) / 2, bottom, width, height / whole))

        self.axes = axes_at(image_top, inches * (y1 - y0))
        self.axes.set_axis_off()
        for t, frame in enumerate(frames):
            extent = (self.left_of(t), self.left_of(t) + width, height, 0)
            self.axes.imshow(frame, extent=extent, cmap="gray", vmin=0, vmax=255)
            if len(frames) > 1:
                self._label(self.left_of(t), 0, f"t = {t}", "left", "top")
        self.axes.set(xlim=(x0, x1), ylim=(y1, y0), aspect="auto")
        scale.draw_bar(axes_at(bar_top, BAR, part=0.9), FONT_SIZE)  # room for its outer ticks
        self.figure.text(
            0.5, 1 - MARGIN / whole, "\n".join(lines), ha="center", va="top", fontsize=FONT_SIZE
        )
        self._legend_at = (0.5, 1 - legend_top / whole)

    def left_of(self, t: int) -> int:
        """The x at which frame t begins."""
        return t * (self._subject.frames[0].shape[1] + GAP)

    def outline(self, box: Sequence[float], t: int, color: str) -> Rectangle:
        """Outline a box of frame t."""
        x0, y0, x1, y1 = box
        outline = Rectangle(
            (x0 + self.left_of(t), y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=color,
            linewidth=1,
            path_effects=HALO,
            clip_on=False,  # whole also at the border of the image
        )
        self.axes.add_patch(outline)
        return outline

    def finish(self, legend: Mapping[str, Artist]) -> Figure:
        """Draw the detection, the query and the legend, and return the figure.

        Args:
            legend: what is drawn in addition, by what it is.
        """
        x, y, t = self._subject.attention.query
        if detection := self._subject.detection:
            self.outline(detection.box, t, QUERY)
            x0, y0, x1, _ = detection.box
            # Above the box; in it, or from its right side, where the image would end before.
            left, right = self.axes.get_xlim()
            top = self.axes.get_ylim()[1]
            ha = "right" if x0 + x1 + 2 * self.left_of(t) > left + right else "left"
            va = "bottom" if (y0 - top) * self._inches > LINE else "top"
            self._label((x0 if ha == "left" else x1) + self.left_of(t), y0, detection.label, ha, va)
        (query,) = self.axes.plot(
            x + self.left_of(t), y, "o", ms=5, mfc=QUERY, mec="black", mew=0.8, zorder=9, ls=""
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
        """Write text at a point of the image, which is its ``ha`` and ``va`` end."""
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
