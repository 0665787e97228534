"""Recorded is the block's own attention; planted pairs are found in the original image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.testing import assert_close

from nl_detectron import NonLocalBlock, ops
from nl_detectron.analysis.attention import attention_map, record_attention
from nl_detectron.analysis.geometry import FeatureGrid
from nl_detectron.backbone import block_stride
from nl_detectron.non_local import find_blocks
from tests import oracles, planted

C = 6
MAPS = {1: (7,), 2: (5, 7), 3: (3, 5, 7)}


RES3, RES4 = "backbone.bottom_up.res3", "backbone.bottom_up.res4"
HEAD = [f"roi_heads.keypoint_head.non_local{i}" for i in (2, 4, 6, 8)]
RES = [f"{RES3}.non_local1", f"{RES3}.non_local3", f"{RES4}.non_local4"]


@pytest.fixture
def detector(nl_cfg):
    nl_cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES3 = (1, 3)
    return build_model(nl_cfg).eval()


def make(**options):
    block = NonLocalBlock(C, **options)
    nn.init.normal_(block.conv_out.weight)
    return block


def record(block, x):
    with record_attention(nn.Sequential(block)) as recordings:
        block(x)
    return recordings["0"]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ((), RES + HEAD),
        (("res4.non_local4",), RES[2:]),
        (("res3.*", "keypoint_head.non_local?"), RES[:2] + HEAD),
        ((HEAD[0],), HEAD[:1]),
    ],
)
def test_find_blocks(patterns, names, detector):
    assert sorted(find_blocks(detector, *patterns)) == names
    with pytest.raises(ValueError, match="no non-local block 'local4'; it has backbone.*res3"):
        find_blocks(detector, *patterns, "local4")  # a part of a name is not its end


def test_find_blocks_where_there_are_none():
    assert find_blocks(nn.Conv2d(1, 1, 1)) == {}
    with pytest.raises(ValueError, match="no non-local blocks; a config .* MODEL.BACKBONE.NAME"):
        find_blocks(nn.Conv2d(1, 1, 1), "*")


class TestRecordAttention:
    def test_changes_nothing(self, detector):
        for block in find_blocks(detector).values():
            nn.init.normal_(block.conv_out.weight, std=1e-3)
        inputs = [{"image": torch.rand(3, 64, 96)}]
        expected = detector(inputs)[0]["instances"]
        with record_attention(detector) as recordings:
            found = detector(inputs)[0]["instances"]
        assert len(found) > 0
        for name in ("scores", "pred_masks", "pred_keypoints"):
            assert torch.equal(found.get(name), expected.get(name)), name
        assert [len(recording.inputs) for recording in recordings.values()] == [1] * 7

    def test_input_that_is_overwritten_later(self):
        model = nn.Sequential(make(pairwise="gaussian"), nn.Hardtanh(inplace=True))
        x = torch.randn(1, C, 5, 7)
        expected = torch.softmax(x[0, :, 1, 3] @ x[0].flatten(1), dim=0)
        with record_attention(model) as recordings:
            model(x)
            x.zero_()
        assert_close(recordings["0"].attention((1, 3)).flatten(), expected)

    def test_gradients_and_training(self):
        block, x = make(), torch.randn(2, C, 5, 7, requires_grad=True)
        (expected,) = torch.autograd.grad(block.train()(x).square().sum(), x)
        with record_attention(nn.Sequential(block)) as recordings:
            (gradient,) = torch.autograd.grad(block(x).square().sum(), x)
        assert torch.equal(gradient, expected)
        assert not recordings["0"].last_input.requires_grad
        assert not recordings["0"].attention((0, 0)).requires_grad

    def test_block_that_did_not_run(self):
        with record_attention(nn.Sequential(make())) as recordings:
            pass
        with pytest.raises(RuntimeError, match="0 was not called while recording"):
            recordings["0"].attention((0, 0))


CASES = [
    (dim, axes, subsample)
    for dim in MAPS
    for axes in (("spacetime", "space", "time") if dim == 3 else ("spacetime",))
    for subsample in ((1, 2) if axes != "time" else (1,))
]


@pytest.mark.parametrize(("dim", "axes", "subsample"), CASES)
@pytest.mark.parametrize("pairwise", ops.PAIRWISE)
def test_attention_is_the_rows_of_the_matrix(pairwise, dim, axes, subsample):
    """What the maps of all queries weigh out of g is Eq. 1, and with it the loops' result."""
    block = make(pairwise=pairwise, dim=dim, axes=axes, subsample=subsample).double()
    x = torch.randn(2, C, *MAPS[dim], dtype=torch.float64)
    recording = record(block, x)
    pool = getattr(F, f"max_pool{dim}d")
    g = block.g(pool(x, [1, subsample, subsample] if dim == 3 else subsample))
    y = x.new_empty(2, block.inner_channels, *MAPS[dim])
    for n, *query in np.ndindex(2, *MAPS[dim]):
        y[(n, slice(None), *query)] = (recording.attention(query, n) * g[n]).flatten(1).sum(dim=1)
    expected = oracles.block(x, block.state_dict(), pairwise, subsample=subsample, axes=axes)
    assert_close(x + block.conv_out(y), expected)


def test_attention_within_a_group_of_frames():
    block, x = make(dim=3, group_frames=2, subsample=2), torch.randn(2, C, 6, 3, 5)
    second = make(dim=3, subsample=2)
    second.load_state_dict(block.state_dict())
    got = record(block, x).attention((3, 2, 1), sample=1)
    assert_close(got[2:4], record(second, x[:, :, 2:4]).attention((1, 2, 1), sample=1))
    assert got[[0, 1, 4, 5]].count_nonzero() == 0


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (((5, 0),), r"0: query \(5, 0\) is outside the map of size \(5, 7\)"),
        (((0, -1),), r"query \(0, -1\) is outside"),
        (((0,),), r"query \(0,\) is outside"),
        (((0, 0), 2), "sample must be from 0 to 1, got 2"),
    ],
)
def test_wrong_query(query, message):
    with pytest.raises(ValueError, match=message):
        record(make(), torch.rand(2, C, 5, 7)).attention(*query)


def test_strides_are_the_features(detector):
    with record_attention(detector) as recordings:
        detector.backbone(torch.rand(1, 3, 64, 96))
    for name, stride in {RES[0]: 8, RES[2]: 16}.items():
        assert block_stride(detector.backbone, recordings[name].block) == stride
        assert recordings[name].inputs[0].shape[2:] == (64 // stride, 96 // stride)
    with pytest.raises(ValueError, match="not in this backbone"):
        block_stride(detector.backbone, recordings[HEAD[0]].block)


class TestPlantedPair:
    """Red looks at blue: resized by 1.49, padded on two sides, stride 16, keys of 2 x 2 cells."""

    @pytest.fixture
    def predictor(self, nl_cfg):
        return planted.planted_predictor(planted.planted_cfg(nl_cfg))

    @pytest.mark.parametrize(
        ("red", "blue"), [((0, 0), (7, 3)), ((6, 1), (0, 4)), ((3, 3), (4, 2))]
    )
    def test_in_the_backbone(self, predictor, red, blue):
        """Rectangles inside one key each; the red one where its third of four cells looks."""
        red_box = planted.rectangle(32 * red[0] + 10, 32 * red[1] + 10, 20, 20)
        blue_box = planted.rectangle(32 * blue[0] + 6, 32 * blue[1] + 6, 20, 20)
        with record_attention(predictor.model, "res4.*") as recordings:
            predictor(planted.picture(red_box, blue_box))
        (recording,) = recordings.values()
        assert recording.last_input.shape[2:] == tuple(s // 16 for s in planted.PADDED_SIZE)
        grid = FeatureGrid.for_stage(16, planted.SIZE, planted.INPUT_SIZE)
        attention = attention_map(recording, grid, planted.SIZE, *centre(red_box))
        assert_points_at(attention, blue_box)

    def test_in_a_roi_of_the_keypoint_head(self, predictor):
        red_box, blue_box = planted.rectangle(54, 38, 12, 12), planted.rectangle(121, 89, 12, 12)
        inputs = predictor.network_input(planted.picture(red_box, blue_box))
        assert inputs["image"].shape[1:] == planted.INPUT_SIZE
        rois = torch.tensor([[0.0, 0, 70, 70], [40, 20, 138, 104]])
        given = Instances(planted.INPUT_SIZE)
        given.pred_boxes, given.pred_classes = Boxes(rois), torch.zeros(2, dtype=torch.int64)
        model = predictor.model
        with record_attention(model, "keypoint_head.*") as recordings, torch.no_grad():
            model.inference([inputs], [given], do_postprocess=False)
        (recording,) = recordings.values()
        scale = torch.tensor([s / i for s, i in zip(planted.SIZE, planted.INPUT_SIZE)]).flip(0)
        grid = FeatureGrid.for_roi((rois[1] * scale.repeat(2)).tolist(), (14, 14))
        attention = attention_map(recording, grid, planted.SIZE, *centre(red_box), sample=1)
        assert_points_at(attention, blue_box)


def test_keys_are_cut_off_at_the_border_of_the_image():
    recording = record(make(), torch.rand(1, C, 5, 7))
    attention = attention_map(recording, FeatureGrid(16.0, 16.0), (40, 60), 5.0, 5.0)
    assert attention.in_image.tolist() == [[True] * 4 + [False] * 3] * 3 + [[False] * 7] * 2
    assert attention.boxes[2, 3].tolist() == [48, 32, 60, 40]


@pytest.mark.parametrize("axis", range(3))
def test_pixels_and_frames_that_poolings_leave_out_are_the_last_cells(axis):
    recording, grid = record(make(dim=3), torch.rand(1, C, 3, 5, 7)), FeatureGrid(4, 4, frames=4)
    last, point = [1, 2, 3], [5, 9, 13]  # frame, y, x
    last[axis] = [2, 4, 6][axis]
    point[axis] = [12, 20, 28][axis]
    found = attention_map(recording, grid, (24, 32), point[2], point[1], frame=point[0])
    assert found.query[2] == last[0]
    assert_close(torch.from_numpy(found.weights), recording.attention(last))
    point[axis] += 4
    with pytest.raises(ValueError, match="is outside the map"):
        attention_map(recording, grid, (24, 32), point[2], point[1], frame=point[0])


def test_planted_pair_in_another_frame():
    """A red cell of frames 2 and 3 looks at a blue one of 8 and 9."""
    block = NonLocalBlock(2, dim=3, reduction=1, subsample=2)
    for conv, channel in ((block.theta, planted.RED), (block.phi, planted.BLUE)):
        conv.weight.data.zero_()[0, channel] = 10
    x = torch.zeros(1, 2, 5, 7, 11)
    x[0, planted.RED, 1, 2, 3] = x[0, planted.BLUE, 4, 5, 8] = 1
    grid = FeatureGrid(16.0, 16.0, frames=2)
    attention = attention_map(record(block, x), grid, (112, 176), 3.5 * 16, 2.5 * 16, frame=3)
    assert attention.query == (56.0, 40.0, 1)
    assert attention.weights.shape == (5, 3, 5)
    key = attention.topk(1)[0]
    assert (*key.center, key.frame) == (9 * 16, 5 * 16, 4)  # rows 4 and 5, columns 8 and 9
    assert key.weight > 0.99


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def assert_points_at(attention, box):
    """The centre of the rectangle is in the key with the largest weight."""
    _, row, column = np.unravel_index(attention.weights.argmax(), attention.weights.shape)
    x0, y0, x1, y1 = attention.boxes[row, column]
    x, y = centre(box)
    assert x0 <= x < x1
    assert y0 <= y < y1
    assert attention.weights.max() > 0.2
