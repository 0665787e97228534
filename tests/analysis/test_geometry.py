"""Cells against what detectron2 does with coordinates: RoIAlign, resizing."""

from __future__ import annotations

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.layers import ROIAlign
from numpy.testing import assert_allclose

from nl_detectron.analysis.geometry import AttentionMap, FeatureGrid


def centres(grid, rows, columns):
    boxes = grid.boxes(rows, columns)
    return (boxes[..., :2] + boxes[..., 2:]) / 2


@pytest.mark.parametrize("stride", [4, 16])
def test_roi_cells_are_where_roi_align_samples(stride):
    """On a map whose features are the coordinates of its cells, it returns those of the RoI's."""
    y, x = (stride * (torch.arange(size) + 0.5) for size in (11, 13))
    features = torch.stack([x.expand(11, 13), y[:, None].expand(11, 13)])[None]
    box = np.array([0.9, 1.3, 6.2, 7.1]) * stride
    rois = torch.tensor([[0.0, *box]])
    pooled = ROIAlign((7, 5), 1 / stride, 0, aligned=True)(features, rois)[0].permute(1, 2, 0)
    assert_allclose(centres(FeatureGrid.for_roi(box, (7, 5)), 7, 5), pooled, rtol=1e-5)


@pytest.mark.parametrize("image_size", [(427, 640), (640, 425), (160, 576)])
def test_stage_cells_undo_the_resizing(image_size):
    resize = T.ResizeShortestEdge([800, 800], 1333).get_transform(np.empty((*image_size, 3)))
    input_size = (resize.new_h, resize.new_w)
    grid = FeatureGrid.for_stage(16, image_size, input_size)
    cells = [(0, 0), (3, 17), (20, 9)]
    corners = np.array([[16.0 * column, 16.0 * row] for row, column in cells])
    expected = resize.inverse().apply_coords(corners)
    boxes = grid.boxes(40, 40)
    assert_allclose([boxes[cell][:2] for cell in cells], expected)
    for x, y in np.array([[1, 2], [400, 150], [211, 77]]) + 0.5:
        column, row = resize.apply_coords(np.array([[x, y]]))[0] // 16
        assert grid.cell(x, y) == (0, row, column)


def test_cell_and_box_are_inverse():
    grid = FeatureGrid(3.7, 5.3, left=-2.0, top=11.0)
    for x, y in np.random.default_rng(0).uniform((-2, 11), 100, (50, 2)):
        _, row, column = grid.cell(x, y)
        x0, y0, x1, y1 = grid.boxes(30, 30)[row, column]
        assert x0 <= x < x1
        assert y0 <= y < y1


def test_key_covers_its_window():
    grid, window = FeatureGrid(16.0, 15.0, left=3.0, top=5.0), (2, 3)
    cells, keys = grid.boxes(6, 9), grid.pooled(window).boxes(3, 3)
    for row, column in np.ndindex(3, 3):
        covered = cells[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        corners = [*covered[..., :2].min(axis=(0, 1)), *covered[..., 2:].max(axis=(0, 1))]
        assert_allclose(keys[row, column], corners)


def test_frames():
    grid = FeatureGrid(1.0, 1.0, frames=4)
    assert [grid.cell(0.5, 0.5, frame)[0] for frame in (0, 3, 4, 11)] == [0, 0, 1, 2]
    assert grid.pooled((2, 2)).frames == 4


class TestAttentionMap:
    @pytest.fixture
    def attention(self):
        """An image of 60 x 25 under 2 x 3 keys of 32 x 16: the last column is in the padding."""
        weights = np.array([[[0.1, 0.3, 0.9], [0.2, 0.4, 0.8]], [[0.5, 0.0, 0.9], [0, 0, 0]]])
        boxes = FeatureGrid(32.0, 16.0).boxes(2, 3).clip(0, [60, 25] * 2)
        return AttentionMap(weights, boxes, (1.0, 2.0, 0))

    def test_padding_is_not_in_the_image(self, attention):
        assert attention.in_image.tolist() == [[True, True, False]] * 2

    def test_strongest(self, attention):
        """Their part in the image: columns end at 32 and 60, rows at 16 and 25."""
        assert attention.topk(3) == [
            ((0, 0, 32, 16), 1, 0.5),
            ((32, 16, 60, 25), 0, 0.4),
            ((32, 0, 60, 16), 0, 0.3),
        ]
        assert attention.topk(2)[1].center == (46, 20.5)
        assert len(attention.topk(20)) == 8

    def test_strongest_regardless_of_signs(self, attention):
        attention.weights[1, 0, 1] = -0.6
        assert [key.weight for key in attention.topk(3)] == [-0.6, 0.5, 0.4]
