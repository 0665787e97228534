"""Non-local Neural Networks for detectron2: backbones, a keypoint head, and the block itself."""

import warnings

# Must come first: if DETECTRON2_ENV_MODULE names this package, importing detectron2 calls back into
# it, and the modules below need a fully imported detectron2.
try:
    with warnings.catch_warnings():
        # raised by detectron2's own code
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        import detectron2
        import detectron2.modeling
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "nl_detectron needs detectron2, which the package index does not carry under that name: "
        "`nl-detectron doctor` prints the command that installs it",
        name="detectron2",
    ) from None

from nl_detectron.backbone import (
    NonLocalResNet,
    build_non_local_resnet_backbone,
    build_non_local_resnet_fpn_backbone,
    build_non_local_retinanet_resnet_fpn_backbone,
    insert_non_local_blocks,
)
from nl_detectron.config import add_non_local_config
from nl_detectron.keypoint_head import NonLocalKeypointHead
from nl_detectron.non_local import NonLocalBlock

__all__ = [
    "NonLocalBlock",
    "NonLocalKeypointHead",
    "NonLocalResNet",
    "add_non_local_config",
    "build_non_local_resnet_backbone",
    "build_non_local_resnet_fpn_backbone",
    "build_non_local_retinanet_resnet_fpn_backbone",
    "insert_non_local_blocks",
]

del detectron2, warnings  # not public names of this package

__version__ = "0.1.0"
