"""detectron2's trainer without its blind spots; subclasses say what it must know of a task."""

from __future__ import annotations

import argparse
import functools
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from detectron2 import engine
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.predictor import model_errors

logger = logging.getLogger("nl_detectron")


class StrictTrainer(engine.DefaultTrainer):
    """``DefaultTrainer`` with a strict checkpointer, on GPUs or in several CPU processes.

    Attributes:
        metrics: results to compare models by, such as ``{"bbox/AP": "box AP"}``: their names in
            metrics.json, and what tables call them.
    """

    metrics: ClassVar[Mapping[str, str]] = {}

    def __init__(self, cfg: CfgNode, **load_options: Any):
        """See ``DefaultTrainer``; options are those of :class:`StrictCheckpointer`."""
        self.load_options = load_options
        with _ddp_on(cfg.MODEL.DEVICE):
            super().__init__(cfg)

    @classmethod
    def backbone_prefix(cls, model: nn.Module) -> str:
        """Return what the names of the parameters begin with that a pretrained backbone has."""
        return ""

    @classmethod
    def model_metadata(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return what is to be kept with the weights: lists, numbers and text, by name."""
        return {}

    @classmethod
    def build_checkpointer(
        cls, cfg: CfgNode, model: nn.Module, **options: Any
    ) -> StrictCheckpointer:
        """Build a checkpointer of a model; options are those of :class:`StrictCheckpointer`."""
        prefix = cls.backbone_prefix(model)
        return StrictCheckpointer(model, cfg.OUTPUT_DIR, backbone_prefix=prefix, **options)

    def build_hooks(self) -> list:
        """Stock hooks, in the last step of ``__init__`` and the first that needs a checkpointer."""
        self.checkpointer = self.build_checkpointer(
            self.cfg,
            self._trainer.model,
            metadata=self.model_metadata(self.cfg),
            trainer=weakref.proxy(self),
            **self.load_options,
        )
        return super().build_hooks()

    @classmethod
    def rehearse(cls, cfg: CfgNode, resume: bool, **load_options: Any) -> nn.Module:
        """Build the model and load its weights on the CPU, to see whether a training could start.

        Raises:
            ValueError: it could not.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        logging.disable(logging.WARNING)  # the training will log all of it
        try:
            with model_errors():
                model = cls.build_model(cfg)
            checkpointer = cls.build_checkpointer(cfg, model, **load_options)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        finally:
            logging.disable(logging.NOTSET)
        return model


def start_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set up logging and seeds as detectron2 does, in every process."""
    engine.default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="nl_detectron")
    logger.info("Device: %s", cfg.MODEL.DEVICE)


@contextmanager
def _ddp_on(device: str) -> Iterator[None]:
    """Within, ``DefaultTrainer`` can prepare a model on the CPU for several processes, too.

    It hands the local rank to ``DistributedDataParallel`` as a GPU number, which is refused there,
    and leaves no other place to say so than the function that it calls.
    """
    stock = engine.defaults.create_ddp_model
    if device == "cpu":
        engine.defaults.create_ddp_model = functools.partial(stock, device_ids=None)
    try:
        yield
    finally:
        engine.defaults.create_ddp_model = stock
