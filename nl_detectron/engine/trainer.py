"""detectron2's trainer with strict loading; subclasses add what is specific to a task."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import socket
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from detectron2 import engine
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.checkpoint_files import check_nothing_is_overwritten
from nl_detectron.engine.checkpoint_hooks import check_metric, keep_checkpoints
from nl_detectron.engine.failures import explained_errors, is_lost
from nl_detectron.engine.history import History, drop_later_lines
from nl_detectron.engine.loader import TrainLoader, name_files
from nl_detectron.engine.options import DEFAULT_OPTIONS, RunOptions
from nl_detectron.engine.precise_bn import SameBatchesPreciseBN
from nl_detectron.engine.predictor import model_errors
from nl_detectron.engine.randomness import seed_generators
from nl_detectron.engine.signals import StopOnSignal
from nl_detectron.engine.step import TrainingStep
from nl_detectron.engine.training_model import prepare_for_training

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
    _hooks: list[engine.HookBase]

    def __init__(self, cfg: CfgNode, options: RunOptions = DEFAULT_OPTIONS, **load_options: Any):
        """See ``DefaultTrainer``; ``load_options`` are passed to :class:`StrictCheckpointer`."""
        check_metric(options.keep_best, cfg, self.metrics)
        self.options = options
        self.load_options = load_options
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._stop_on_signal = StopOnSignal()
        step = functools.partial(
            TrainingStep,
            parts=cfg.SOLVER.get("ACCUMULATE", 1),
            mixed_precision=cfg.SOLVER.AMP.ENABLED,
            max_nonfinite=options.max_nonfinite,
            output_dir=cfg.OUTPUT_DIR,
        )
        prepare = functools.partial(prepare_for_training, options=options)
        with _replaced_parts(cfg.MODEL.DEVICE, step, prepare):
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
        stock = keep_checkpoints(super().build_hooks(), self.checkpointer, self.cfg, self.options)
        found = [
            History(),
            *(
                SameBatchesPreciseBN(
                    test.EVAL_PERIOD, self.model, hook._data_loader, test.PRECISE_BN.NUM_ITER
                )
                if isinstance(hook, hooks.PreciseBN)
                else hook
                for hook in stock
            ),
        ]
        evaluation = next(i for i, hook in enumerate(found) if isinstance(hook, hooks.EvalHook))
        found.insert(evaluation, self._stop_on_signal)
        return found

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

    def run_step(self) -> None:
        """Take a step; see :meth:`train` for errors."""
        with explained_errors():
            super().run_step()

    def after_step(self) -> None:
        """Run the hooks; see :meth:`train` for errors."""
        with explained_errors():
            super().after_step()

    def after_train(self) -> None:
        """Run the hooks, but do not evaluate after a training that has failed.

        One that was resumed after its end has not taken one step more.
        """
        if self.iter < self.max_iter:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        self.iter = min(self.iter, self.max_iter)
        with explained_errors():
            super().after_train()

    def train(self) -> Any:
        """Train; whatever ends it early, the state after the last complete iteration is saved.

        Raises:
            SystemExit: a signal ended the training, or an error that a sentence can explain: a data
                loader or another process was lost, too many steps were not finite, or a file cannot
                be written. Other errors are raised as they are.
        """
        with self._stop_on_signal:
            self._processes = comm.all_gather((socket.gethostname(), os.getpid()))
            try:
                results = super().train()
                self._name_unreadable_files()
                return results
            except (Exception, SystemExit) as error:
                if isinstance(error, SystemExit) and isinstance(error.code, int):
                    raise
                saved = self._save_after_failure()
                if isinstance(error, SystemExit):
                    # If it is a checkpoint that could not be saved, both are the same.
                    sentences = dict.fromkeys(filter(None, [str(error), saved]))
                    raise SystemExit(". ".join(sentences)) from error
                if saved:
                    logger.error(saved)
                raise

    def _name_unreadable_files(self) -> None:
        found = getattr(self.data_loader, "unreadable", {}).values()
        names = sorted(set().union(*comm.gather([str(error) for error in found])))
        if names:
            logger.warning("Files not used for training (%d): %s", len(names), name_files(names))

    def stop(self, reason: str, code: int) -> NoReturn:
        """Save the state after this iteration, and exit."""
        if comm.is_main_process():
            path = self._save(self.iter)
            logger.warning("%s after iteration %s. %s", reason, self.iter, _how_to_go_on(path))
        comm.synchronize()
        raise SystemExit(code)

    def _save(self, iteration: int) -> str:
        """Save the state after an iteration, and return the path of the file."""
        name = "model_final" if iteration + 1 == self.max_iter else f"model_{iteration:07d}"
        current, self.iter = self.iter, iteration
        try:
            self.checkpointer.save(name, iteration=iteration)
        finally:
            self.iter = current
        return os.path.join(self.cfg.OUTPUT_DIR, f"{name}.pth")

    def _save_after_failure(self) -> str:
        """Save the state after the last complete iteration; return a sentence about it, or "".

        The first process does so. If it is lost, then the second one of the same machine.
        """
        complete = self.scheduler.last_epoch - 1
        if self._trainer.updated > complete:
            return "Nothing is saved, because the weights were being updated."
        if complete < self.start_iter:
            return "No iteration was completed."
        path = os.path.join(self.cfg.OUTPUT_DIR, f"model_{complete:07d}.pth")
        self._trainer.undo_statistics()
        if comm.get_rank() == 1 and is_lost(*self._processes[0]) and not os.path.exists(path):
            self.checkpointer.save_to_disk = True
        if not self.checkpointer.save_to_disk:
            return ""
        try:
            path = self._save(complete)
        except (FloatingPointError, OSError) as error:
            return str(error)
        return f"Iteration {complete} was the last complete one. {_how_to_go_on(path)}"

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


def _how_to_go_on(path: str) -> str:
    return f"The state is saved in {path}; the same command with --resume goes on from there."


@contextmanager
def _replaced_parts(
    device: str, step: Callable[..., TrainingStep], prepare: Callable[[nn.Module], nn.Module]
) -> Iterator[None]:
    """Let ``DefaultTrainer`` take our steps, and prepare a model, for several processes on a CPU.

    It passes the local rank to ``DistributedDataParallel`` as a GPU index, which is an error on the
    CPU. The only way to change either is to patch what it calls.
    """
    module = engine.defaults
    cpu = {"device_ids": None} if device == "cpu" else {}
    create = module.create_ddp_model

    def create_ddp_model(model: nn.Module, **options: Any) -> nn.Module:
        return create(prepare(model), **{**options, **cpu})

    replaced: dict[str, Callable] = {"SimpleTrainer": step, "AMPTrainer": step}
    replaced["create_ddp_model"] = create_ddp_model
    stock = {name: getattr(module, name) for name in replaced}
    try:
        vars(module).update(replaced)
        yield
    finally:
        vars(module).update(stock)
