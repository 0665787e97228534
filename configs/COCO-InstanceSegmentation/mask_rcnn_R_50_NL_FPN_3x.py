# Table 5, R50 +1 NL: 39.0 box AP, 35.5 mask AP (paper, not reproduced here)
from detectron2 import model_zoo

from ..common.mask_rcnn_nl_fpn import dataloader, model, optimizer, train

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train.max_iter = 270000
