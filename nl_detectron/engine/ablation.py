"""Do the blocks help? A model with and without them, trained alike, and their scores compared.

Both start with the same weights and see the same images with the same augmentations in the same
order, and new blocks are the identity: so the losses of the first iteration are equal, to the last
bit where the device is deterministic. Whatever differs later is the blocks' doing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from nl_detectron.engine.trainer import StrictTrainer

LABELS = {"stock": "stock", "non_local": "non-local"}
"""Names of the two models, and what tables and figures call them."""
WINDOW = 20
"""Iterations whose median a loss curve shows, as detectron2's log does."""


class PairedTrainer(StrictTrainer):
    """Trains one of two models that start alike; to be mixed into the trainer of a task."""

    without_blocks = staticmethod(without_blocks)

    def __init__(self, cfg: CfgNode, **load_options: object):
        """See :class:`StrictTrainer`.

        Raises:
            ValueError: ``SEED`` is negative, which asks for a random one.
        """
        if cfg.SEED < 0:
            raise ValueError(
                f"SEED must be 0 or more, or the two models would not start alike; got {cfg.SEED}"
            )
        super().__init__(cfg, **load_options)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build a model whose parameters outside of blocks start as they do without blocks."""
        _seed(cfg)  # the blocks
        model = super().build_model(cfg)
        _seed(cfg)  # all the rest
        baseline = build_model(cls.without_blocks(cfg))
        model.load_state_dict(baseline.state_dict(), strict=False)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """Build the loader; from here on both models draw the same random numbers."""
        _seed(cfg)  # the order of the images, their augmentations, and what the losses sample
        return super().build_train_loader(cfg)


@dataclass(frozen=True)
class Run:
    """The outcome of a training.

    Attributes:
        scores: the trainer's metrics, by name: ``{"bbox/AP": 39.0, "segm/AP": 35.5}``, in percent;
            with several test sets, by "test set/name".
        losses: by name, one value an iteration; "total_loss" is their sum. Empty in all processes
            but the main one.
    """

    scores: dict[str, float]
    losses: dict[str, list[float]]


def train_and_evaluate(
    cfg: CfgNode, trainer_class: type[PairedTrainer], **load_options: object
) -> Run:
    """Train one of the two models; config, log, checkpoints and results go to ``OUTPUT_DIR``.

    Args:
        cfg: with blocks, or without.
        trainer_class: of the task.
        load_options: of :class:`nl_detectron.engine.checkpoint.StrictCheckpointer`.
    """
    if comm.is_main_process():
        output = Path(cfg.OUTPUT_DIR)
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(cfg.dump())
    trainer = trainer_class(cfg, **load_options)
    trainer.resume_or_load(resume=False)
    trainer.train()
    storage = trainer.storage
    latest = {name: value for name, (value, _) in storage.latest().items()}
    return Run(
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
    """Lay out scores, one row a model and one column a metric; below two rows, their difference.

    Args:
        scores: of each model by its label, ``Run.scores``.
        metrics: what to call them, as in :class:`StrictTrainer`.
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
    """Draw loss curves into one figure: each value, and their running median.

    Args:
        path: PNG file to write.
        losses: of each model by its label, the total loss of every iteration.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, (label, values) in enumerate(losses.items()):
        color = f"C{index}"
        medians = [np.median(values[max(0, i - WINDOW) : i]) for i in range(1, len(values) + 1)]
        axes.plot(values, color=color, alpha=0.2, linewidth=1)
        axes.plot(medians, color=color, label=label)
    axes.set(xlabel="iteration", ylabel=f"total loss (median of {WINDOW} iterations)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _heading(name: str, metrics: Mapping[str, str]) -> str:
    metric = next(metric for metric in metrics if f"/{name}".endswith(f"/{metric}"))
    return " ".join([*filter(None, [name.removesuffix(metric).rstrip("/")]), metrics[metric]])


def _seed(cfg: CfgNode) -> None:
    seed_all_rng(cfg.SEED + comm.get_rank())
