# No row in the paper: Table 5's R50 with 5 blocks, where Table 2c has them
from ..common.mask_rcnn_nl_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.after_blocks = {"res3": [1, 3], "res4": [1, 3, 5]}
