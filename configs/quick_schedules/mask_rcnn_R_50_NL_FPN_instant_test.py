# Short run of mask_rcnn_R_50_NL_FPN_1x from scratch
from ..common.instant_test import make_instant
from ..common.mask_rcnn_nl_fpn import dataloader, lr_multiplier, model, optimizer, train

make_instant(dataloader, lr_multiplier, model, optimizer, train)
