"""Stock's Mask R-CNN R50-FPN 1x with one block in the backbone, like Base-RCNN-NL-FPN.yaml."""

from detectron2 import model_zoo

from .non_local import add_to_backbone

_stock = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, model, optimizer = _stock.dataloader, _stock.model, _stock.optimizer
lr_multiplier, train = _stock.lr_multiplier, _stock.train

add_to_backbone(model)
