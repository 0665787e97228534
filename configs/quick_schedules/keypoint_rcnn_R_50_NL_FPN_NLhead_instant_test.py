# Short run of keypoint_rcnn_R_50_NL_FPN_NLhead_1x from scratch
from ..common.instant_test import make_instant
from ..common.keypoint_rcnn_fpn_nlhead import dataloader, lr_multiplier, model, optimizer, train
from ..common.non_local import add_to_backbone

add_to_backbone(model)
make_instant(dataloader, lr_multiplier, model, optimizer, train)
