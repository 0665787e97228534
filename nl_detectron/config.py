"""The config node ``MODEL.NON_LOCAL``: its keys and defaults, and reading a config file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from nl_detectron.safety.configs import check_config

STAGES = ("res2", "res3", "res4", "res5")

_DEFAULTS: dict[str, Any] = {
    # gaussian, embedded_gaussian, dot_product or concatenation
    "PAIRWISE": "embedded_gaussian",
    # Axes of the backbone's maps besides batch and channels: 1, 2 or 3, as its convolutions have.
    "DIM": 2,
    # In a 3-D backbone, what a position attends to: all positions (spacetime), its own frame
    # (space), or its own place in all frames (time; needs SUBSAMPLE 1).
    "AXES": "spacetime",
    # In a 3-D backbone, attend only within groups of this many consecutive frames; 0 is off.
    "GROUP_FRAMES": 0,
    # in_channels / inner_channels
    "REDUCTION": 2,
    # Multiply the affinity of embedded_gaussian by inner_channels ** -0.5: True in the paper's
    # released code, False in its text.
    "SCALE": True,
    # Stride of the max-pooling of the keys in the backbone's blocks; 1 is off. The paper's "less
    # than 5 % more computation" needs 2.
    "SUBSAMPLE": 2,
    # before_conv (released code) or after_conv (the paper's text)
    "SUBSAMPLE_POSITION": "before_conv",
    # Norm after the output convolution of the backbone's blocks: "", BN, SyncBN or GN. Independent
    # of RESNETS.NORM: a block with FrozenBN could never learn.
    "NORM": "",
    # Save only the input and output of the operation for the backward pass: less memory, more time.
    "ACTIVATION_CHECKPOINT": False,
    # Leave keys in the padding of a batch out of the sums, in the backbone's blocks: the result for
    # an image does not depend on the other images of its batch. Clips (DIM 3) are not padded.
    "MASK_PADDING": True,
    # For each stage, the residual blocks to insert a non-local block after; 0-based, negative from
    # the end. (-2,) is "right before the last residual block" for every depth.
    "AFTER_BLOCKS": {"RES2": (), "RES3": (), "RES4": (-2,), "RES5": ()},
    # Other values for the blocks of a stage: keys from above and values in turn, as on a command
    # line: ("GROUP_FRAMES", 4).
    "STAGE_OPTIONS": {"RES2": (), "RES3": (), "RES4": (), "RES5": ()},
    "KEYPOINT_HEAD": {
        # The convolutions conv_fcnN of the head to insert a non-local block after; N is 1-based.
        "AFTER_CONVS": (2, 4, 6, 8),
        # As above, for the head's blocks; their map is 14 x 14.
        "SUBSAMPLE": 1,
        "NORM": "",
    },
}

# For without_blocks(): the registered name of a builder with blocks -> that of the same builder
# without. Add your own; a builder that never inserts blocks maps to itself.
STOCK_BUILDERS = {
    "build_non_local_resnet_backbone": "build_resnet_backbone",
    "build_non_local_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_non_local_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
    "NonLocalKeypointHead": "KRCNNConvDeconvUpsampleHead",
}


# For the commands that look at a model: MODEL.META_ARCHITECTURE -> a function of the config and the
# weights that makes its predictor. All others get nl_detectron.engine.predictor.Predictor.
PREDICTORS: dict[str, Callable[[CfgNode, str | None], Any]] = {}


def add_non_local_config(cfg: CfgNode) -> None:
    """Add ``MODEL.NON_LOCAL`` with its defaults to a detectron2 config, unless it is there.

    The node does nothing until ``MODEL.BACKBONE.NAME`` or ``MODEL.ROI_KEYPOINT_HEAD.NAME`` selects
    a builder of this package. No other key is touched.
    """
    if "NON_LOCAL" not in cfg.MODEL:
        cfg.MODEL.NON_LOCAL = CfgNode(_DEFAULTS)


def default_config() -> CfgNode:
    """detectron2's default config with ``MODEL.NON_LOCAL``."""
    cfg = get_cfg()
    add_non_local_config(cfg)
    return cfg


def load_config(
    path: str | Path,
    options: Sequence[Any] = (),
    get_config: Callable[[], CfgNode] = default_config,
    *,
    allow_remote: bool = False,
) -> CfgNode:
    """Read a YAML config, without running code; without CUDA, change ``MODEL.DEVICE`` to "cpu".

    Args:
        path: the file.
        options: config keys and values in turn, which override the file.
        get_config: makes the config with all keys and defaults; another task has other keys.
        allow_remote: download bases (``_BASE_``) that are URLs.

    Raises:
        OSError: a base cannot be downloaded.
        ValueError: no such file, not YAML, a value that could run code, or an unknown key; the
            message suggests a known one.
    """
    cfg = get_config()
    if Path(path).suffix == ".py":
        raise ValueError(
            f"{path} is a LazyConfig, which is code that would have to be run to read it; give the "
            "YAML config beside it"
        )
    check_config(path, PathManager.get_local_path if allow_remote else None)
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
        cfg.merge_from_list(list(options))
    except (AssertionError, KeyError) as error:
        raise ValueError(_with_nearest_key(cfg, error)) from error
    except (AttributeError, MemoryError, RecursionError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a YAML config: {error}") from error
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def without_blocks(cfg: CfgNode) -> CfgNode:
    """Return a copy of the config that builds the same model without the blocks.

    Raises:
        ValueError: a builder that :data:`STOCK_BUILDERS` does not have.
    """
    stock = cfg.clone()
    stock.defrost()
    for key in ("BACKBONE", "ROI_KEYPOINT_HEAD"):
        node = stock.MODEL[key]
        if node.NAME in STOCK_BUILDERS:
            node.NAME = STOCK_BUILDERS[node.NAME]
        elif node.NAME not in STOCK_BUILDERS.values():
            raise ValueError(
                f"no stock counterpart is known of MODEL.{key}.NAME {node.NAME!r}; known: "
                f"{', '.join(STOCK_BUILDERS)}; add it to nl_detectron.config.STOCK_BUILDERS"
            )
    return stock


def backbone_options(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of :func:`nl_detectron.insert_non_local_blocks` from a config, by name."""
    node = _node(cfg)
    return {
        "after_blocks": {stage: tuple(node.AFTER_BLOCKS[stage.upper()]) for stage in STAGES},
        "stage_options": {stage: _stage_options(node, stage.upper()) for stage in STAGES},
        "mask_padding": node.MASK_PADDING and node.DIM == 2,
        **_backbone_block_options(node),
    }


def keypoint_head_options(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of :class:`nl_detectron.NonLocalKeypointHead` beyond the stock head's, by name."""
    node = _node(cfg)
    head = node.KEYPOINT_HEAD
    options = {"subsample": head.SUBSAMPLE, "norm": head.NORM, **_shared_options(node)}
    return {"after_convs": tuple(head.AFTER_CONVS), "block_options": options}


def _stage_options(node: CfgNode, stage: str) -> dict[str, Any]:
    """The options of the blocks of a stage that STAGE_OPTIONS changes."""
    changes = node.STAGE_OPTIONS[stage]
    options, changed = _backbone_block_options(node), node.clone()
    known = [name.upper() for name in options]
    where = f"MODEL.NON_LOCAL.STAGE_OPTIONS.{stage}"
    if len(changes) % 2 or not set(changes[::2]) <= set(known):
        raise ValueError(f"{where} must be keys of {known} and values in turn, got {changes}")
    try:
        changed.merge_from_list(list(changes))
    except ValueError as error:  # a value of another type
        raise ValueError(f"{where}: {error}") from error
    names = {key.lower() for key in changes[::2]}
    return {k: v for k, v in _backbone_block_options(changed).items() if k in names}


def _backbone_block_options(node: CfgNode) -> dict[str, Any]:
    return {
        "subsample": node.SUBSAMPLE,
        "norm": node.NORM,
        "dim": node.DIM,
        "axes": node.AXES,
        "group_frames": node.GROUP_FRAMES,
        **_shared_options(node),
    }


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
    for name in ("AFTER_BLOCKS", "STAGE_OPTIONS", "KEYPOINT_HEAD"):
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
