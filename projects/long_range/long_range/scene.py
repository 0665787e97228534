"""Generate and draw images in which the class of an object depends on a distant beacon.

A scene has a light gray background, two or three darker gray objects and the beacon, a colored disc
in a corner. Only the beacon has a color. The objects are at least `CLEARANCE` columns away from it.

Shape legend: H, W image height and width; V vertices of a polygon.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH = 160, 576
CLEARANCE = 312
"""Minimum number of columns between the boxes of an object and of the beacon. The receptive field
of a stock ResNet-50-FPN detector around an object does not reach that far."""

BEACON_COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 220)}
BEACON_RADIUS = 12
BEACON_MARGIN = 4
INSTANCE_SHAPES = ("disc", "triangle")
KEYPOINT_SHAPE = "bar"
HEAD_SIDE = {"red": "left", "green": "right"}
"""The end of the bars that is the head, for each color of the beacon."""


@dataclass(frozen=True)
class SceneObject:
    """One gray object.

    Attributes:
        shape: one of `INSTANCE_SHAPES`, or `KEYPOINT_SHAPE`.
        polygon: (V, 2) outline as x, y; (0, 0) is the upper left corner of the first pixel.
        gray: brightness, 0 to 255.
        ends: (2, 2) left and right end of a bar as x, y; None for other shapes.
    """

    shape: str
    polygon: np.ndarray
    gray: int
    ends: np.ndarray | None = None

    @property
    def box(self) -> np.ndarray:
        """Axis-aligned bounding box as x0, y0, x1, y1."""
        return np.concatenate([self.polygon.min(axis=0), self.polygon.max(axis=0)])


@dataclass(frozen=True)
class Scene:
    """Everything needed to draw one image.

    Attributes:
        beacon_color: a key of `BEACON_COLORS`.
        beacon_center: x, y.
        objects: the gray objects; no two touch.
        grain: (H, W) brightness of the background with noise, 0 to 255.
    """

    beacon_color: str
    beacon_center: tuple[int, int]
    objects: tuple[SceneObject, ...]
    grain: np.ndarray

    @property
    def beacon_box(self) -> np.ndarray:
        """Bounding box of the beacon as x0, y0, x1, y1."""
        x, y = self.beacon_center
        # One pixel more than the radius, for the anti-aliased rim.
        reach = BEACON_RADIUS + 1
        return np.array([x - reach, y - reach, x + reach, y + reach], dtype=float)

    def draw(self) -> np.ndarray:
        """Draw the image, (H, W, 3) uint8 in RGB."""
        image = np.repeat(self.grain[:, :, None], 3, axis=2)
        for obj in self.objects:
            _fill(image, obj.polygon, (obj.gray,) * 3)
        _fill(
            image,
            _disc(BEACON_RADIUS) + self.beacon_center,
            BEACON_COLORS[self.beacon_color],
        )
        return image


def sample_scene(rng: np.random.Generator, shapes: tuple[str, ...], colors: tuple[str, ...]):
    """Sample a scene.

    Args:
        rng: random number generator.
        shapes: shapes to choose from, for each object.
        colors: colors to choose from, for the beacon.

    Returns:
        The `Scene`.
    """
    inset = BEACON_MARGIN + BEACON_RADIUS
    center = int(rng.choice([inset, WIDTH - inset])), int(rng.choice([inset, HEIGHT - inset]))
    empty = Scene(str(rng.choice(colors)), center, (), _sample_grain(rng))
    objects: list[SceneObject] = []
    wanted = int(rng.integers(2, 4))
    while len(objects) < wanted:
        obj = _sample_object(rng, str(rng.choice(shapes)))
        far_enough = gaps(obj.box, empty.beacon_box)[0] >= CLEARANCE
        if far_enough and all(max(gaps(obj.box, other.box)) >= 8 for other in objects):
            objects.append(obj)
    return Scene(empty.beacon_color, center, tuple(objects), empty.grain)


def gaps(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the columns and rows between two boxes x0, y0, x1, y1; negative if they overlap."""
    columns, rows = np.maximum(a[:2] - b[2:], b[:2] - a[2:]).tolist()
    return columns, rows


def _sample_grain(rng: np.random.Generator) -> np.ndarray:
    ground = rng.integers(165, 206)
    # Coarse and with few levels, to keep the files small.
    noise = rng.integers(-2, 3, size=(HEIGHT // 2, WIDTH // 2))
    return (ground + noise).repeat(2, axis=0).repeat(2, axis=1).astype(np.uint8)


def _sample_object(rng: np.random.Generator, shape: str) -> SceneObject:
    if shape == KEYPOINT_SHAPE:
        # At most 50 degrees from horizontal, so that left and right are unambiguous.
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
            # Larger, to give both shapes about the same area.
            polygon = 1.3 * radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # Keep the whole object inside the image.
    center = rng.uniform(2 - polygon.min(axis=0), [WIDTH - 2, HEIGHT - 2] - polygon.max(axis=0))
    gray = int(rng.integers(60, 121))
    return SceneObject(shape, polygon + center, gray, None if ends is None else ends + center)


def _disc(radius: float) -> np.ndarray:
    angles = np.arange(32) * 2 * np.pi / 32
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _fill(image: np.ndarray, polygon: np.ndarray, color: tuple[int, int, int]) -> None:
    """Fill a convex polygon whose vertices are ordered from the x axis to the y axis."""
    left, top = np.floor(polygon.min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(polygon.max(axis=0)).astype(int) + 1
    patch = image[top:bottom, left:right]
    # In COCO, the coordinates of a pixel are those of its upper left corner.
    pixels = np.stack(np.meshgrid(np.arange(left, right), np.arange(top, bottom)), axis=-1) + 0.5
    edges = np.roll(polygon, -1, axis=0) - polygon
    inward = np.stack([-edges[:, 1], edges[:, 0]], axis=1)
    inward /= np.linalg.norm(inward, axis=1, keepdims=True)
    depth = ((pixels[:, :, None] - polygon) * inward).sum(axis=-1).min(axis=-1)
    coverage = np.clip(depth + 0.5, 0, 1)[:, :, None]
    patch[:] = np.round(patch * (1 - coverage) + np.array(color) * coverage)
