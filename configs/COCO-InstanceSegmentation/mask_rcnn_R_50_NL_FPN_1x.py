# Table 5, R50 +1 NL: 39.0 box AP, 35.5 mask AP (paper, not reproduced here)
from ..common.mask_rcnn_nl_fpn import dataloader, lr_multiplier, model, optimizer, train
