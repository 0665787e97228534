"""What blocks cost in a detector, by hand, and the tables of it."""

from __future__ import annotations

import numpy as np
import pytest

from nl_detectron.analysis.detector_cost import Workload, block_rows, count_parameters_and_gmac
from nl_detectron.config import load_config, without_blocks
from nl_detectron.model_zoo import get_config_file
from nl_detectron_cli import analyze
from tests.running import run

RETINANET = "COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_{}_NL_FPN_{}.yaml"


def load(name):
    return load_config(get_config_file(name))


def cost(cfg, **workload):
    """Parameters and GMAC."""
    return np.array(count_parameters_and_gmac(cfg, Workload(**workload)))


@pytest.mark.parametrize("name", [("R_50", "1x"), ("R_101", "3x"), ("X_152_32x8d", "1x")])
def test_one_block_in_mask_rcnn(name):
    """C = 1024, D = 512; 50 x 84 queries, 25 x 42 keys."""
    cfg = load(MASK_RCNN.format(*name))
    stock = cost(without_blocks(cfg))
    parameters, gmac = cost(cfg) - stock
    queries, keys = 50 * 84, 25 * 42
    projections = 1024 * 512 * (2 * queries + 2 * keys)
    pairs = 2 * queries * keys * 512
    assert parameters == 3 * (1024 * 512 + 512) + 512 * 1024 + 1024 == 2_099_712
    assert gmac == pytest.approx((projections + pairs) / 1e9)
    assert gmac / stock[1] < 0.05
    cfg.MODEL.NON_LOCAL.NORM = "BN"
    assert (cost(cfg) - stock)[0] == 2_101_760


def test_mask_head_is_counted_per_detection():
    """Four 3x3 convolutions and a 2x2 deconvolution of 256 channels, 80 classes."""
    cfg, size = load(MASK_RCNN.format("R_50", "1x")), {"image_size": (64, 64), "proposals": 7}
    _, gmac = cost(cfg, detections=5, **size) - cost(cfg, detections=3, **size)
    per_roi = 196 * 256 * 256 * (4 * 9 + 4) + 784 * 256 * 80
    assert gmac == pytest.approx(2 * per_roi / 1e9)


def test_roi_heads_are_counted_per_roi():
    """Four blocks at 14 x 14 with C = 512, D = 256, not subsampled."""
    cfg = load("COCO-Keypoints/keypoint_rcnn_R_50_FPN_NLhead_1x.yaml")
    _, gmac = cost(cfg) - cost(without_blocks(cfg))
    per_roi = 4 * 196 * 512 * 256 + 2 * 196 * 196 * 256
    assert gmac == pytest.approx(100 * 4 * per_roi / 1e9)


def test_no_blocks():
    (line,) = block_rows(without_blocks(load(RETINANET)), Workload(image_size=(64, 64)), 1)
    name = "build_retinanet_resnet_fpn_backbone"
    assert line.startswith(f"no non-local blocks: MODEL.BACKBONE.NAME is {name}, ")


def test_mistake():
    with pytest.raises(SystemExit, match="pairwise .*must be one of .*, got 'dot'"):
        analyze.main(["--config-file", RETINANET, "MODEL.NON_LOCAL.PAIRWISE", "dot"])


def test_command():
    done = run("tools/analyze.py --config-file", RETINANET, "--batch-size 2")
    assert "| retinanet_R_50_NL_FPN_1x | 40,015,284 | 2,099,712 |" in done.stdout
    # x; pooled keys and where they come from; theta, phi, g; y; attention
    x, keys, inner = 1024 * 4200, 1024 * 1050, 512 * (4200 + 2 * 1050 + 4200)
    saved = 2 * (4 * (x + keys + inner + 4200 * 1050) + 8 * keys) / 2**20
    block = "| backbone.bottom_up.res4.non_local4 | 2 x 1024 x 50 x 84 | naive | 2,099,712 |"
    assert f"{block} 20.0 | 20.0 | {saved:.1f} MB |" in done.stdout
