"""A picture of which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

MAX_NAMES, MAX_NUMBERS = 40, 12  # classes whose names, and whose shares, fit into the picture
FONT_SIZE = 7


def draw_confusion(path: Path, matrix: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix; each row is divided by its sum.

    Args:
        path: PNG file to write.
        matrix: videos by class (rows) and prediction (columns), (K, K).
        classes: names of the K classes; with many of them, only their numbers are written.
        title: heading.
    """
    videos = matrix.sum(1, keepdims=True)
    shares = np.where(videos, 100 * matrix / np.maximum(videos, 1), np.nan)  # no videos: blank
    named = len(classes) <= MAX_NAMES
    side = 3.4 if len(classes) <= MAX_NUMBERS else 7.0  # inches: one or two columns of a paper
    figure = Figure(figsize=(side, 0.85 * side), layout="constrained")
    axes = figure.subplots()
    # On a linear scale, the many small shares of a large matrix would be invisible.
    norm = PowerNorm(0.5, vmin=0, vmax=100)
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="0.85")
    image = axes.imshow(shares, cmap=colors, norm=norm, interpolation="nearest")
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    number = "" if named else " (number)"
    axes.set_xlabel(f"predicted class{number}", fontsize=FONT_SIZE)
    note = "" if videos.all() else "; gray: no videos"
    axes.set_ylabel(f"class{number}{note}", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE, length=2)
    if named:
        places = range(len(classes))
        axes.set_xticks(places, classes, rotation=90)
        axes.set_yticks(places, classes)
    if len(classes) <= MAX_NUMBERS:
        for row, column in np.argwhere(matrix):
            share = shares[row, column]
            color = "white" if share > 35 else "black"
            axes.text(
                column, row, f"{share:.0f}", color=color, ha="center", va="center", size=FONT_SIZE
            )
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 5, 20, 50, 100])
    bar.set_label("videos of the class (%)", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE, length=2)
    figure.savefig(path, dpi=300)
