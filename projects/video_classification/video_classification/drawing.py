"""Draw predictions: a figure of a video's frames and scores, or the scores over a video.

Top classes are (name, score) pairs, best first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

Top = Sequence[tuple[str, float]]

# inches; a figure is as wide as two columns of a paper
WIDTH, BARS_WIDTH, GAP, MARGIN, TITLE, LINE = 6.75, 1.9, 0.04, 0.06, 0.14, 0.19
FONT_SIZE, DPI = 7, 300
MAX_NAME = 24  # characters; longer names of classes are cut off
BAR = "#3572b0"
PANEL = (0, 0, 0, 150)  # behind the text over a video


def draw_strip(
    frames: Sequence[np.ndarray], seconds: Sequence[float], top: Top, title: str
) -> Figure:
    """Draw frames side by side, and bars with the scores of the top classes next to them.

    Args:
        frames: (H, W, 3) in RGB, all of the same size.
        seconds: the time of each.
        top: the classes.
        title: names the video.
    """
    height, width = frames[0].shape[:2]
    room = WIDTH - BARS_WIDTH - 2 * MARGIN - GAP * len(frames)
    frame_width = room / len(frames)
    frame_height = frame_width * height / width
    row = max(frame_height, LINE * len(top))
    total = row + TITLE + 2 * MARGIN
    figure = Figure(figsize=(WIDTH, total), dpi=DPI)
    figure.text(
        0.5, 1 - MARGIN / total, title, ha="center", va="top", fontsize=FONT_SIZE, parse_math=False
    )
    for i, (frame, time) in enumerate(zip(frames, seconds)):
        left = MARGIN + i * (frame_width + GAP)
        bottom = MARGIN + (row - frame_height) / 2
        axes = figure.add_axes(
            (left / WIDTH, bottom / total, frame_width / WIDTH, frame_height / total)
        )
        axes.imshow(frame, aspect="auto")
        axes.set_axis_off()
        axes.annotate(
            f"{time:.1f} s",
            (0, 1),
            (1.5, -1.5),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            color="white",
            fontsize=FONT_SIZE,
            bbox={"boxstyle": "square,pad=0.15", "color": "black", "alpha": 0.5, "lw": 0},
        )
    left = WIDTH - MARGIN - BARS_WIDTH
    height = LINE * len(top)
    bottom = MARGIN + (row - height) / 2
    bars = figure.add_axes((left / WIDTH, bottom / total, BARS_WIDTH / WIDTH, height / total))
    bars.set(xlim=(0, 1), ylim=(len(top), 0))
    bars.set_axis_off()
    for i, (name, score) in enumerate(top):
        bars.barh(i + 0.8, score, height=0.3, color=BAR)
        bars.barh(i + 0.8, 1, height=0.3, color=BAR, alpha=0.15)
        bars.text(0, i + 0.58, _shorten(name), fontsize=FONT_SIZE, parse_math=False)
        bars.text(1, i + 0.58, f"{score:.1%}", ha="right", fontsize=FONT_SIZE)
    return figure


def overlay(
    frames: Iterable[tuple[float, np.ndarray]], windows: Sequence[tuple[float, float, Top]]
) -> Iterator[np.ndarray]:
    """Yield the frames of a video with the top classes of the window that each belongs to.

    Where windows overlap, it is the one whose center is nearest.

    Args:
        frames: seconds and image, (H, W, 3) in RGB, of each.
        windows: start and end in seconds and top classes of each.
    """
    centers = np.array([(start + end) / 2 for start, end, _ in windows])
    shown, panel = -1, None
    for seconds, image in frames:
        nearest = int(np.abs(centers - seconds).argmin())
        if nearest != shown or panel is None:
            shown, panel = nearest, _panel(image.shape[:2], *windows[nearest])
        picture = Image.alpha_composite(Image.fromarray(image).convert("RGBA"), panel)
        yield np.asarray(picture.convert("RGB"))


def _panel(size: Sequence[int], start: float, end: float, top: Top) -> Image.Image:
    """Draw the text and bars of a window on a transparent image of this height and width."""
    height, width = size
    line = max(round(height / 24), 11)
    panel = Image.new("RGBA", (width, height))
    draw, font = ImageDraw.Draw(panel), _font(round(0.8 * line))
    right = min(16 * line, width)
    upper = height - line * (len(top) + 1) - line // 2
    draw.rectangle((0, upper, right, height), PANEL)
    draw.text((line // 3, upper), f"{start:.1f}-{end:.1f} s", "white", font)
    for i, (name, score) in enumerate(top, start=1):
        y = upper + i * line
        draw.rectangle((0, y + 1, round(score * right), y + line - 2), BAR)
        draw.text((line // 3, y), _shorten(name), "white", font)
        draw.text((right - line // 3, y), f"{score:.0%}", "white", font, anchor="ra")
    return panel


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
