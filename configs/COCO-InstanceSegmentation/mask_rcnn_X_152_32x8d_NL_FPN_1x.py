# Table 5, X152 +1 NL: 45.0 box AP, 40.3 mask AP (paper, not reproduced here)
# The paper does not say what X152 was pretrained on, nor its schedule; ImageNet-5k and 1x are ours.
# PIXEL_STD stays 1, unlike X101's: models under catalog:// have it folded into their first layer.
from ..common.mask_rcnn_nl_fpn import dataloader, lr_multiplier, model, optimizer, train
from ..common.resnext import resnext_32x8d_stages

model.backbone.bottom_up.stages = resnext_32x8d_stages([3, 8, 36, 3])
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/X-152-32x8d-IN5k"
