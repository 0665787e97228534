"""mask_rcnn_nl_fpn without masks."""

from .mask_rcnn_nl_fpn import dataloader, lr_multiplier, model, optimizer, train

for _key in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[_key]
dataloader.train.mapper.use_instance_mask = False
