"""Pictures: colours and arrows are where the weights are, to the pixel."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from nl_detectron.cells import AttentionMap, CellGrid
from nl_detectron.pictures import GAP, draw_arrows, draw_heat_map, save_grid

HEIGHT, WIDTH = 40, 60


def attention(weights, query=(5.0, 7.0, 0), grid=None):
    """Keys of 16 x 12; the last column is all padding, the last row half."""
    weights = np.asarray(weights, dtype=float)
    boxes = (grid or CellGrid(16.0, 12.0)).boxes(*weights.shape[1:])
    return AttentionMap(weights, boxes.clip(0, [WIDTH, HEIGHT] * 2), query)


def one_key(t, row, column, frames=1):
    weights = np.zeros((frames, 4, 5))
    weights[t, row, column] = 0.8
    return weights


def black(frames=1):
    return [np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)] * frames


def pixels(figure, tmp_path):
    figure.savefig(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        return np.asarray(image.convert("RGB"))


def arrows(figure):
    """Start and end of each arrow."""
    return [(text.xyann, text.xy) for text in figure.axes[0].texts]


def bright_box(figure, tmp_path, pixel):
    """The box of what is bright but not white, with ``pixel`` pixels to one of the image."""
    picture = pixels(figure, tmp_path)
    y, x = np.argwhere((picture[..., 1] > 150) & (picture[..., 2] < 200)).T / pixel
    return [x.min(), y.min(), x.max(), y.max()]


class TestHeatMap:
    @pytest.mark.parametrize(
        ("row", "column", "box"),
        [(0, 0, (0, 0, 16, 12)), (1, 2, (32, 12, 48, 24)), (3, 3, (48, 36, 60, 40))],
    )
    def test_bright_is_the_key(self, row, column, box, tmp_path):
        figure = draw_heat_map(black(), attention(one_key(0, row, column), query=(90.0, 90.0, 0)))
        assert_allclose(bright_box(figure, tmp_path, 1200 / WIDTH), box, atol=0.1)

    def test_weights_in_the_padding_do_not_dim_the_image(self, tmp_path):
        weights = one_key(0, 1, 2)
        expected = pixels(draw_heat_map(black(), attention(weights)), tmp_path)
        weights[0, 1, 4] = 70
        assert np.array_equal(
            pixels(draw_heat_map(black(), attention(weights)), tmp_path), expected
        )

    def test_frames_side_by_side(self, tmp_path):
        weights = one_key(2, 1, 2, frames=3)
        figure = draw_heat_map(black(3), attention(weights, query=(90.0, 90.0, 2)))
        left = 2 * (WIDTH + GAP)
        box = (left + 32, 12, left + 48, 24)
        assert_allclose(bright_box(figure, tmp_path, 600 / WIDTH), box, atol=0.2)

    def test_view_shows_a_part_with_the_outline_of_the_map(self, tmp_path):
        grid = CellGrid(2.0, 2.0, left=20.0, top=10.0)
        figure = draw_heat_map(
            black(), attention(one_key(0, 0, 0), grid=grid), view=(18.0, 8.0, 33.0, 20.0)
        )
        assert figure.axes[0].get_xlim() == (18, 33)
        assert figure.axes[0].get_ylim() == (20, 8)
        outline = [patch.get_bbox().bounds for patch in figure.axes[0].patches]
        assert outline == [(20, 10, 10, 8)]


class TestArrows:
    def test_from_the_query_to_the_strongest(self):
        weights = np.zeros((1, 4, 5))
        weights[0, 1, 2], weights[0, 3, 3], weights[0, 0, 4] = 0.5, 0.3, 0.9
        weights[0, 2, 0] = 0.004  # less than a hundredth
        assert arrows(draw_arrows(black(), attention(weights))) == [
            ((5.0, 7.0), (54.0, 38.0)),  # the part in the image: 48 to 60, 36 to 40
            ((5.0, 7.0), (40.0, 18.0)),  # the strongest on top
        ]

    def test_number(self):
        weights = np.linspace(0.5, 1, 20).reshape(1, 4, 5)
        assert len(arrows(draw_arrows(black(), attention(weights)))) == 16
        assert len(arrows(draw_arrows(black(), attention(weights), count=3))) == 3

    @pytest.mark.parametrize("weight", [0.0, -1.0])
    def test_no_weight_no_arrow(self, weight):
        assert arrows(draw_arrows(black(), attention(np.full((1, 4, 5), weight)))) == []

    def test_across_frames(self):
        figure = draw_arrows(black(3), attention(one_key(2, 1, 2, frames=3), query=(5.0, 7.0, 1)))
        shift = WIDTH + GAP
        assert arrows(figure) == [((5.0 + shift, 7.0), (40.0 + 2 * shift, 18.0))]


@pytest.mark.parametrize("draw", [draw_heat_map, draw_arrows])
def test_wrong_number_of_frames(draw):
    with pytest.raises(ValueError, match="2 frames, but the map has 1"):
        draw(black(2), attention(one_key(0, 0, 0)))


def test_grid(tmp_path):
    colours = ["red", "lime", "blue"]
    files = [tmp_path / f"{colour}.png" for colour in colours]
    for file, size in zip(files, [(30, 20), (60, 40), (30, 60)]):
        Image.new("RGB", size, file.stem).save(file)
    save_grid(tmp_path / "grid.png", files, columns=2, width=30)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (30 + GAP + 30, 20 + GAP + 20)
        assert grid.getpixel((0, 0)) == grid.getpixel((29, 19)) == (255, 0, 0)
        assert grid.getpixel((30 + GAP, 0)) == (0, 255, 0)
        assert grid.getpixel((15, 20 + GAP)) == (0, 0, 255)
        assert grid.getpixel((0, 20 + GAP)) == (255, 255, 255)  # it is narrower than its place
