"""Train a model with and without its blocks under identical conditions, and compare the scores.

Both models start from the same weights and see the same images, with the same augmentations, in the
same order. New blocks are the identity, so the losses of the first iteration are equal, bit for bit
on a deterministic device. Any later difference comes from the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from matplotlib.figure import Figure
from torch import nn

from nl_detectron.config import without_blocks
from nl_detectron.engine.lock import run_lock
from nl_detectron.engine.options import DEFAULT_OPTIONS, RunOptions
from nl_detectron.engine.trainer import StrictTrainer

VARIANTS = {"stock": "stock", "non_local": "non-local"}
"""Names of the two models, and their labels in tables and figures."""
MEDIAN_WINDOW = 20
"""Number of iterations in the median of a loss curve, as in detectron2's log."""


class PairedTrainer(StrictTrainer):
    """Mixin for the trainer of a task: trains one of two models with identical initial weights."""

    without_blocks = staticmethod(without_blocks)

    def __init__(self, cfg: CfgNode, options: RunOptions = DEFAULT_OPTIONS, **load_options: object):
        """See :class:`StrictTrainer`.

        Raises:
            ValueError: ``SEED`` is negative, which asks for a random seed.
        """
        if cfg.SEED < 0:
            raise ValueError(
                f"SEED must be at least 0, to give both models the same weights, got {cfg.SEED}"
            )
        super().__init__(cfg, options, **load_options)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build a model whose parameters outside the blocks start as they do without blocks."""
        _seed(cfg)  # for the blocks
        model = super().build_model(cfg)
        _seed(cfg)  # everything else
        baseline = build_model(cls.without_blocks(cfg))
        model.load_state_dict(baseline.state_dict(), strict=False)
        return model


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run.

    Attributes:
        scores: the trainer's metrics by name, in percent: ``{"bbox/AP": 39.0, "segm/AP": 35.5}``;
            with several test sets, by "test set/name".
        losses: by name, one value per iteration; "total_loss" is their sum. Empty except in the
            main process.
    """

    scores: dict[str, float]
    losses: dict[str, list[float]]


def train_and_evaluate(
    cfg: CfgNode,
    trainer_class: type[PairedTrainer],
    options: RunOptions = DEFAULT_OPTIONS,
    *,
    resume: bool = False,
    **load_options: object,
) -> TrainingResult:
    """Train and evaluate one of the two models; all outputs go to ``OUTPUT_DIR``.

    Args:
        cfg: config with or without blocks.
        trainer_class: trainer of the task.
        options: how the run deals with what goes wrong.
        resume: go on from the last checkpoint in ``OUTPUT_DIR``, if there is one.
        load_options: see :class:`nl_detectron.engine.checkpoint.StrictCheckpointer`.

    Raises:
        ValueError: another run uses ``OUTPUT_DIR``, or its checkpoints are not to be resumed from.
    """
    with run_lock(cfg.OUTPUT_DIR) if comm.is_main_process() else nullcontext():
        if comm.is_main_process():
            (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
        trainer = trainer_class(cfg, options, **load_options)
        trainer.resume_or_load(resume=resume)
        trainer.train()
    storage = trainer.storage
    latest = {name: value for name, (value, _) in storage.latest().items()}
    return TrainingResult(
        scores={
            name: value
            for name, value in latest.items()
            if f"/{name}".endswith(tuple(f"/{metric}" for metric in trainer_class.metrics))
        },
        losses={
            name: [value for value, _ in history.values()]
            for name, history in storage.histories().items()
            if "loss" in name
        },
    )


def score_table(scores: Mapping[str, Mapping[str, float]], metrics: Mapping[str, str]) -> str:
    """Format scores as a table, one row per model and one column per metric.

    With two models, a third row shows their difference.

    Args:
        scores: ``TrainingResult.scores`` of each model, by its label.
        metrics: column headings, as in :class:`StrictTrainer`.
    """
    names = list(next(iter(scores.values())))
    headings = [_heading(name, metrics) for name in names]
    widths = [max(13, len(heading) + 2) for heading in headings]
    lines = [" " * 12 + "".join(f"{heading:>{n}}" for heading, n in zip(headings, widths))]
    rows = {label: [row[name] for name in names] for label, row in scores.items()}
    for label, row in rows.items():
        lines.append(f"{label:<12}" + "".join(f"{score:{n}.1f}" for score, n in zip(row, widths)))
    if len(rows) == 2:
        gains = [b - a for a, b in zip(*rows.values())]
        columns = "".join(f"{gain:+{n}.1f}" for gain, n in zip(gains, widths))
        lines.append(f"{'difference':<12}{columns}")
    return "\n".join(lines)


def draw_losses(path: Path, losses: Mapping[str, Sequence[float]]) -> None:
    """Plot the loss of several models: each value, and the running median.

    Args:
        path: PNG file to write.
        losses: total loss of every iteration of each model, by its label.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, (label, values) in enumerate(losses.items()):
        color = f"C{index}"
        medians = [
            np.median(values[max(0, i - MEDIAN_WINDOW) : i]) for i in range(1, len(values) + 1)
        ]
        axes.plot(values, color=color, alpha=0.2, linewidth=1)
        axes.plot(medians, color=color, label=label)
    axes.set(xlabel="iteration", ylabel=f"total loss (median of {MEDIAN_WINDOW} iterations)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _heading(name: str, metrics: Mapping[str, str]) -> str:
    metric = next(metric for metric in metrics if f"/{name}".endswith(f"/{metric}"))
    return " ".join([*filter(None, [name.removesuffix(metric).rstrip("/")]), metrics[metric]])


def _seed(cfg: CfgNode) -> None:
    seed_all_rng(cfg.SEED + comm.get_rank())
