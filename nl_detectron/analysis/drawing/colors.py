"""The colours of attention weights: a logarithmic scale, and its colour bar.

Attention often gives one key a thousand times the weight of another: on a linear scale that key
would be all there is to see.
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

MOST_DECADES = 3  # that a scale spans
OPACITY = 0.65  # of the largest weight; what has none is seen through
SIGNED_LINEAR = 0.01  # of the largest weight: where a scale of both signs becomes linear


@dataclass(frozen=True)
class WeightScale:
    """Weights as places on a scale from 0 to 1, and those as colours.

    Attributes:
        norm: weight to place.
        cmap: place to RGBA.
        label: what the colour bar is called.
        ticks: weights that are marked on it.
        below: whether there are weights below its lower end, which are drawn as if they were there.
    """

    norm: Normalize
    cmap: Colormap
    label: str
    ticks: list[float]
    below: bool = False

    @classmethod
    def of(cls, attention: AttentionMap, *, opaque: bool = False) -> WeightScale:
        """The scale of the keys in the image.

        It goes from the smallest weight to the largest, but spans three decades at most, and one at
        least: a flat map looks flat, and has the colours of the middle. Dot product's weights may
        be negative: then the scale is symmetric about 0, and linear near it.

        Args:
            attention: the map.
            opaque: whether small weights have opaque colours, too; otherwise the smaller a weight,
                the more of the image is seen through its colour.
        """
        weights = attention.weights[:, attention.in_image]
        least, largest = float(weights.min()), float(np.abs(weights).max())
        cmap = _cmap(least < 0, opaque)
        if largest == 0:
            return cls(Normalize(0, 1, clip=True), cmap, "attention weight", [0, 1])
        if least < 0:
            ticks = [largest * part for part in (-1, -0.1, 0, 0.1, 1)]
            label = "attention weight (logarithmic on both sides of 0)"
            signed = SymLogNorm(largest * SIGNED_LINEAR, vmin=-largest, vmax=largest, clip=True)
            return cls(signed, cmap, label, ticks)
        low = max(least, largest / 10**MOST_DECADES)
        margin = max(math.sqrt(10 * low / largest), 1.0)  # what they lack of a decade, at each end
        low, high = low / margin, largest * margin
        norm = LogNorm(low, high, clip=True)
        label = "attention weight (logarithmic scale)"
        return cls(norm, cmap, label, _nice_between(low, high), least < low)

    def level(self, weights: np.ndarray) -> np.ndarray:
        """Places of weights on the scale."""
        return np.ma.filled(self.norm(weights), 0.0)  # the logarithm of 0 is masked

    def draw_bar(self, axes: Axes, font_size: float) -> None:
        """Fill axes with the colour bar."""
        # Over medium grey, colours that are seen through look as they do over the image.
        axes.set_facecolor("0.5")
        bar = axes.figure.colorbar(
            ScalarMappable(self.norm, self.cmap),
            cax=axes,
            orientation="horizontal",
            extend="min" if self.below else "neither",
            ticks=self.ticks,
        )
        bar.minorticks_off()
        bar.set_ticklabels([f"{tick:.2g}" for tick in self.ticks])
        bar.set_label(self.label, fontsize=font_size, labelpad=1)
        axes.tick_params(labelsize=font_size, length=2, pad=1.5)


def _cmap(signed: bool, opaque: bool) -> ListedColormap:
    """A colour map that is perceptually uniform and that no common colour blindness confuses."""
    places = np.linspace(0, 1, 257)
    if signed:  # orange is negative, purple positive
        colours, sizes = matplotlib.colormaps["PuOr"](places), np.abs(2 * places - 1)
    else:
        colours, sizes = matplotlib.colormaps["inferno"](0.25 + 0.75 * places), places
    if not opaque:
        colours[:, 3] = OPACITY * (1 - (1 - sizes) ** 2)
    return ListedColormap(colours)


def _nice_between(low: float, high: float) -> list[float]:
    """Powers of ten, and their double and fivefold where those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 6:
            break
    return ticks
