# Table 6, R101 +4 NL in the head, +1 in the backbone: 66.5 keypoint AP (paper, not reproduced here)
from detectron2 import model_zoo

from ..common.keypoint_rcnn_fpn_nlhead import dataloader, model, optimizer, train
from ..common.non_local import add_to_backbone

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
add_to_backbone(model)
model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = 270000
