# No row in the paper: Table 6 on R50, +4 NL in the head
from ..common.keypoint_rcnn_fpn_nlhead import dataloader, lr_multiplier, model, optimizer, train
