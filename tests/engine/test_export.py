"""Exported programs give what detectron2's model, or the block's definition, gives at any size."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.export import Dim
from torch.testing import assert_close

from nl_detectron import NonLocalBlock, ops
from nl_detectron.config import default_config
from nl_detectron.engine import export
from nl_detectron.engine.optimize import optimize_for_inference
from tests import oracles
from tests.conftest import SMALL

DETECTOR = """
    MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64
    MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0 MODEL.NON_LOCAL.AFTER_BLOCKS.RES4 (-1,)
    MODEL.BACKBONE.NAME build_non_local_resnet_fpn_backbone MODEL.FPN.IN_FEATURES ['res4','res5']
    MODEL.ANCHOR_GENERATOR.SIZES [[32],[64]] MODEL.RPN.IN_FEATURES ['p4','p5']
    MODEL.ROI_HEADS.IN_FEATURES ['p4','p5'] MODEL.ROI_HEADS.NUM_CLASSES 3
    MODEL.ROI_KEYPOINT_HEAD.NAME NonLocalKeypointHead MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (32,32)
    MODEL.NON_LOCAL.KEYPOINT_HEAD.AFTER_CONVS (2,)
""".split()
SIZES = [(65, 133), (230, 131), (96, 128)]
GRAY = torch.full((3, 96, 128), 128.0)


def image(size):
    """A dark one."""
    return torch.rand(3, *size) * 20


def active(model):
    """The model with blocks that do something, and norms that fit its weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train().backbone(torch.randn(2, 3, 160, 160) * 60)
    for module in model.modules():
        if isinstance(module, NonLocalBlock):
            nn.init.normal_(module.conv_out.weight, std=0.02)
    return model.eval()


@pytest.fixture(scope="module")
def cfg():
    cfg = default_config()
    cfg.merge_from_list([*SMALL, *DETECTOR])
    return cfg


@pytest.fixture(scope="module")
def detector(cfg):
    """A Mask and Keypoint R-CNN that finds objects in dark images, and none in gray ones."""
    torch.manual_seed(5)
    model = active(build_model(cfg))
    predictor = model.roi_heads.box_predictor
    nn.init.normal_(predictor.cls_score.weight, std=0.03)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    predictor.test_score_thresh = stock(model, GRAY)["scores"].max().item() + 1e-3
    return model


def stock(model, image):
    """detectron2's own result, as a dict of tensors."""
    with torch.no_grad():
        (found,) = model.inference([{"image": image}], do_postprocess=False)
    fields = found.get_fields()
    return {**fields, "pred_boxes": found.pred_boxes.tensor}


def check_detections(run, model):
    """At all sizes, with objects and without."""
    numbers = []
    for pixels in [*map(image, SIZES), GRAY]:
        got, expected = run(pixels), stock(model, pixels)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            atol = 1e-4 * max(value.abs().max().item(), 1) if len(value) else 0
            assert_close(got[name], value, rtol=0, atol=atol, msg=lambda m, name=name: name + m)
        numbers.append(len(expected["scores"]))
    *some, none = numbers
    assert max(some) == 10
    assert none == 0


def test_whole_detector(detector):
    program = export.DetectorProgram(detector)
    exported = export.export(program, image((101, 70))).module()
    check_detections(exported, detector)


def test_traced_detector(detector, tmp_path):
    program, file = export.DetectorProgram(detector), tmp_path / "model.ts"
    export.save(program, file, "torchscript", image((101, 70)))
    check_detections(export.load(file, "torchscript"), detector)


@pytest.mark.parametrize("size", [(0, 3), (1, 3), (64, 3)], ids=str)
def test_batched_nms_within_groups(size):
    """As a loop: keep the best box, drop those of its group that overlap it, and so on."""
    number, groups = size
    for dtype in (torch.float32, torch.float64):
        corner, sides = torch.rand(2, number, 2) * 50
        boxes = torch.cat([corner, corner + sides + 1], dim=1)
        scores, group = torch.rand(number), torch.randint(groups, (number,))
        expected: list[int] = []
        for i in scores.argsort(descending=True).tolist():
            if all(group[i] != group[j] or iou(boxes[i], boxes[j]) <= 0.4 for j in expected):
                expected.append(i)
        got = export._batched_nms(boxes, scores, group, 0.4, dtype=dtype)
        assert got.tolist() == expected


def iou(a, b):
    sides = torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])
    both = sides.clamp(min=0).prod()
    return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


class Blocks(nn.Module):
    """A block of each of some forms, on the same map."""

    def __init__(self, forms, position):
        super().__init__()
        options = {"subsample": 2, "subsample_position": position}
        blocks = {form: NonLocalBlock(8, pairwise=form, **options) for form in forms}
        self.blocks, self.options = nn.ModuleDict(blocks), options
        for block in blocks.values():
            nn.init.normal_(block.conv_out.weight)

    def forward(self, x):
        return tuple(block(x) for block in self.blocks.values())


@pytest.mark.parametrize(
    ("forms", "position"),
    [
        (("embedded_gaussian", "concatenation"), "before_conv"),
        pytest.param(ops.PAIRWISE, "before_conv", marks=pytest.mark.slow),
        pytest.param(ops.PAIRWISE, "after_conv", marks=pytest.mark.slow),
    ],
)
def test_blocks_in_onnx(forms, position, tmp_path):
    model = Blocks(forms, position).eval()
    size = {0: Dim("n"), 2: Dim("h", min=4), 3: Dim("w", min=4)}
    with export.block_paths(model, "onnx"):
        exported = torch.export.export(model, (torch.randn(2, 8, 9, 6),), dynamic_shapes=(size,))
    export.save_onnx(exported, tmp_path / "blocks.onnx", list(forms))
    run = export.load(tmp_path / "blocks.onnx", "onnx")
    for shape in [(1, 8, 5, 7), (3, 8, 31, 4), (2, 8, 12, 64)]:
        x = torch.randn(shape)
        for form, got in run(x).items():
            weights = {k: v.double() for k, v in model.blocks[form].state_dict().items()}
            expected = oracles.plain_block(x.double(), weights, form, **model.options)
            assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_file_that_differs_is_refused(detector):
    program = export.DetectorProgram(detector)

    def run(pixels):
        found = stock(detector, pixels)
        return {**found, "pred_masks": found["pred_masks"] + 2e-4 * (len(pixels[0]) == 71)}

    lines = export.check(program, run, "torch", image((100, 100)))
    assert next(lines) == "100 x 100, 10 objects: agrees to 0.0e+00 (pred_boxes)"
    with pytest.raises(ValueError, match="at 71 x 71 pred_masks differs by 2.0e-04 of its largest"):
        list(lines)


def test_keypoints_that_are_not_those_of_the_heatmaps(detector):
    found = stock(detector, image((100, 100)))
    for change, expected in ((0.0, 0.0), (1.0, pytest.approx(0.01, rel=0.9))):
        other = {**found, "pred_keypoints": found["pred_keypoints"] + change}
        assert export.compare(found, other)["pred_keypoints"] == expected
    fewer = {name: value[1:] for name, value in found.items()}
    assert export.compare(found, fewer)["pred_boxes"] == float("inf")
    other = {**found, "scores": found["scores"] * float("nan")}
    assert export.compare(found, other)["scores"] == float("inf")


def test_optimized_detector(detector):
    """Whose weights are channels-last."""
    program = export.DetectorProgram(optimize_for_inference(detector))
    exported = export.export(program, image((96, 128)))
    check_detections(exported.module(), detector)
