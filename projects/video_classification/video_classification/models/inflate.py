"""Initialize video networks from image networks (Sec. 4.1 of the paper).

A kernel over t frames is t copies of the image kernel, each divided by t. On a static video the
network then computes what it did on the image, except near the first and last frames, where
convolutions see padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nl_detectron.non_local import find_blocks
from nl_detectron.weights import convert, load
from nl_detectron.weights.names import check_tensors

from .resnet3d import ResNet3d

_RESNET = re.compile(r"^(?:backbone\.(?:bottom_up\.)?)?((?:stem|res\d)\..*)")


def inflate(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Repeat kernels of 2-D convolutions, or of 3-D ones over a single frame, over time.

    Args:
        weights: tensors by their names in the video network.
        like: the state dict of that network; tensors of other shapes are not changed.
    """
    inflated = {}
    for name, weight in weights.items():
        if name in like and like[name].dim() == 5:
            frames = like[name].shape[2]
            weight = weight.unsqueeze(2) if weight.dim() == 4 else weight
            if weight.shape[2] == 1:
                weight = weight.repeat(1, 1, frames, 1, 1) / frames
        inflated[name] = weight
    return inflated


def load_image_weights(backbone: ResNet3d, path: str | Path, dialect: str) -> None:
    """Load the weights of an image classifier or detector with the same ResNet.

    Non-local blocks keep their initial values; what is not part of the ResNet is left out. The
    config must match what the weights were trained with: the order and scale of colors, and
    ``STRIDE_IN_1X1`` (``nl-detectron convert`` prints both).

    Args:
        backbone: the network to load them into.
        path: file, see :func:`nl_detectron.weights.load`.
        dialect: of its keys, one of ``nl_detectron.weights.DIALECTS``: "torchvision", "timm",
            "detectron2", or "caffe2" for what detectron2 has from Detectron.

    Raises:
        ValueError: the file holds another network.
    """
    converted = convert(load(path)[0], dialect, "nl_detectron").state
    resnet = {m[1]: tensor for name, tensor in converted.items() if (m := _RESNET.match(name))}
    own = {
        name: tensor
        for name, tensor in backbone.state_dict().items()
        if not name.startswith(tuple(f"{block}." for block in find_blocks(backbone)))
    }
    weights = inflate(resnet, own)
    check_tensors(str(path), weights, own)
    backbone.load_state_dict({n: t for n, t in weights.items() if n in own}, strict=False)
