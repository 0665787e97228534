"""A logarithmic color scale for attention weights, and its color bar.

One key often has a thousand times the weight of another. On a linear scale, only that key would be
visible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, SymLogNorm

from nl_detectron.analysis.geometry import AttentionMap

MAX_DECADES = 3  # range of a scale
MAX_ALPHA = 0.65  # of the largest weight; a weight of 0 is fully transparent
LINEAR_FRACTION = 0.01  # a signed scale is linear below this fraction of the largest weight


@dataclass(frozen=True)
class ColorScale:
    """Maps attention weights to [0, 1], and those values to colors.

    Attributes:
        norm: maps weights to [0, 1].
        cmap: maps [0, 1] to RGBA.
        label: label of the color bar.
        ticks: weights marked on the color bar.
        extend_min: whether some weights are below the lower end; they are drawn in its color.
    """

    norm: Normalize
    cmap: Colormap
    label: str
    ticks: list[float]
    extend_min: bool = False

    @classmethod
    def from_attention(cls, attention: AttentionMap, *, opaque: bool = False) -> ColorScale:
        """Create the scale for the keys in the image.

        It spans the range of the weights, but at least one decade and at most three. Flat maps thus
        look flat, in the middle of the color range. If there are negative weights, as with dot
        product, the scale is symmetric about 0, and linear near 0.

        Args:
            attention: the map.
            opaque: use opaque colors throughout; otherwise smaller weights are more transparent.
        """
        weights = attention.weights[:, attention.in_image]
        least, largest = float(weights.min()), float(np.abs(weights).max())
        cmap = _colormap(least < 0, opaque)
        if largest == 0:
            return cls(Normalize(0, 1, clip=True), cmap, "attention weight", [0, 1])
        if least < 0:
            ticks = [largest * part for part in (-1, -0.1, 0, 0.1, 1)]
            label = "attention weight (logarithmic on both sides of 0)"
            signed = SymLogNorm(largest * LINEAR_FRACTION, vmin=-largest, vmax=largest, clip=True)
            return cls(signed, cmap, label, ticks)
        low = max(least, largest / 10**MAX_DECADES)
        margin = max(math.sqrt(10 * low / largest), 1.0)  # pads to one decade, half at each end
        low, high = low / margin, largest * margin
        norm = LogNorm(low, high, clip=True)
        label = "attention weight (logarithmic scale)"
        return cls(norm, cmap, label, _log_ticks(low, high), least < low)

    def normalize(self, weights: np.ndarray) -> np.ndarray:
        """Map weights to [0, 1]."""
        return np.ma.filled(self.norm(weights), 0.0)  # log(0) is masked

    def draw_bar(self, axes: Axes, font_size: float) -> None:
        """Draw the color bar into the axes."""
        # On medium gray, transparent colors look as they do over the image.
        axes.set_facecolor("0.5")
        bar = axes.figure.colorbar(
            ScalarMappable(self.norm, self.cmap),
            cax=axes,
            orientation="horizontal",
            extend="min" if self.extend_min else "neither",
            ticks=self.ticks,
        )
        bar.minorticks_off()
        bar.set_ticklabels([f"{tick:.2g}" for tick in self.ticks])
        bar.set_label(self.label, fontsize=font_size, labelpad=1)
        axes.tick_params(labelsize=font_size, length=2, pad=1.5)


def _colormap(signed: bool, opaque: bool) -> ListedColormap:
    """Return a perceptually uniform color map, safe for common color vision deficiencies."""
    places = np.linspace(0, 1, 257)
    if signed:  # orange is negative, purple positive
        colors, sizes = matplotlib.colormaps["PuOr"](places), np.abs(2 * places - 1)
    else:
        colors, sizes = matplotlib.colormaps["inferno"](0.25 + 0.75 * places), places
    if not opaque:
        colors[:, 3] = MAX_ALPHA * (1 - (1 - sizes) ** 2)
    return ListedColormap(colors)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten, with their multiples by 2 and 5 if these are at most six ticks."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 6:
            break
    return ticks
