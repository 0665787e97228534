"""detectron2's trainer with strict loading; subclasses add what is specific to a task."""

from __future__ import annotations

import argparse
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from detectron2 import engine
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.checkpoint_files import check_nothing_is_overwritten
from nl_detectron.engine.options import DEFAULT_OPTIONS, RunOptions
from nl_detectron.engine.predictor import model_errors
from nl_detectron.engine.step import TrainingStep

logger = logging.getLogger("nl_detectron")


class StrictTrainer(engine.DefaultTrainer):
    """``DefaultTrainer`` with a strict checkpointer, on GPUs or in several CPU processes.

    Attributes:
        metrics: results to compare models by: dict from their names in metrics.json to their labels
            in tables, such as ``{"bbox/AP": "box AP"}``.
    """

    metrics: ClassVar[Mapping[str, str]] = {}

    def __init__(self, cfg: CfgNode, options: RunOptions = DEFAULT_OPTIONS, **load_options: Any):
        """See ``DefaultTrainer``; ``load_options`` are passed to :class:`StrictCheckpointer`."""
        self.options = options
        self.load_options = load_options
        step = functools.partial(
            TrainingStep,
            parts=cfg.SOLVER.get("ACCUMULATE", 1),
            mixed_precision=cfg.SOLVER.AMP.ENABLED,
            max_nonfinite=options.max_nonfinite,
            output_dir=cfg.OUTPUT_DIR,
        )
        with _replaced_parts(cfg.MODEL.DEVICE, step):
            super().__init__(cfg)

    @classmethod
    def backbone_prefix(cls, model: nn.Module) -> str:
        """Return the prefix of the parameters that a pretrained backbone provides."""
        return ""

    @classmethod
    def model_metadata(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return JSON-compatible metadata to store with the weights."""
        return {}

    @classmethod
    def build_checkpointer(
        cls, cfg: CfgNode, model: nn.Module, **options: Any
    ) -> StrictCheckpointer:
        """Build the checkpointer of a model; options as in :class:`StrictCheckpointer`."""
        prefix = cls.backbone_prefix(model)
        return StrictCheckpointer(model, cfg.OUTPUT_DIR, backbone_prefix=prefix, **options)

    def build_hooks(self) -> list:
        """Create the checkpointer, which is first needed here, and build the stock hooks."""
        self.checkpointer = self.build_checkpointer(
            self.cfg,
            self._trainer.model,
            metadata=self.model_metadata(self.cfg),
            trainer=weakref.proxy(self),
            **self.load_options,
        )
        return super().build_hooks()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the model.

        detectron2 0.6 forgets the state of the optimizer, without which a resumed training differs
        from an uninterrupted one.
        """
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; that of older checkpoints has no optimizer."""
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])

    def resume_or_load(self, resume: bool = True) -> None:
        """See ``DefaultTrainer``.

        Raises:
            ValueError: without ``resume``, if ``OUTPUT_DIR`` has the checkpoints of a training.
        """
        if not resume and comm.is_main_process():
            check_nothing_is_overwritten(self.cfg.OUTPUT_DIR)
        super().resume_or_load(resume)

    @classmethod
    def dry_run(cls, cfg: CfgNode, resume: bool, **load_options: Any) -> nn.Module:
        """Build the model and load its weights on the CPU, to find errors before training starts.

        Raises:
            ValueError: the model cannot be built, or the weights do not fit.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        logging.disable(logging.WARNING)  # training logs them again
        try:
            with model_errors():
                model = cls.build_model(cfg)
            checkpointer = cls.build_checkpointer(cfg, model, **load_options)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        finally:
            logging.disable(logging.NOTSET)
        return model


def setup_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set up logging and seeds as detectron2 does, in every process."""
    engine.default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="nl_detectron")
    logger.info("Device: %s", cfg.MODEL.DEVICE)


@contextmanager
def _replaced_parts(device: str, step: Callable[..., TrainingStep]) -> Iterator[None]:
    """Let ``DefaultTrainer`` take our steps, and on the CPU wrap a model for several processes.

    It passes the local rank to ``DistributedDataParallel`` as a GPU index, which is an error on the
    CPU. The only way to change either is to patch what it calls.
    """
    module = engine.defaults
    replaced: dict[str, Callable] = {"SimpleTrainer": step, "AMPTrainer": step}
    if device == "cpu":
        replaced["create_ddp_model"] = functools.partial(module.create_ddp_model, device_ids=None)
    stock = {name: getattr(module, name) for name in replaced}
    try:
        vars(module).update(replaced)
        yield
    finally:
        vars(module).update(stock)
