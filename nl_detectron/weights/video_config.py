"""The config file that builds a converted network for video."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from nl_detectron.config import STAGES, default_config
from nl_detectron.weights.blocks import OPTIONS, Block
from nl_detectron.weights.convert import Conversion
from nl_detectron.weights.dialects import DIALECTS, POOLING
from nl_detectron.weights.names import block_places

# Frames and stride of a clip in the name of a file; mmaction2 appends the number of clips.
_CLIP = re.compile(r"(?<![\dx])(\d{1,3})x(\d{1,2})(?:x1)?(?![\dx])")


def video_config(result: Conversion, source: str, checkpoint: str, weights: str) -> str:
    """Return a YAML config for ``projects/video_classification``.

    Of detectron2's keys and those of non-local blocks, only other values than the defaults are
    written. The clip is that in the file's name, such as I3D_8x8_R50.pyth.

    Args:
        result: of the conversion to our names.
        source: dialect of the checkpoint.
        checkpoint: the file that was converted.
        weights: the file that the result is saved in, for ``MODEL.WEIGHTS``.

    Raises:
        ValueError: not a whole network for video, or options of it that are not known.
    """
    name = Path(checkpoint).name
    if not result.video:
        raise ValueError(
            f"{name} is not a whole network for video: there is no config to write for it"
        )
    if POOLING not in result.video:
        choices = ", ".join(f"{k} {v}".rstrip() for k, v in DIALECTS[source].poolings.items())
        raise ValueError(
            f"{name}: the weights do not show {POOLING}, but give other scores with another; give "
            f"it in pooling (--pooling), as the network was trained: {choices}"
        )
    builder = "build_non_local_resnet3d_backbone" if result.blocks else "build_resnet3d_backbone"
    keys = {
        "MODEL.META_ARCHITECTURE": "VideoClassifier",
        "MODEL.WEIGHTS": weights,
        "MODEL.BACKBONE.NAME": builder,
        "MODEL.BACKBONE.FREEZE_AT": 0,
        **result.video,
        **_block_keys(result.blocks),
    }
    comment = f"# {name}, converted from {source} by nl-detectron convert"
    if clip := _CLIP.search(name):
        keys |= {"INPUT.CLIP.NUM_FRAMES": int(clip[1]), "INPUT.CLIP.STRIDE": int(clip[2])}
        comment += "; INPUT.CLIP is that of its name"
    else:
        comment += "; INPUT.CLIP is not known: the default"
    text = yaml.safe_dump(_nested(keys), sort_keys=False, default_flow_style=None)
    return f"{comment}\n{text}VERSION: 2\n"


def _block_keys(blocks: dict[str, Block]) -> dict[str, Any]:
    """Return the keys of ``MODEL.NON_LOCAL``."""
    if not blocks:
        return {}
    first = next(iter(blocks.values()))
    known = {option: first.options.get(option) for option in OPTIONS if first.depends_on(option)}
    if unknown := [option for option, value in known.items() if value is None]:
        raise ValueError(
            f"the weights do not show {', '.join(unknown)} of the non-local blocks: give what they "
            f"were trained with in options (--block {unknown[0]}=...)"
        )
    for name, block in blocks.items():
        if any(block.options.get(option) != value for option, value in known.items()):
            raise ValueError(f"the options of {name} are not those of {next(iter(blocks))}")
    places = block_places(blocks)
    keys: dict[str, Any] = {
        f"AFTER_BLOCKS.{stage.upper()}": places.get(stage, []) for stage in STAGES
    }
    keys |= {option.upper(): value for option, value in known.items()}
    return {f"MODEL.NON_LOCAL.{key}": value for key, value in keys.items()}


def _nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries of the keys that do not have their default values."""
    config: dict[str, Any] = {}
    defaults = default_config()
    for key, value in keys.items():
        value = list(value) if isinstance(value, tuple) else value
        if not key.startswith(("MODEL.VIDEO.", "INPUT.CLIP.")):
            default = attrgetter(key)(defaults)
            if value == (list(default) if isinstance(default, tuple) else default):
                continue
        *path, leaf = key.split(".")
        node = config
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = value
    return config
