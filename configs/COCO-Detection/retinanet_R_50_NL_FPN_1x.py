# No row in the paper: RetinaNet R50, +1 NL
from ..common.retinanet_nl_fpn import dataloader, lr_multiplier, model, optimizer, train
