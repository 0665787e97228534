"""The non-local blocks of a config: what they compute, and their initial weights."""

from __future__ import annotations

import re
from typing import Any

from detectron2.modeling import build_model

from nl_detectron.config import backbone_options, keypoint_head_options, load_config
from nl_detectron.non_local import find_blocks
from nl_detectron.weights.blocks import OPTIONS
from nl_detectron.weights.convert import Conversion


class ConfigBlocks:
    """The non-local blocks of the model that a config describes."""

    def __init__(self, config_file: str):
        """Build the model of the config."""
        self.cfg = load_config(config_file, ["MODEL.DEVICE", "cpu"])
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

    def add_missing_blocks(self, result: Conversion) -> None:
        """Add the blocks that the weights lack, as initialized: the identity."""
        has_prefix = any(key.startswith("backbone.") for key in result.state)
        for name, block in find_blocks(self.model).items():
            if not has_prefix:
                name = re.sub(r"^backbone\.(bottom_up\.)?", "", name)
            if not any(key.startswith(f"{name}.") for key in result.state):
                for parameter, tensor in block.state_dict().items():
                    result.add_tensor(f"{name}.{parameter}", tensor, None, "of a new block")
