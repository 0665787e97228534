# No row in the paper: Table 6 on R50, +4 NL in the head, +1 in the backbone
from ..common.keypoint_rcnn_fpn_nlhead import dataloader, lr_multiplier, model, optimizer, train
from ..common.non_local import add_to_backbone

add_to_backbone(model)
