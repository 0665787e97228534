"""What a config must say of a network for video, as far as its weights show it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nl_detectron.weights.dialects import Dialect
from nl_detectron.weights.names import local_name, network_keys, summarize_keys

BLOCKS_ALONE = "to convert the non-local blocks alone, set blocks_only (--blocks-only)"
_NEEDED = ("stem.conv1.weight", "res2.0.conv2.weight", "res2.0.conv3.weight", "linear.weight")
# Residual blocks with convolutions over three frames, the same in all libraries
_INFLATED = {"res2": slice(0, None), "res3": slice(0, None, 2), "res4": slice(0, None, 2)}
_INFLATED["res5"] = slice(1, None, 2)
_CONVS = {"3x1x1": "conv1", "3x3x3": "conv2"}


def is_video(network: Mapping[str, Tensor]) -> bool:
    """Whether a ResNet, by our names without prefixes, has 3-D convolutions."""
    return "stem.conv1.weight" in network and network["stem.conv1.weight"].dim() == 5


def classifier_name(name: str) -> str:
    """Return the name of a parameter or block of a ResNet in a ``VideoClassifier``."""
    name = local_name(name)
    return ("head." if name.startswith("linear.") else "backbone.") + name


def video_keys(network: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Any]:
    """Return the keys of ``MODEL`` and their values for C2D, I3D or TSM.

    Args:
        network: the weights by our names, without prefixes.
        dialect: where they come from, for messages.

    Raises:
        ValueError: no classifier, or convolutions over several frames where no C2D or I3D has them.
    """
    for name in _NEEDED:
        if name not in network:
            key = network_keys([name], dialect, ())[name] or classifier_name(name)
            raise ValueError(f"the network lacks {key}; {BLOCKS_ALONE}")
    stem, conv2, conv3, linear = (network[name] for name in _NEEDED)
    blocks = [m[1] for name in network if (m := re.match(r"(res\d)\.\d+\.conv3\.weight", name))]
    num_blocks = [blocks.count(stage) for stage in _INFLATED]
    return {
        "RESNETS.STEM_OUT_CHANNELS": stem.shape[0],
        "RESNETS.RES2_OUT_CHANNELS": conv3.shape[0],
        "RESNETS.NUM_GROUPS": conv2.shape[0] // conv2.shape[1],
        "RESNETS.WIDTH_PER_GROUP": conv2.shape[1],
        "VIDEO.STEM_KERNEL": tuple(stem.shape[2:]),
        "VIDEO.NUM_BLOCKS": tuple(number for number in num_blocks if number),
        "VIDEO.INFLATE": _inflate(network, num_blocks),
        "VIDEO.HEAD.NUM_CLASSES": linear.shape[0],
    }


def _inflate(network: Mapping[str, Tensor], num_blocks: list[int]) -> str:
    found = {
        name.removesuffix(".weight")
        for name, tensor in network.items()
        if name.startswith("res") and tensor.dim() == 5 and tensor.shape[2] > 1
    }
    for inflate, conv in _CONVS.items():
        expected = {
            f"{stage}.{i}.{conv}"
            for (stage, inflated), number in zip(_INFLATED.items(), num_blocks)
            for i in range(number)[inflated]
        }
        if found == expected:
            return inflate
    if found:
        raise ValueError(
            "the network is neither C2D nor I3D, which have convolutions over several frames in "
            f"other places than {summarize_keys(sorted(found))}"
        )
    return ""
