"""A detector whose attention is known: red looks at blue, in the backbone and in the keypoint head.

Colours pass through the network untouched, each in a channel of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from detectron2.layers import Conv2d

from nl_detectron.engine.predictor import Predictor
from nl_detectron.non_local import find_blocks

RED, BLUE = 0, 1  # channels
SIZE, INPUT_SIZE, PADDED_SIZE = (101, 173), (150, 257), (160, 288)


def planted_cfg(cfg):
    """For images of ``SIZE``, resized to ``INPUT_SIZE`` and padded to ``PADDED_SIZE``."""
    cfg.MODEL.NON_LOCAL.KEYPOINT_HEAD.AFTER_CONVS = (2,)
    cfg.MODEL.MASK_ON = False
    cfg.INPUT.MIN_SIZE_TEST = 150
    return cfg


@torch.no_grad()
def planted_predictor(cfg):
    predictor = Predictor(cfg, "")
    model = predictor.model
    for module in (*model.backbone.modules(), *model.roi_heads.keypoint_head.modules()):
        if isinstance(module, Conv2d):
            module.weight.zero_()
    blue, _, red = range(3)  # the network takes BGR
    stem = model.backbone.bottom_up.stem.conv1.weight
    stem[[RED, BLUE], [red, blue], 3, 3] = 1  # red minus blue, and blue minus red
    stem[[RED, BLUE], [blue, red], 3, 3] = -1
    resnet = model.backbone.bottom_up
    keep = [stage[0].shortcut for stage in (resnet.res2, resnet.res3, resnet.res4)]
    keep += [model.backbone.fpn_lateral2, model.backbone.fpn_output2]
    keep += [model.roi_heads.keypoint_head.conv_fcn1, model.roi_heads.keypoint_head.conv_fcn2]
    for conv in keep:
        centre = conv.kernel_size[0] // 2
        conv.weight[[RED, BLUE], [RED, BLUE], centre, centre] = 1
    for block in find_blocks(model).values():
        block.theta.weight.zero_()[0, RED] = 0.1
        block.phi.weight.zero_()[0, BLUE] = 0.1
    return predictor


def picture(red, blue):
    """Grey of ``SIZE``, with a red and a blue rectangle, each x0, y0, x1, y1; BGR."""
    image = np.full((*SIZE, 3), 90, dtype=np.uint8)
    for (x0, y0, x1, y1), colour in ((red, (0, 0, 255)), (blue, (255, 0, 0))):
        image[y0:y1, x0:x1] = colour
    return image


def rectangle(x, y, width, height):
    """Pixels of ``SIZE`` that a rectangle of ``INPUT_SIZE`` covers."""
    scale = SIZE[1] / INPUT_SIZE[1], SIZE[0] / INPUT_SIZE[0]
    corners = np.array([x, y, x + width, y + height]) * np.tile(scale, 2)
    return corners.round().astype(int).tolist()
