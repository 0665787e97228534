"""Generate clips whose class can only be told by who sees their order, or two places at once.

There are two kinds of tasks:

* ``order``: a square drifts left or right. Every frame alone tells nothing, and the clip played
  backwards is of the other class.
* the others: two squares, each red or green and each there for `VISIBLE` frames, are of the same
  color or not. They are side by side (``near``), far apart in the same frames (``space``), at one
  place but at different times (``time``), or both far apart and at different times (``spacetime``).

Clips come in groups that differ in nothing but what decides the class: two clips of ``order``, one
of them the other backwards; else four, one for each pair of colors. So whatever ignores the order
of frames is right in exactly half of the former, and what adds up contributions of single squares
in one to three quarters of the latter: its four margins, signed so that positive is right, add up
to zero. In both cases the cross-entropy is at least ln 2, as it is a convex function of the margin.

Shape legend: T frames, H W height and width.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

CLASSES = {"order": ("left", "right")} | dict.fromkeys(
    ("near", "space", "time", "spacetime"), ("different", "same")
)
"""The classes of each task, in the order of their labels."""
SPLITS = ("train", "test")
FRAMES, HEIGHT, WIDTH = 14, 32, 48
SQUARE, VISIBLE = 8, 2
GAP = {"columns": 21, "frames": 9}
"""At least this lies between two squares that are far apart: as much as a network without
non-local blocks can see. See `networks`."""
_COLORS = ((200, 60, 60), (60, 160, 60))  # red, green
_GROUND, _NOISE = 128, 20


class Place(NamedTuple):
    """Where a square is: its first frame, row and column."""

    frame: int
    row: int
    column: int


def make_clip(task: str, split: str, seed: int, index: int) -> tuple[np.ndarray, int]:
    """Generate a clip; it depends only on the four arguments.

    Args:
        task: a key of `CLASSES`.
        split: one of `SPLITS`.
        seed: seed of the data set.
        index: number of the clip; clips of a group have consecutive numbers.

    Returns:
        Its frames, (T, H, W, 3) uint8 in RGB, and its label.
    """
    size = group_size(task)
    key = [seed, list(CLASSES).index(task), SPLITS.index(split), index // size]
    rng = np.random.default_rng(key)
    noise = _NOISE * rng.standard_normal((FRAMES, HEIGHT, WIDTH, 1))
    clip = np.clip(np.repeat(_GROUND + noise, 3, axis=3), 0, 255).astype(np.uint8)
    if task == "order":
        _draw_drift(clip, rng)
        backwards = index % size
        return (clip[::-1] if backwards else clip), int(not backwards)
    colors = list(product((0, 1), repeat=2))[index % size]
    for (frame, row, column), color in zip(sample_places(task, rng), colors):
        clip[frame : frame + VISIBLE, row : row + SQUARE, column : column + SQUARE] = _COLORS[color]
    return clip, int(colors[0] == colors[1])


def group_size(task: str) -> int:
    """Number of clips that differ in nothing but what decides the class."""
    return 2 if task == "order" else 4


def sample_places(task: str, rng: np.random.Generator) -> tuple[Place, Place]:
    """Sample the places of two squares; either may be the left one, or the earlier one.

    Rows and columns are even.
    """
    last, bottom, right = FRAMES - VISIBLE, (HEIGHT - SQUARE) // 2, (WIDTH - SQUARE) // 2
    frames = np.repeat(rng.integers(last + 1), 2)
    rows = np.repeat(rng.integers(bottom + 1), 2)
    columns = np.repeat(rng.integers(right + 1), 2)
    if task in ("time", "spacetime"):
        frames = _apart(rng, last, VISIBLE + GAP["frames"])
    if task in ("space", "spacetime"):
        rows = rng.integers(bottom + 1, size=2)
        columns = _apart(rng, right, (SQUARE + GAP["columns"] + 1) // 2)
    elif task == "time":
        rows = np.clip(rows + [0, rng.integers(-1, 2)], 0, bottom)
        columns = np.clip(columns + [0, rng.integers(-1, 2)], 0, right)
    else:
        side_by_side = [0, SQUARE // 2]
        columns = rng.permutation(rng.integers(right - SQUARE // 2 + 1) + side_by_side)
    first, second = zip(frames.tolist(), (2 * rows).tolist(), (2 * columns).tolist())
    return Place(*first), Place(*second)


def _apart(rng: np.random.Generator, last: int, distance: int) -> np.ndarray:
    """Sample two numbers from 0 to ``last`` that differ by ``distance`` or more, in any order."""
    low = rng.integers(last - distance + 1)
    return rng.permutation([low, rng.integers(low + distance, last + 1)])


def _draw_drift(clip: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a square that drifts to the right, and comes in again on the left."""
    row, column = rng.integers(HEIGHT - SQUARE + 1), rng.integers(WIDTH)
    speed, color = rng.integers(2, 4), _COLORS[rng.integers(2)]
    for frame, image in enumerate(clip):
        columns = (column + speed * frame + np.arange(SQUARE)) % WIDTH
        image[row : row + SQUARE, columns] = color
