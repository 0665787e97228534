"""Models in use: built from a config, with all of their weights, and run on images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2 import engine
from detectron2.config import CfgNode

from nl_detectron.engine.checkpoint import StrictCheckpointer

logger = logging.getLogger(__name__)


class Predictor(engine.DefaultPredictor):
    """detectron2's predictor for BGR images (H, W, 3), strict about the weights it loads."""

    def __init__(self, cfg: CfgNode, weights: str | None = None):
        """Build the model and load its weights.

        Args:
            cfg: is not changed.
            weights: checkpoint; without it, the config's. "" leaves the model at its initial
                values.

        Raises:
            ValueError: no model can be built from ``cfg``; or the weights lack a part of it, or
                hold what it has no place for.
        """
        weights = cfg.MODEL.WEIGHTS if weights is None else weights
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""  # stock would load any, whatever they lack
        with model_errors():
            super().__init__(cfg)
        if not weights:
            logger.warning("No weights are given: the model has its initial, random values.")
        StrictCheckpointer(self.model, complete=True).load(weights)

    def network_input(self, image: np.ndarray) -> dict[str, Any]:
        """The input of ``model`` for an image, to run it without this class."""
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": pixels, "height": height, "width": width}


@contextmanager
def model_errors() -> Iterator[None]:
    """Report a config that no model can be built from as a ``ValueError``."""
    try:
        yield
    except (AssertionError, KeyError) as error:  # KeyError: a name that no registry knows
        raise ValueError(f"no model can be built from the config: {error!r}") from error
