"""An optimized detector against detectron2's: in float64, in float32, and in half precision."""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path

import cv2
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn
from torch.testing import assert_close

from nl_detectron.config import load_config
from nl_detectron.engine.optimize import optimize_for_inference
from nl_detectron.engine.predictor import Predictor
from nl_detectron.engine.training_model import fold_frozen_norms
from nl_detectron.model_zoo import get_config_file
from nl_detectron.non_local import find_blocks

RCNN = """
    MODEL.BACKBONE.NAME build_non_local_resnet_fpn_backbone
    MODEL.ROI_KEYPOINT_HEAD.NAME NonLocalKeypointHead
""".split()
RETINANET = """
    MODEL.META_ARCHITECTURE RetinaNet MODEL.BACKBONE.NAME
    build_non_local_retinanet_resnet_fpn_backbone MODEL.RETINANET.NUM_CLASSES 3
    MODEL.FPN.IN_FEATURES ['res3','res4','res5'] MODEL.RESNETS.OUT_FEATURES ['res3','res4','res5']
    MODEL.RETINANET.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.NUM_CONVS 2
    MODEL.ANCHOR_GENERATOR.SIZES [[32],[64],[128],[256],[512]]
    MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[0.5,1.0,2.0]]
""".split()
C4 = """
    MODEL.BACKBONE.NAME build_non_local_resnet_backbone MODEL.RESNETS.OUT_FEATURES ['res4']
    MODEL.ROI_HEADS.NAME Res5ROIHeads MODEL.ROI_HEADS.IN_FEATURES ['res4'] MODEL.KEYPOINT_ON False
    MODEL.RPN.IN_FEATURES ['res4'] MODEL.ANCHOR_GENERATOR.SIZES [[32,64]]
    MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 14
""".split()
COCO = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "coco/val2017")
KINDS = {"rcnn": RCNN, "retinanet": RETINANET, "c4": C4}


def images():
    """Two of unlike sizes, the larger one beyond the 256 pixels that bfloat16 can tell apart."""
    return [
        {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)}
        for size in ((150, 333), (160, 301))
    ]


def make_detector(cfg, kind="rcnn", norm="FrozenBN", block_norm=""):
    """A small detector, :func:`tamed`."""
    cfg.merge_from_list(KINDS[kind])
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.NON_LOCAL.NORM = cfg.MODEL.NON_LOCAL.KEYPOINT_HEAD.NORM = block_norm
    if norm == "GN":
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32
    return tamed(build_model(cfg), images())


def tamed(model, batch):
    """The model with active blocks, statistics of the batch, and scores and boxes far apart."""
    for block in find_blocks(model).values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=block.in_channels**-0.5)

    def fit(norm, args):
        norm.running_var, norm.running_mean = torch.var_mean(args[0].flatten(2), dim=(0, 2))
        norm.weight.data.uniform_(0.2, 0.4)
        norm.bias.data.uniform_(0, 0.2)

    def spread(by, layer, args, predictions):
        layer.weight.data *= by / predictions.std()

    spreads = {"objectness_logits": 2, "cls_score": 2, "anchor_deltas": 0.2, "bbox_pred": 0.2}
    handles = [
        module.register_forward_pre_hook(fit)
        for module in model.modules()
        if hasattr(module, "running_var")
    ] + [
        module.register_forward_hook(partial(spread, spreads[name.rpartition(".")[2]]))
        for name, module in model.named_modules()
        if name.endswith(tuple(spreads))
    ]
    with torch.no_grad():
        model.eval()(batch)
    for handle in handles:
        handle.remove()
    return model


def detect(model, batch):
    """All fields of the detections of each image."""
    with torch.no_grad():
        found = [result["instances"] for result in model(batch)]
    assert all(map(len, found))
    fields = [instances.get_fields() for instances in found]
    return [{**f, "pred_boxes": f["pred_boxes"].tensor} for f in fields]


def assert_same_objects(found, expected):
    """Boxes, scores and all else within 1e-3 of the largest value."""
    for image, reference in zip(found, expected, strict=True):
        assert image.keys() == reference.keys()
        for name, value in reference.items():
            if name == "pred_masks":  # 0 or 1: at a pixel with 0.5 rounding decides
                assert (image[name] != value).float().mean() < 1e-3
            else:
                largest = max(value.abs().max().item(), 1)
                assert_close(image[name], value, rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize(
    ("kind", "norm", "block_norm"),
    [
        ("rcnn", "FrozenBN", ""),
        ("rcnn", "FrozenBN", "BN"),
        ("rcnn", "BN", "GN"),
        ("rcnn", "GN", "BN"),
        ("retinanet", "FrozenBN", ""),
        ("retinanet", "BN", "BN"),
        ("c4", "FrozenBN", ""),
    ],
)
def test_same_results(kind, norm, block_norm, small_cfg):
    model, batch = make_detector(small_cfg, kind, norm, block_norm), images()
    optimized = optimize_for_inference(model)
    assert type(optimized) is type(model)
    assert_same_objects(detect(optimized, batch), detect(model, batch))
    # In float64, which detectron2 cannot decode, nothing but a wrong formula makes a difference.
    exact = copy.deepcopy(model).double()
    optimized = optimize_for_inference(exact)
    with torch.no_grad():
        pixels = exact.preprocess_image(batch).tensor
        maps, got = (m.backbone(pixels) for m in (exact, optimized))
        assert_close(dict(got), dict(maps), rtol=1e-9, atol=1e-9)
        if kind == "rcnn":
            features = torch.randn(3, 16, 14, 14, dtype=torch.float64)
            heatmaps, got = (m.roi_heads.keypoint_head.layers(features) for m in (exact, optimized))
            assert_close(got, heatmaps, rtol=1e-9, atol=1e-9)


def test_norms_are_folded(small_cfg):
    """None is left in the network, and the memory of all weights is channels-last."""
    model = optimize_for_inference(make_detector(small_cfg, block_norm="BN"))
    assert not [name for name, _ in model.named_modules() if name.endswith("norm")]
    for parameter in model.parameters():
        assert not parameter.requires_grad
        assert parameter.dim() < 4 or parameter.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps = model.backbone(model.preprocess_image(images()).tensor)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_given_model_stays(dtype, small_cfg):
    model, batch = make_detector(small_cfg).train(), images()
    state = copy.deepcopy(model.state_dict())
    described, expected = repr(model), detect(model.eval(), batch)
    model.train()
    optimized = optimize_for_inference(model, dtype)
    assert not optimized.training
    detect(optimized, batch)
    assert model.training
    assert repr(model) == described
    assert all(parameter.requires_grad for parameter in model.roi_heads.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for image, reference in zip(detect(model.eval(), batch), expected):
        assert all(torch.equal(image[name], value) for name, value in reference.items())
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in optimized.parameters()}


def outputs(model, batch, *ends):
    """Outputs of the layers whose names end so, each called for several maps."""
    found = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: found.setdefault(name, []).append(
                output.clone()
            )
        )
        for name, module in model.named_modules()
        if name.endswith(ends)
    ]
    detect(model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rcnn", "retinanet", "c4"])
def test_half_precision(kind, dtype, small_cfg):
    """What the network predicts is as exact as with PyTorch's autocast, results are float32."""
    model, batch = make_detector(small_cfg, kind, block_norm="GN"), images()
    optimized = optimize_for_inference(model, dtype)
    dense = kind == "retinanet"
    # Later ones depend on proposals, which are not the same.
    ends = ("cls_score", "bbox_pred") if dense else ("objectness_logits", "anchor_deltas")
    expected = outputs(model, batch, *ends)
    got = outputs(optimized, batch, *ends)
    with torch.autocast("cpu", dtype):
        autocast = outputs(model, batch, *ends)
    assert expected.keys() == got.keys()
    for name, maps in expected.items():
        assert all(x.dtype == torch.float32 for x in got[name])
        rounded, bound = (
            sum((x - y).square().sum() for x, y in zip(found[name], maps)).sqrt()
            for found in (got, autocast)
        )
        assert 0 < rounded < 1.2 * bound
    for image in detect(optimized, batch):
        assert image["pred_boxes"].dtype == image["scores"].dtype == torch.float32
        for name in {"pred_keypoints", "pred_keypoint_heatmaps"} & image.keys():
            assert image[name].dtype == torch.float32
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    heads = ("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred", "predictor", "lowres")
    for name, module in optimized.named_modules():
        if isinstance(module, layers):
            float32 = name.endswith(heads) and not dense
            assert module.weight.dtype == (torch.float32 if float32 else dtype), name
        elif module._parameters:
            assert {p.dtype for p in module._parameters.values()} == {torch.float32}, name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_regions_are_where_they_are(dtype, small_cfg, monkeypatch):
    """RoIAlign of torchvision at coordinates that bfloat16 would round by up to four pixels."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    optimized = optimize_for_inference(make_detector(small_cfg), dtype)
    pooler = next(m for m in optimized.modules() if isinstance(m, ROIPooler))
    maps = [torch.randn(2, 4, 256 // 2**i, 256 // 2**i) for i in range(4)]
    maps = [x.to(dtype or torch.float32, memory_format=torch.channels_last) for x in maps]
    for number in (0, 1, 2, 7):
        corners = 900 + 40 * torch.rand(number, 2)
        boxes = torch.cat([corners, corners + 1 + 60 * torch.rand(number, 2)], dim=1)
        got = pooler(maps, [Boxes(boxes), Boxes(boxes[:1])])
        assert got.dtype == torch.float32
        assert len(got) == number + min(number, 1)
        for row, box in zip(got, boxes):  # smaller than 112 pixels: of the first map
            expected = torchvision.ops.roi_align(
                maps[0][:1].float(), [box[None]], row.shape[1:], 1 / 4, 0, aligned=True
            )
            assert torch.equal(row, expected[0])


def test_model_prepared_for_training(small_cfg):
    model, batch = make_detector(small_cfg), images()
    expected = detect(model, batch)
    fold_frozen_norms(model)
    assert_same_objects(detect(optimize_for_inference(model), batch), expected)


@pytest.mark.slow
def test_compiled_backbone(small_cfg):
    model, batch = make_detector(small_cfg), images()
    optimized = optimize_for_inference(model)
    optimized.backbone.compile()
    with torch.no_grad():
        for size in ((128, 160), (96, 224), (160, 96)):
            pixels = torch.randn(2, 3, *size)
            expected, got = (dict(m.backbone(pixels)) for m in (model, optimized))
            assert_close(got, expected, rtol=0, atol=1e-3)
    assert len(detect(optimized, batch)) == 2


@pytest.mark.slow
@pytest.mark.skipif(not COCO.is_dir(), reason="needs COCO's val2017 in DETECTRON2_DATASETS")
def test_real_images(cfg):
    """Mask R-CNN R50 with random weights that fit the first images, on twenty.

    Of its two thousand objects, few owe it to a tie between two scores that they are found.
    """
    paths = sorted(COCO.glob("*.jpg"))[:20]
    config = get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml")
    options = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "256", "MODEL.WEIGHTS", ""]
    predictor = Predictor(load_config(config, options))
    inputs = [predictor.network_input(cv2.imread(str(path))) for path in paths]
    model = tamed(predictor.model, inputs[:2])
    optimized = optimize_for_inference(model)
    same = []
    for image in inputs:
        (found,), (expected,) = detect(optimized, [image]), detect(model, [image])
        numbers = [
            torch.cat([o["pred_boxes"], o["scores"][:, None], 1e4 * o["pred_classes"][:, None]], 1)
            for o in (expected, found)
        ]
        difference, nearest = (numbers[0][:, None] - numbers[1]).abs().amax(2).min(1)
        masks = (expected["pred_masks"] != found["pred_masks"][nearest]).float().mean((1, 2))
        same += ((difference < 1e-3 * max(image["image"].shape)) & (masks < 1e-3)).tolist()
    assert len(same) > 1000
    assert sum(same) > 0.99 * len(same)


def test_custom_head_in_half_precision(small_cfg):
    """Nobody knows which of its layers predict, so it stays as it is, or in float32."""
    model = make_detector(small_cfg)
    model.roi_heads.mask_head.predictor_of_mine = model.roi_heads.mask_head.predictor
    del model.roi_heads.mask_head.predictor
    with pytest.raises(
        ValueError, match="roi_heads.mask_head, a MaskRCNN.* has none of the layers"
    ):
        optimize_for_inference(model, torch.bfloat16)
    optimize_for_inference(model)


def test_what_cannot_be_optimized(small_cfg):
    with pytest.raises(ValueError, match="only detectors .*, got Linear"):
        optimize_for_inference(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="dtype must be one of .*bfloat16.*, got torch.float64"):
        optimize_for_inference(make_detector(small_cfg), torch.float64)
