"""The configs of this package by name, as ``detectron2.model_zoo`` has detectron2's.

They are found in a clone, in an editable installation and in one from a wheel.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn

from nl_detectron.config import add_non_local_config
from nl_detectron.model_zoo.files import find_config_file, get_config_file, names

__all__ = ["find_config_file", "get", "get_config", "get_config_file", "names"]


def get_config(config_path: str, trained: bool = False) -> Any:
    """Return the config of a model.

    Args:
        config_path: its name relative to ``configs/``, such as
            "COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml".
        trained: as in detectron2, where it asks for the address of trained weights; none are
            published for these models. Without it, weights are those of the config, which are
            those of an ImageNet classifier in most.

    Returns:
        ``CfgNode`` of a .yaml, LazyConfig of a .py.

    Raises:
        RuntimeError: there is no config of this name, or ``trained`` is set.
    """
    file = get_config_file(config_path)
    if trained:
        raise RuntimeError(
            f"no trained model of {config_path} is published: leave out trained=True, and load "
            "a checkpoint of your own"
        )
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = get_cfg()
    add_non_local_config(cfg)
    cfg.merge_from_file(file, allow_unsafe=False)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build a model, and load the weights that its config names.

    Args:
        config_path: see :func:`get_config`.
        trained: see :func:`get_config`.
        device: instead of the config's; without it, the CPU where there is no CUDA device.

    Returns:
        The model, in training mode.
    """
    cfg = get_config(config_path, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if isinstance(cfg, CfgNode):
        if device is not None:
            cfg.MODEL.DEVICE = device
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model, weights = instantiate(cfg.model), cfg.train.init_checkpoint
        if device is not None:
            model = model.to(device)
    DetectionCheckpointer(model).load(weights)
    return model
