# No row in the paper: Table 5's R50 +1 NL, boxes only
from detectron2 import model_zoo

from ..common.faster_rcnn_nl_fpn import dataloader, model, optimizer, train

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train.max_iter = 270000
