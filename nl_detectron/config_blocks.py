"""The non-local blocks of a config: what they compute, and their initial weights."""

from __future__ import annotations

import re
from typing import Any

from detectron2.modeling import build_model

from nl_detectron.config import backbone_options, keypoint_head_options, load_config
from nl_detectron.non_local import NonLocalBlock
from nl_detectron.weights import OPTIONS, Conversion


class ConfigBlocks:
    """What weights do not tell of blocks, from the config of their model."""

    def __init__(self, config_file: str):
        """Build the model of the config."""
        self.cfg = load_config(config_file, ["MODEL.DEVICE", "cpu"])
        modules = build_model(self.cfg).named_modules()
        self.blocks = {name: m for name, m in modules if isinstance(m, NonLocalBlock)}

    def options(self, name: str) -> dict[str, Any]:
        """Return the arguments of a block; its name may lack what is before the ResNet."""
        if not any(f".{full_name}".endswith(f".{name}") for full_name in self.blocks):
            raise ValueError(f"the config has no such block; it has {sorted(self.blocks)}")
        options = backbone_options(self.cfg)
        if "keypoint_head" in name:
            options = keypoint_head_options(self.cfg)["block_options"]
        return {k: v for k, v in options.items() if k in OPTIONS}  # those that change the function

    def add_missing_blocks(self, result: Conversion) -> None:
        """Add the blocks that the weights lack, as they are when new: the identity."""
        whole = any(key.startswith("backbone.") for key in result.state)
        for name, block in self.blocks.items():
            if not whole:
                name = re.sub(r"^backbone\.(bottom_up\.)?", "", name)
            if not any(key.startswith(f"{name}.") for key in result.state):
                for parameter, tensor in block.state_dict().items():
                    result.put(f"{name}.{parameter}", tensor, None, "of a new block")
