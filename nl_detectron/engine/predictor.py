"""Inference with a model: build it from a config, load all of its weights, and run it on images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2 import engine
from detectron2.config import CfgNode
from torch import nn

from nl_detectron.config import PREDICTORS
from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.frames import Frame, Images
from nl_detectron.engine.optimize import optimize

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """An image or a clip: what a model is run on, and what its attention is drawn on.

    Attributes:
        inputs: of the model, which takes a list of them.
        size: H, W of the image, or of the frames of the video.
        input_size: H, W of what the network sees of it, before padding.
        title: names the image, or the video and the clip.
        pictures: returns frames (H, W, 3), uint8 in RGB, by their indices in the clip.
        clip: for a clip, the number of each frame in its video.
        frame: index into ``clip`` of the frame to query.
    """

    inputs: dict[str, Any]
    size: tuple[int, ...]
    input_size: tuple[int, ...]
    title: str
    pictures: Callable[[Sequence[int]], Sequence[np.ndarray]]
    clip: Sequence[int] = ()
    frame: int = 0


def build_predictor(cfg: CfgNode, weights: str | None = None, fast: str | None = None) -> Any:
    """Return a :class:`Predictor`, or what a project registered for its models.

    A class that is registered in :data:`nl_detectron.config.PREDICTORS` has these members of
    :class:`Predictor`: ``model``, ``open``, ``sample`` and ``frame_stride``.

    Raises:
        ValueError: see :class:`Predictor`; also ``fast`` for a model of a project.
    """
    registered = PREDICTORS.get(cfg.MODEL.META_ARCHITECTURE)
    if registered is None:
        return Predictor(cfg, weights, fast)
    if fast:
        raise ValueError(f"only detectors can be fast, got {cfg.MODEL.META_ARCHITECTURE}")
    return registered(cfg, weights)


class Predictor(engine.DefaultPredictor):
    """detectron2's predictor for BGR images (H, W, 3), which requires a complete set of weights."""

    model: Any
    open = Images  # finds the images that a user names

    def __init__(self, cfg: CfgNode, weights: str | None = None, fast: str | None = None):
        """Build the model and load its weights.

        Args:
            cfg: config of the model; it is not modified.
            weights: checkpoint; default: ``MODEL.WEIGHTS``. "" keeps the initial values.
            fast: "fp32" or "bf16" to optimize the model,
                see :func:`~nl_detectron.engine.optimize.optimize_for_inference`.

        Raises:
            ValueError: the config does not build a model, the weights do not match it exactly, or
                it cannot be optimized.
        """
        weights = cfg.MODEL.WEIGHTS if weights is None else weights
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""  # the stock class ignores missing parameters
        with model_errors():
            super().__init__(cfg)
        load_weights(self.model, weights)
        self.model = optimize(self.model, fast)

    def network_input(self, image: np.ndarray) -> dict[str, Any]:
        """Return the input of ``model`` for an image, to run the model without this class."""
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": pixels, "height": height, "width": width}

    def sample(self, frame: Frame) -> Sample:
        """Prepare an image."""
        inputs, size = self.network_input(frame.image), frame.image.shape[:2]
        picture = frame.image[:, :, ::-1]
        return Sample(inputs, size, inputs["image"].shape[1:], frame.name, lambda _: [picture])

    def frame_stride(self, block: str) -> int:
        """Return the stride in time of a block's map, by the name of the block."""
        return 1


def load_weights(model: nn.Module, weights: str) -> None:
    """Load all weights of a model; "" keeps its initial values, and warns.

    Raises:
        ValueError: the weights do not match the model exactly.
    """
    if not weights:
        logger.warning("No weights are given: the model keeps its random initial values.")
    StrictCheckpointer(model, complete=True).load(weights)


@contextmanager
def model_errors() -> Iterator[None]:
    """Raise a ``ValueError`` for a config that no model can be built from."""
    try:
        yield
    except (AssertionError, KeyError) as error:  # KeyError: not in the registry
        raise ValueError(f"the config does not build a model: {error!r}") from error
