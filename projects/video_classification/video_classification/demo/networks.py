"""The networks of the demo, and which of its tasks they can see.

Without non-local blocks they see 21 x 21 pixels: 5 by the stem, and 4, 4 and 8 more by the 3x3
convolutions of res2, res3 and res4, which the strides before them widen. I3D sees 9 frames, 2 more
by each of its four convolutions over time; TSM, with three shifts, 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from nl_detectron.config import load_config
from nl_detectron.non_local import find_blocks

from ..config import default_video_config
from ..models import VideoClassifier
from .clips import group_size, make_clip

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo" / "tiny.yaml"
_I3D = ("MODEL.VIDEO.INFLATE", "3x1x1", "MODEL.VIDEO.STEM_KERNEL", (3, 5, 5))
_BLOCKS = ("MODEL.BACKBONE.NAME", "build_non_local_resnet3d_backbone")
NETWORKS = {
    "C2D": (),
    "I3D": _I3D,
    "TSM": ("MODEL.VIDEO.SHIFT.DIRECTION", "bidirectional"),
    "NL-space": (*_BLOCKS, "MODEL.NON_LOCAL.AXES", "space"),
    "NL-time": (*_BLOCKS, "MODEL.NON_LOCAL.AXES", "time", "MODEL.NON_LOCAL.SUBSAMPLE", 1),
    "NL-spacetime": _BLOCKS,
    "NL-I3D": (*_BLOCKS, *_I3D),
}
"""Changes to the config of C2D, by the name of a network. NL-space, NL-time and NL-spacetime are
C2D with a block that attends along these axes."""
SEEN = 1e-6
"""A network sees what changes its logits by more than this share. Rounding is below 1e-11."""


def network_config(name: str) -> CfgNode:
    """Return the config of a network, a key of `NETWORKS`; it has no data sets yet."""
    return load_config(CONFIG, NETWORKS[name], default_video_config)


def random_network(name: str, seed: int = 0) -> VideoClassifier:
    """Build a network with random weights, whose blocks are not idle, in float64."""
    torch.manual_seed(seed)
    model = build_model(network_config(name))
    for block in find_blocks(model).values():
        nn.init.ones_(block.norm.weight)
    return model.double().eval()


@torch.no_grad()
def visibility(model: VideoClassifier, tasks: Iterable[str], groups: int = 2) -> dict[str, float]:
    """Measure how much of the logits depends on what the class of each task depends on.

    That is zero, up to rounding, if logits ignore the order of frames (``order``), or add up
    contributions of single squares (the other tasks).

    Args:
        model: in evaluation mode and float64.
        tasks: keys of `CLASSES`.
        groups: number of groups of test clips to measure it on.

    Returns:
        For each task the largest value. For ``order`` that is the distance of the logits of a clip
        and the same clip backwards, relative to the logits. With two squares of colors a and b it
        is the norm of L(0, 0) - L(0, 1) - L(1, 0) + L(1, 1), relative to that of
        L(0, 0) - L(1, 1).
    """
    measured = {}
    for task in tasks:
        size = group_size(task)
        clips = [make_clip(task, "test", 0, index)[0] for index in range(groups * size)]
        batch = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
        logits = torch.cat([model(clip.double()) for clip in batch.split(1)])
        group = logits.view(groups, size, -1).unbind(1)
        if task == "order":
            difference, whole = group[0] - group[1], group[0]
        else:
            difference, whole = group[0] - group[1] - group[2] + group[3], group[0] - group[3]
        measured[task] = (difference.norm(dim=1) / whole.norm(dim=1)).max().item()
    return measured
