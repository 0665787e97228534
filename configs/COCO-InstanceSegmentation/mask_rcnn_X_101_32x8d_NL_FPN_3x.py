# No row in the paper: detectron2's X101-32x8d baseline, +1 NL
from detectron2 import model_zoo

from ..common.mask_rcnn_nl_fpn import dataloader, model, optimizer, train
from ..common.resnext import resnext_32x8d_stages

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
model.backbone.bottom_up.stages = resnext_32x8d_stages([3, 4, 23, 3])
model.pixel_std = [57.375, 57.120, 58.395]
train.init_checkpoint = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"
train.max_iter = 270000
