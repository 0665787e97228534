"""Insert non-local blocks into a stock LazyConfig model, as in the paper (section 6)."""

from nl_detectron import NonLocalKeypointHead, NonLocalResNet


def add_to_backbone(model):
    """Insert one block, right before the last residual block of res4."""
    bottom_up = model.backbone.bottom_up
    bottom_up._target_ = NonLocalResNet
    bottom_up.after_blocks = {"res4": [-2]}
    bottom_up.block_options = {"subsample": 2}
    bottom_up.mask_padding = True


def add_to_keypoint_head(model):
    """Insert four blocks, one after every two convolutions."""
    model.roi_heads.keypoint_head._target_ = NonLocalKeypointHead
