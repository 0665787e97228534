"""What a config must say of a network for video, as far as its weights show it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nl_detectron.weights.dialects import POOLING, TEMPORAL_POOL, Dialect
from nl_detectron.weights.names import local_name, network_keys, shift_every, summarize_keys

BLOCKS_ALONE = "to convert the non-local blocks alone, set blocks_only (--blocks-only)"
_NEEDED = ("stem.conv1.weight", "res2.0.conv2.weight", "res2.0.conv3.weight", "linear.weight")
# Residual blocks with convolutions over three frames, the same in all libraries
_INFLATED = {"res2": slice(0, None), "res3": slice(0, None, 2), "res4": slice(0, None, 2)}
_INFLATED["res5"] = slice(1, None, 2)
_CONVS = {"3x1x1": "conv1", "3x3x3": "conv2"}
_DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def is_video(network: Mapping[str, Tensor]) -> bool:
    """Whether a ResNet, by our names without prefixes, has 3-D convolutions."""
    return "stem.conv1.weight" in network and network["stem.conv1.weight"].dim() == 5


def classifier_name(name: str) -> str:
    """Return the name of a parameter or block of a ResNet in a ``VideoClassifier``."""
    name = local_name(name)
    return ("head." if name.startswith("linear.") else "backbone.") + name


def find_pooling(
    source: Dialect, target: Dialect, temporal_pool: bool, given: str | None
) -> str | None:
    """Return ``MODEL.VIDEO.POOLING`` of a network for video, or ``None`` if it is not known.

    Args:
        source: where the weights come from.
        target: where they go.
        temporal_pool: whether names of the source show TSM's temporal pooling.
        given: by the user.

    Raises:
        ValueError: the networks of a dialect do not pool as given.
    """
    possible = list(source.poolings)
    if TEMPORAL_POOL in possible:
        possible = [name for name in possible if (name == TEMPORAL_POOL) == temporal_pool]
    for poolings in (possible, list(target.poolings)):
        if given and poolings and given not in poolings:
            raise ValueError(
                f"pooling (config key {POOLING}) of these weights must be one of {poolings}, got "
                f"{given!r}"
            )
    return given or (possible[0] if len(possible) == 1 else None)


def video_keys(
    network: Mapping[str, Tensor], dialect: Dialect, pooling: str | None, frozen_norm: bool
) -> dict[str, Any]:
    """Return config keys and their values for C2D, I3D or TSM.

    Args:
        network: the weights by our names, without prefixes.
        dialect: where they come from.
        pooling: see :func:`find_pooling`.
        frozen_norm: batch norm is a constant.

    Raises:
        ValueError: no classifier, or convolutions over several frames where no C2D or I3D has them.
    """
    for name in _NEEDED:
        if name not in network:
            key = network_keys([name], dialect)[name] or classifier_name(name)
            raise ValueError(f"the network lacks {key}; {BLOCKS_ALONE}")
    stem, conv2, conv3, linear = (network[name] for name in _NEEDED)
    blocks = [m[1] for name in network if (m := re.match(r"(res\d)\.\d+\.conv3\.weight", name))]
    num_blocks = tuple(number for stage in _INFLATED if (number := blocks.count(stage)))
    depth = _DEPTHS.get(num_blocks)
    norm = "FrozenBN" if frozen_norm else "BN"
    keys = {
        "MODEL.RESNETS.DEPTH" if depth else "MODEL.VIDEO.NUM_BLOCKS": depth or num_blocks,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": stem.shape[0],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": conv3.shape[0],
        "MODEL.RESNETS.NUM_GROUPS": conv2.shape[0] // conv2.shape[1],
        "MODEL.RESNETS.WIDTH_PER_GROUP": conv2.shape[1],
        "MODEL.RESNETS.NORM": norm if "stem.conv1.norm.weight" in network else "",
        "MODEL.RESNETS.OUT_FEATURES": [f"res{1 + len(num_blocks)}"],
        "MODEL.VIDEO.STEM_KERNEL": tuple(stem.shape[2:]),
        "MODEL.VIDEO.INFLATE": _inflate(network, num_blocks),
        "MODEL.VIDEO.HEAD.NUM_CLASSES": linear.shape[0],
        **dialect.settings,
    }
    if "MODEL.VIDEO.SHIFT.DIRECTION" in keys:
        keys["MODEL.VIDEO.SHIFT.EVERY"] = shift_every(network)
    return keys | ({POOLING: pooling} if pooling else {})


def _inflate(network: Mapping[str, Tensor], num_blocks: tuple[int, ...]) -> str:
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
