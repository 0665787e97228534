"""Stock's Keypoint R-CNN R50-FPN 1x with four blocks in the head."""

from detectron2 import model_zoo

from .non_local import add_to_keypoint_head

_stock = model_zoo.get_config("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py")
dataloader, model, optimizer = _stock.dataloader, _stock.model, _stock.optimizer
lr_multiplier, train = _stock.lr_multiplier, _stock.train

add_to_keypoint_head(model)
