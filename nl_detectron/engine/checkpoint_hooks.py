"""Hooks that choose which checkpoints a training keeps: the last ones, and the best one."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks

from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.checkpoint_files import BEST_CHECKPOINT, check_records, open_checkpoint
from nl_detectron.engine.options import RunOptions

logger = logging.getLogger("nl_detectron")


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Counts the checkpoints of the run that is resumed towards those to keep, too."""

    def before_train(self) -> None:
        """Find the checkpoints of earlier iterations."""
        super().before_train()
        if not self.max_to_keep:
            return
        number = re.compile(rf"{re.escape(self.file_prefix)}_(\d+)\.pth")
        self.recent_checkpoints = [
            str(path)
            for path in sorted(Path(self.checkpointer.save_dir).iterdir())
            if (found := number.fullmatch(path.name)) and int(found[1]) < self.trainer.start_iter
        ]


class BestCheckpointer(hooks.BestCheckpointer):
    """Stores the score with the checkpoint, so that a resumed run does not replace a better one."""

    def before_train(self) -> None:
        """Read the score of the best checkpoint of the run that is resumed."""
        path = Path(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        try:
            check_records(path)
            best = open_checkpoint(str(path)).get("best", {})
        except (OSError, ValueError):  # there is none that could be used
            return
        self.best_metric = best.get(self._val_metric)

    def after_train(self) -> None:
        """Compare the score of the last evaluation, if the training got that far."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._best_checking()

    def _best_checking(self) -> None:
        results = self.trainer.storage.latest()
        if self._val_metric not in results:
            task = self._val_metric.rpartition("/")[0]
            names = [name for name in results if name.startswith(f"{task}/")][:8]
            raise SystemExit(
                f"--keep-best must be a result of the evaluation, such as {', '.join(names)}; got "
                f"{self._val_metric}"
            )
        score, iteration = results[self._val_metric]
        best = -math.inf if self.best_metric is None else self.best_metric
        if not score > best:  # nor if it is not a number
            return
        self.best_metric, self.best_iter = score, iteration
        logger.info("Best %s so far: %.4f", self._val_metric, score)
        self._checkpointer.save(
            self._file_prefix, iteration=iteration, best={self._val_metric: float(score)}
        )


def keep_checkpoints(
    found: list[HookBase | None],
    checkpointer: StrictCheckpointer,
    cfg: CfgNode,
    options: RunOptions,
) -> list[HookBase | None]:
    """Return the stock hooks of a training with those of this module.

    Only the main process has a hook that saves checkpoints.

    Args:
        found: the stock hooks.
        checkpointer: saves the checkpoints.
        cfg: config of the run.
        options: says which checkpoints to keep.
    """
    result: list[HookBase | None] = []
    saves = any(isinstance(hook, hooks.PeriodicCheckpointer) for hook in found)
    for hook in found:
        if isinstance(hook, hooks.PeriodicCheckpointer):
            period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, options.keep_last or None
            hook = PeriodicCheckpointer(checkpointer, period, max_to_keep=keep)
        result.append(hook)
        if isinstance(hook, hooks.EvalHook) and saves and options.keep_best:
            period, prefix = cfg.TEST.EVAL_PERIOD, BEST_CHECKPOINT
            best = BestCheckpointer(period, checkpointer, options.keep_best, file_prefix=prefix)
            result.append(best)
    return result


def check_metric(metric: str, cfg: CfgNode, metrics: Mapping[str, str]) -> None:
    """Check ``RunOptions.keep_best``, as far as it is possible before the first evaluation.

    Args:
        metric: the option; "" is always right.
        cfg: config of the run.
        metrics: the main metrics of the task, as in :class:`StrictTrainer`.

    Raises:
        ValueError: there will be no such result, or only one.
    """
    if not metric:
        return
    if not cfg.DATASETS.TEST or not cfg.TEST.EVAL_PERIOD:
        raise ValueError(
            f"--keep-best {metric} needs evaluations during the training, but DATASETS.TEST is "
            f"{tuple(cfg.DATASETS.TEST)} and TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD}"
        )
    prefixes = [f"{name}/" for name in cfg.DATASETS.TEST if len(cfg.DATASETS.TEST) > 1] or [""]
    tasks = {f"{prefix}{name.split('/')[0]}/" for prefix in prefixes for name in metrics}
    if metrics and not metric.startswith(tuple(tasks)):
        allowed = ", ".join(f"{prefix}{name}" for prefix in prefixes for name in metrics)
        raise ValueError(
            f"--keep-best must be a result of the evaluation, such as {allowed}; got {metric}"
        )
