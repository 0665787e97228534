"""The config node ``MODEL.NON_LOCAL``: its defaults, what they mean, and how to read a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

STAGES = ("res2", "res3", "res4", "res5")

_DEFAULTS: dict[str, Any] = {
    # gaussian, embedded_gaussian, dot_product or concatenation
    "PAIRWISE": "embedded_gaussian",
    # in_channels / inner_channels
    "REDUCTION": 2,
    # Multiply the affinity of embedded_gaussian by inner_channels ** -0.5. False is the paper's
    # text, True its released code.
    "SCALE": True,
    # Stride of the max-pooling of the keys in the backbone's blocks; 1 is off. The paper's "less
    # than 5 % more computation" needs 2.
    "SUBSAMPLE": 2,
    # before_conv (released code) or after_conv (the paper's text)
    "SUBSAMPLE_POSITION": "before_conv",
    # Norm after the output convolution of the backbone's blocks: "", BN, SyncBN or GN. Independent
    # of RESNETS.NORM, whose FrozenBN would keep a block at the identity for ever.
    "NORM": "",
    # Keep only the input and output of the operation for the backward pass: less memory, more time.
    "ACTIVATION_CHECKPOINT": False,
    # By stage, the residual blocks to put a non-local block after; 0-based, negative from the end.
    # (-2,) is "right before the last residual block" for every depth.
    "AFTER_BLOCKS": {"RES2": (), "RES3": (), "RES4": (-2,), "RES5": ()},
    "KEYPOINT_HEAD": {
        # The convolutions conv_fcnN of the head to put a non-local block after; 1-based as there.
        "AFTER_CONVS": (2, 4, 6, 8),
        # As above, for the head's blocks; their map is 14 x 14.
        "SUBSAMPLE": 1,
        "NORM": "",
    },
}


def add_non_local_config(cfg: CfgNode) -> None:
    """Add ``MODEL.NON_LOCAL`` with its defaults to a detectron2 config, once.

    The node does nothing until ``MODEL.BACKBONE.NAME`` or ``MODEL.ROI_KEYPOINT_HEAD.NAME`` selects
    a builder of this package. No other key is touched.
    """
    if "NON_LOCAL" not in cfg.MODEL:
        cfg.MODEL.NON_LOCAL = CfgNode(_DEFAULTS)


def load_config(path: str | Path, options: Sequence[Any] = ()) -> CfgNode:
    """Read a YAML config, and choose the CPU where CUDA is absent.

    Args:
        path: the file.
        options: config keys and values in turn, which win over the file.

    Raises:
        ValueError: no such file, not YAML, or an unknown key, with the nearest known one.
    """
    cfg = get_cfg()
    add_non_local_config(cfg)
    if Path(path).suffix == ".py":
        raise ValueError(f"{path} is a LazyConfig; give the YAML config beside it")
    try:
        cfg.merge_from_file(str(path))
        cfg.merge_from_list(list(options))
    except (AssertionError, KeyError) as error:
        raise ValueError(_with_nearest_key(cfg, error)) from error
    except (AttributeError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a YAML config: {error}") from error
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def without_blocks(cfg: CfgNode) -> CfgNode:
    """Return the same config without the blocks: stock detectron2's backbone and keypoint head."""
    twin = cfg.clone()
    twin.defrost()
    twin.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("non_local_", "")
    if cfg.MODEL.ROI_KEYPOINT_HEAD.NAME == "NonLocalKeypointHead":
        twin.MODEL.ROI_KEYPOINT_HEAD.NAME = get_cfg().MODEL.ROI_KEYPOINT_HEAD.NAME
    return twin


def backbone_options(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of :func:`nl_detectron.insert_non_local_blocks` from a config, by name."""
    node = _node(cfg)
    after_blocks = {stage: tuple(node.AFTER_BLOCKS[stage.upper()]) for stage in STAGES}
    return {
        "after_blocks": after_blocks,
        "subsample": node.SUBSAMPLE,
        "norm": node.NORM,
        **_shared_options(node),
    }


def keypoint_head_options(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of :class:`nl_detectron.NonLocalKeypointHead` beyond the stock head's, by name."""
    node = _node(cfg)
    head = node.KEYPOINT_HEAD
    options = {"subsample": head.SUBSAMPLE, "norm": head.NORM, **_shared_options(node)}
    return {"after_convs": tuple(head.AFTER_CONVS), "block_options": options}


def _shared_options(node: CfgNode) -> dict[str, Any]:
    return {
        "pairwise": node.PAIRWISE,
        "reduction": node.REDUCTION,
        "scale": node.SCALE,
        "subsample_position": node.SUBSAMPLE_POSITION,
        "activation_checkpoint": node.ACTIVATION_CHECKPOINT,
    }


def _node(cfg: CfgNode) -> CfgNode:
    if "NON_LOCAL" not in cfg.MODEL:
        raise KeyError(
            "MODEL.NON_LOCAL is missing: call nl_detectron.add_non_local_config(cfg) after "
            "get_cfg(), or set the environment variable DETECTRON2_ENV_MODULE=nl_detectron.env"
        )
    node = cfg.MODEL.NON_LOCAL
    _check_keys("MODEL.NON_LOCAL", node, _DEFAULTS)
    for name in ("AFTER_BLOCKS", "KEYPOINT_HEAD"):
        _check_keys(f"MODEL.NON_LOCAL.{name}", node[name], _DEFAULTS[name])
    return node


def _check_keys(path: str, node: CfgNode, known: dict[str, Any]) -> None:
    for key in node:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown config key {path}.{key}, did you mean {nearest}? "
                f"Allowed: {', '.join(known)}"
            )


def _with_nearest_key(cfg: CfgNode, error: Exception) -> str:
    message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    nearest = difflib.get_close_matches(message.split()[-1], list(_flat_keys(cfg)), n=1)
    return f"{message}; did you mean {nearest[0]}?" if nearest else message


def _flat_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key
