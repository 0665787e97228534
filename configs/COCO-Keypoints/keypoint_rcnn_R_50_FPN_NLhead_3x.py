# No row in the paper: Table 6 on R50, +4 NL in the head
from detectron2 import model_zoo

from ..common.keypoint_rcnn_fpn_nlhead import dataloader, model, optimizer, train

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train.max_iter = 270000
