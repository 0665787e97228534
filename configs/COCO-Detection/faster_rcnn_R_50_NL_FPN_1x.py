# No row in the paper: Table 5's R50 +1 NL, boxes only
from ..common.faster_rcnn_nl_fpn import dataloader, lr_multiplier, model, optimizer, train
