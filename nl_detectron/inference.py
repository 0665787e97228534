"""A trained detector and image files: what all tools that look at a finished model begin with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from nl_detectron.checkpoint import StrictCheckpointer
from nl_detectron.config import add_non_local_config


def load_detector(
    config_file: str, weights: str | None = None, opts: Sequence[str] = ()
) -> tuple[CfgNode, nn.Module]:
    """Build the model of a config, in evaluation mode, and load its weights.

    Args:
        config_file: YAML file.
        weights: checkpoint; without it, the config's.
        opts: config keys and values that override the file.

    Returns:
        The config, with the device that is there, and the model.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    cfg = get_cfg()
    add_non_local_config(cfg)
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(opts))
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return cfg, model


def network_input(cfg: CfgNode, image: np.ndarray) -> dict[str, Any]:
    """What a detectron2 model takes for one RGB image (H, W, 3): resized as in a test."""
    size, max_size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    resize = T.ResizeShortestEdge([size, size], max_size).get_transform(image)
    pixels = {"RGB": image, "BGR": image[:, :, ::-1]}[cfg.INPUT.FORMAT]
    resized = resize.apply_image(pixels)
    tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
    return {"image": tensor, "height": image.shape[0], "width": image.shape[1]}


def for_each_image(path: Path, work: Callable[[Path, np.ndarray], None]) -> None:
    """Call ``work`` with name and pixels, (H, W, 3) in RGB, of an image or all those of a folder.

    Files that cannot be read, and images that ``work`` refuses with a ``ValueError``, are named,
    skipped and counted.

    Raises:
        SystemExit: no image was done.
    """
    suffixes = Image.registered_extensions()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
        if not files:
            raise SystemExit(f"{path}: no image in this folder")
    skipped = 0
    for file in files:
        try:
            work(file, read_image(str(file), format="RGB"))
        except (OSError, ValueError) as error:
            print(f"skipped {file}: {error}", file=sys.stderr)
            skipped += 1
    print(f"{len(files) - skipped} images done, {skipped} skipped", flush=True)
    if skipped == len(files):
        raise SystemExit(1)
