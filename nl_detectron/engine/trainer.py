"""detectron2's trainer with strict loading; subclasses add what is specific to a task."""

from __future__ import annotations

import argparse
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from detectron2 import engine
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.checkpoint_files import check_nothing_is_overwritten
from nl_detectron.engine.checkpoint_hooks import check_metric, keep_checkpoints
from nl_detectron.engine.history import History, drop_later_lines
from nl_detectron.engine.loader import TrainLoader, name_files
from nl_detectron.engine.options import DEFAULT_OPTIONS, RunOptions
from nl_detectron.engine.precise_bn import SameBatchesPreciseBN
from nl_detectron.engine.predictor import model_errors
from nl_detectron.engine.randomness import seed_generators
from nl_detectron.engine.step import TrainingStep

logger = logging.getLogger("nl_detectron")


class StrictTrainer(engine.DefaultTrainer):
    """``DefaultTrainer`` with a strict checkpointer, on GPUs or in several CPU processes.

    Everything random in an iteration depends on the seed of the run and the number of the iteration
    alone. With a :class:`TrainLoader`, a training that is resumed is therefore the same training.

    Attributes:
        seed: of the run: ``SEED``, or a random one if that is negative.
        metrics: results to compare models by: dict from their names in metrics.json to their labels
            in tables, such as ``{"bbox/AP": "box AP"}``.
    """

    metrics: ClassVar[Mapping[str, str]] = {}
    iter: int
    max_iter: int

    def __init__(self, cfg: CfgNode, options: RunOptions = DEFAULT_OPTIONS, **load_options: Any):
        """See ``DefaultTrainer``; ``load_options`` are passed to :class:`StrictCheckpointer`."""
        check_metric(options.keep_best, cfg, self.metrics)
        self.options = options
        self.load_options = load_options
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
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
        test = self.cfg.TEST
        found = keep_checkpoints(super().build_hooks(), self.checkpointer, self.cfg, self.options)
        return [
            History(),
            *(
                SameBatchesPreciseBN(
                    test.EVAL_PERIOD, self.model, hook._data_loader, test.PRECISE_BN.NUM_ITER
                )
                if isinstance(hook, hooks.PreciseBN)
                else hook
                for hook in found
            ),
        ]

    def resume_or_load(self, resume: bool = True) -> None:
        """See ``DefaultTrainer``; the data go on where the checkpoint was saved.

        Raises:
            ValueError: without ``resume``, if ``OUTPUT_DIR`` has the checkpoints of a training.
        """
        if not resume and comm.is_main_process():
            check_nothing_is_overwritten(self.cfg.OUTPUT_DIR)
        super().resume_or_load(resume)
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.start = self.start_iter
        if resume and comm.is_main_process():
            drop_later_lines(Path(self.cfg.OUTPUT_DIR) / "metrics.json", self.start_iter)

    def before_train(self) -> None:
        """Set the loaders up, all settings being known, and run the hooks."""
        loaders = [hook._data_loader for hook in self._hooks if isinstance(hook, hooks.PreciseBN)]
        for loader in (self.data_loader, *loaders):
            if isinstance(loader, TrainLoader):
                loader.seed, loader.max_unreadable = self.seed, self.options.max_bad_images
        logger.info("Seed of the run: %d", self.seed)
        super().before_train()

    def before_step(self) -> None:
        """Run the hooks, and give the step random numbers of its own."""
        super().before_step()
        seed_generators(self.seed, self.iter, comm.get_rank())

    def after_train(self) -> None:
        """Run the hooks; one that was resumed after its end has not taken one step more."""
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def train(self) -> Any:
        """Train; see ``DefaultTrainer``."""
        results = super().train()
        found = getattr(self.data_loader, "unreadable", {}).values()
        names = sorted(set().union(*comm.gather([str(error) for error in found])))
        if names:
            logger.warning("%d files not used for training: %s", len(names), name_files(names))
        return results

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the model.

        detectron2 0.6 forgets the state of the optimizer, without which a resumed training differs
        from an uninterrupted one.
        """
        state = {**super().state_dict(), "_trainer": self._trainer.state_dict()}
        return {**state, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; that of older checkpoints has no optimizer, and no seed."""
        super().load_state_dict(state_dict)
        if self.cfg.SEED < 0:
            self.seed = state_dict.get("seed", self.seed)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])

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
