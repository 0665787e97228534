"""Pictures in which what an object is depends on a beacon far away: how one is made up and drawn.

A scene is a light grey ground with two or three darker grey objects and one coloured disc, the
beacon, in a corner. Nothing but the beacon has a colour, and the objects lie towards the other end
of the picture, `CLEARANCE` or more away.

Shape legend: H, W picture height and width; V vertices of a polygon.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH = 160, 576
CLEARANCE = 312
"""Columns between the box of any object and the box of the beacon, at least. A stock ResNet-50-FPN
detector that looks at an object is touched by nothing as far away as that."""

BEACON_COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 220)}
BEACON_RADIUS = 12
BEACON_MARGIN = 4
INSTANCE_SHAPES = ("disc", "triangle")
KEYPOINT_SHAPE = "bar"
HEAD_SIDE = {"red": "left", "green": "right"}
"""Which end of every bar is its head, by the colour of the beacon."""


@dataclass(frozen=True)
class SceneObject:
    """One grey object.

    Attributes:
        shape: a name out of `INSTANCE_SHAPES`, or `KEYPOINT_SHAPE`.
        polygon: (V, 2) outline as x, y; (0, 0) is the upper left corner of the first pixel.
        grey: brightness, 0 to 255.
        ends: (2, 2) left and right end of a bar as x, y; None for other shapes.
    """

    shape: str
    polygon: np.ndarray
    grey: int
    ends: np.ndarray | None = None

    @property
    def box(self) -> np.ndarray:
        """Smallest upright box as x0, y0, x1, y1."""
        return np.concatenate([self.polygon.min(axis=0), self.polygon.max(axis=0)])


@dataclass(frozen=True)
class Scene:
    """All that is needed to draw one picture.

    Attributes:
        beacon_colour: a key of `BEACON_COLOURS`.
        beacon_centre: x, y.
        objects: the grey objects; no two touch.
        grain: (H, W) brightness of the ground and its noise, 0 to 255.
    """

    beacon_colour: str
    beacon_centre: tuple[int, int]
    objects: tuple[SceneObject, ...]
    grain: np.ndarray

    @property
    def beacon_box(self) -> np.ndarray:
        """Box of the beacon as x0, y0, x1, y1."""
        x, y = self.beacon_centre
        # One pixel more than the radius: the rim is smooth.
        reach = BEACON_RADIUS + 1
        return np.array([x - reach, y - reach, x + reach, y + reach], dtype=float)

    def draw(self) -> np.ndarray:
        """Returns the picture, (H, W, 3) uint8 in RGB."""
        image = np.repeat(self.grain[:, :, None], 3, axis=2)
        for thing in self.objects:
            _fill(image, thing.polygon, (thing.grey,) * 3)
        _fill(
            image,
            _disc(BEACON_RADIUS) + self.beacon_centre,
            BEACON_COLOURS[self.beacon_colour],
        )
        return image


def sample_scene(rng: np.random.Generator, shapes: tuple[str, ...], colours: tuple[str, ...]):
    """Makes up a scene.

    Args:
        rng: where every choice comes from.
        shapes: what to choose each object's shape from.
        colours: what to choose the beacon's colour from.

    Returns:
        The `Scene`.
    """
    inset = BEACON_MARGIN + BEACON_RADIUS
    centre = int(rng.choice([inset, WIDTH - inset])), int(rng.choice([inset, HEIGHT - inset]))
    empty = Scene(str(rng.choice(colours)), centre, (), _sample_grain(rng))
    objects: list[SceneObject] = []
    wanted = int(rng.integers(2, 4))
    while len(objects) < wanted:
        thing = _sample_object(rng, str(rng.choice(shapes)))
        far_enough = gaps(thing.box, empty.beacon_box)[0] >= CLEARANCE
        if far_enough and all(max(gaps(thing.box, other.box)) >= 8 for other in objects):
            objects.append(thing)
    return Scene(empty.beacon_colour, centre, tuple(objects), empty.grain)


def gaps(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Returns the empty columns and rows between two boxes x0, y0, x1, y1; negative: overlap."""
    columns, rows = np.maximum(a[:2] - b[2:], b[:2] - a[2:]).tolist()
    return columns, rows


def _sample_grain(rng: np.random.Generator) -> np.ndarray:
    ground = rng.integers(165, 206)
    # Coarse and of few levels: the files stay small.
    noise = rng.integers(-2, 3, size=(HEIGHT // 2, WIDTH // 2))
    return (ground + noise).repeat(2, axis=0).repeat(2, axis=1).astype(np.uint8)


def _sample_object(rng: np.random.Generator, shape: str) -> SceneObject:
    if shape == KEYPOINT_SHAPE:
        # At most 50 degrees from level, so that left and right are never in doubt.
        angle, half_length = rng.uniform(-0.87, 0.87), rng.uniform(20, 26)
        along = half_length * np.array([np.cos(angle), np.sin(angle)])
        across = 7 * np.array([-np.sin(angle), np.cos(angle)])
        polygon = np.stack([-along - across, along - across, along + across, -along + across])
        ends = 0.8 * np.stack([-along, along])
    else:
        radius, ends = rng.uniform(13, 17), None
        if shape == "disc":
            polygon = _disc(radius)
        else:
            angles = rng.uniform(0, 2 * np.pi) + np.arange(3) * 2 * np.pi / 3
            # Larger, so that both shapes fill about the same area.
            polygon = 1.3 * radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # No object is cut by the rim of the picture.
    centre = rng.uniform(2 - polygon.min(axis=0), [WIDTH - 2, HEIGHT - 2] - polygon.max(axis=0))
    grey = int(rng.integers(60, 121))
    return SceneObject(shape, polygon + centre, grey, None if ends is None else ends + centre)


def _disc(radius: float) -> np.ndarray:
    angles = np.arange(32) * 2 * np.pi / 32
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _fill(image: np.ndarray, polygon: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Paints a convex polygon whose vertices go from the x axis towards the y axis."""
    left, top = np.floor(polygon.min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(polygon.max(axis=0)).astype(int) + 1
    patch = image[top:bottom, left:right]
    # A pixel's coordinates, as COCO has them, are those of its upper left corner.
    pixels = np.stack(np.meshgrid(np.arange(left, right), np.arange(top, bottom)), axis=-1) + 0.5
    edges = np.roll(polygon, -1, axis=0) - polygon
    inward = np.stack([-edges[:, 1], edges[:, 0]], axis=1)
    inward /= np.linalg.norm(inward, axis=1, keepdims=True)
    depth = ((pixels[:, :, None] - polygon) * inward).sum(axis=-1).min(axis=-1)
    coverage = np.clip(depth + 0.5, 0, 1)[:, :, None]
    patch[:] = np.round(patch * (1 - coverage) + np.array(colour) * coverage)
