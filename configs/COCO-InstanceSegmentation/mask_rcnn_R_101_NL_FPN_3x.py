# Table 5, R101 +1 NL: 40.8 box AP, 37.1 mask AP (paper, not reproduced here)
from detectron2 import model_zoo

from ..common.mask_rcnn_nl_fpn import dataloader, model, optimizer, train

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = 270000
