"""The model of a config, which a conversion aims at: its non-local blocks, and its tensors."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from nl_detectron.config import backbone_options, keypoint_head_options
from nl_detectron.non_local import find_blocks
from nl_detectron.weights.blocks import OPTIONS
from nl_detectron.weights.convert import Conversion
from nl_detectron.weights.dialects import DIALECTS, POOLING
from nl_detectron.weights.names import check_tensors


class ConfigModel:
    """The model that a config describes, and its non-local blocks."""

    def __init__(self, cfg: CfgNode):
        """Build the model, on the CPU."""
        self.cfg = cfg.clone()
        self.cfg.defrost()
        self.cfg.MODEL.DEVICE = "cpu"
        self.model = build_model(self.cfg)

    def options(self, name: str) -> dict[str, Any]:
        """Return the arguments of a block, whose name may omit what precedes the ResNet.

        Raises:
            ValueError: the config has no such block.
        """
        find_blocks(self.model, name)  # raises if there is none
        options = backbone_options(self.cfg)
        if stage := re.search(r"\b(res\d)\.non_local", name):
            options |= options["stage_options"][stage[1]]
        if "keypoint_head" in name:
            options = keypoint_head_options(self.cfg)["block_options"]
        # Not dim, which weights show, and which is changed for the whole network or not at all.
        return {k: v for k, v in options.items() if k in OPTIONS and k != "dim"}

    @property
    def pooling(self) -> str | None:
        """How a network for video pools; ``None`` for one for images."""
        video = self.cfg.MODEL.get("VIDEO")
        return video.POOLING if video else None

    def check_video(self, result: Conversion, source: str) -> None:
        """Check that a converted network for video is that of the config.

        Args:
            result: with all blocks.
            source: its dialect.

        Raises:
            ValueError: a config key that does not have the value that the network needs, or tensors
                that do not fit.
        """
        if self.pooling is None:
            raise ValueError("the config is of a network for images, the weights of one for video")
        trained_with = (*DIALECTS[source].settings, POOLING, "MODEL.VIDEO.SHIFT.EVERY")
        for key in trained_with:
            value = attrgetter(key)(self.cfg)
            if result.video.get(key, value) != value:
                raise ValueError(
                    f"{key} of the config must be {result.video[key]} for this network, got {value}"
                )
        check_tensors("the network, unlike the config,", result.state, self.model.state_dict())

    def add_missing_blocks(self, result: Conversion) -> None:
        """Add the blocks that the weights lack, as initialized: the identity."""
        has_prefix = any(key.startswith("backbone.") for key in result.state)
        for name, block in find_blocks(self.model).items():
            if not has_prefix:
                name = re.sub(r"^backbone\.(bottom_up\.)?", "", name)
            if not any(key.startswith(f"{name}.") for key in result.state):
                for parameter, tensor in block.state_dict().items():
                    result.add_tensor(f"{name}.{parameter}", tensor, None, "of a new block")
