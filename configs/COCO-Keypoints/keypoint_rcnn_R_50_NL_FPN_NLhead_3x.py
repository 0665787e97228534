# No row in the paper: Table 6 on R50, +4 NL in the head, +1 in the backbone
from detectron2 import model_zoo

from ..common.keypoint_rcnn_fpn_nlhead import dataloader, model, optimizer, train
from ..common.non_local import add_to_backbone

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
add_to_backbone(model)
train.max_iter = 270000
