"""Inference with a model: build it from a config, load all of its weights, and run it on images."""

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
    """detectron2's predictor for BGR images (H, W, 3), which requires a complete set of weights."""

    def __init__(self, cfg: CfgNode, weights: str | None = None):
        """Build the model and load its weights.

        Args:
            cfg: config of the model; it is not modified.
            weights: checkpoint; default: ``MODEL.WEIGHTS``. "" keeps the initial values.

        Raises:
            ValueError: the config does not build a model, or the weights do not match it exactly.
        """
        weights = cfg.MODEL.WEIGHTS if weights is None else weights
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""  # the stock class ignores missing parameters
        with model_errors():
            super().__init__(cfg)
        if not weights:
            logger.warning("No weights are given: the model keeps its random initial values.")
        StrictCheckpointer(self.model, complete=True).load(weights)

    def network_input(self, image: np.ndarray) -> dict[str, Any]:
        """Return the input of ``model`` for an image, to run the model without this class."""
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": pixels, "height": height, "width": width}


@contextmanager
def model_errors() -> Iterator[None]:
    """Raise a ``ValueError`` for a config that no model can be built from."""
    try:
        yield
    except (AssertionError, KeyError) as error:  # KeyError: not in the registry
        raise ValueError(f"the config does not build a model: {error!r}") from error
