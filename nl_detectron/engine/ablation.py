"""Do the blocks help? A detector and its stock twin, trained alike, and their scores compared.

Twins start with the same stock weights, see the same images with the same augmentations in the same
order, and their blocks begin as the identity: so the losses of their first iteration are equal, to
the last bit where the device is deterministic. Whatever differs later is the blocks' doing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from matplotlib.figure import Figure
from torch import nn

from nl_detectron.config import without_blocks
from nl_detectron.engine.trainer import Trainer

LABELS = {"stock": "stock", "non_local": "non-local"}
"""Names of the twins, and how to call them in tables and pictures."""
TASK_LABELS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}
WINDOW = 20
"""Iterations whose median a loss curve shows; detectron2's log shows the same."""


class TwinTrainer(Trainer):
    """A trainer that starts as the trainer of the config's stock twin does."""

    def __init__(self, cfg: CfgNode, **load_options: Any):
        """See :class:`Trainer`.

        Raises:
            ValueError: ``SEED`` is negative, which stands for a random one.
        """
        if cfg.SEED < 0:
            raise ValueError(f"SEED must be 0 or more, or twins would not be alike; got {cfg.SEED}")
        super().__init__(cfg, **load_options)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The stock model, with the initial values that the stock twin's parameters have."""
        _seed(cfg)  # of the blocks
        model = super().build_model(cfg)
        _seed(cfg)  # of all the rest
        stock = build_model(without_blocks(cfg))
        model.load_state_dict(stock.state_dict(), strict=False)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """The stock loader; from here on both twins draw the same numbers."""
        _seed(cfg)  # of the images' order, their augmentations, and what the losses sample
        return super().build_train_loader(cfg)


@dataclass(frozen=True)
class Run:
    """What a training gave.

    Attributes:
        ap: AP in percent by task, such as ``{"bbox": 39.0, "segm": 35.5}``; where there are several
            test sets, by "test set/task".
        losses: by name, one value an iteration; "total_loss" is their sum. Empty in all processes
            but the main one.
    """

    ap: dict[str, float]
    losses: dict[str, list[float]]


def train_twin(
    cfg: CfgNode, trainer_class: type[TwinTrainer] = TwinTrainer, **load_options: Any
) -> Run:
    """Train and evaluate one twin; its config, log, checkpoints and results go to ``OUTPUT_DIR``.

    Args:
        cfg: a config with blocks, or its :func:`nl_detectron.config.without_blocks`.
        trainer_class: may be replaced, for another optimizer for example.
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
        ap={name[:-3]: value for name, value in latest.items() if name.endswith("/AP")},
        losses={
            name: [value for value, _ in history.values()]
            for name, history in storage.histories().items()
            if "loss" in name
        },
    )


def ap_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out AP, one row a twin and one column a task; below two rows, their difference.

    Args:
        results: of each twin by its label, ``Run.ap``.
    """
    tasks = list(next(iter(results.values())))
    labels = [_task_label(task) for task in tasks]
    widths = [max(13, len(label) + 2) for label in labels]
    lines = [" " * 12 + "".join(f"{label:>{n}}" for label, n in zip(labels, widths))]
    rows = {twin: [ap[task] for task in tasks] for twin, ap in results.items()}
    for twin, row in rows.items():
        lines.append(f"{twin:<12}" + "".join(f"{ap:{n}.1f}" for ap, n in zip(row, widths)))
    if len(rows) == 2:
        gains = [b - a for a, b in zip(*rows.values())]
        cells = "".join(f"{gain:+{n}.1f}" for gain, n in zip(gains, widths))
        lines.append(f"{'difference':<12}{cells}")
    return "\n".join(lines)


def draw_losses(path: Path, losses: Mapping[str, Sequence[float]]) -> None:
    """Draw loss curves into one picture: each value, and the running median of some.

    Args:
        path: PNG file to write.
        losses: of each twin by its label, the total loss of every iteration.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, (label, values) in enumerate(losses.items()):
        colour = f"C{index}"
        medians = [np.median(values[max(0, i - WINDOW) : i]) for i in range(1, len(values) + 1)]
        axes.plot(values, color=colour, alpha=0.2, linewidth=1)
        axes.plot(medians, color=colour, label=label)
    axes.set(xlabel="iteration", ylabel=f"total loss (median of {WINDOW} iterations)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _task_label(name: str) -> str:
    *test_set, task = name.rsplit("/", 1)
    return " ".join([*test_set, TASK_LABELS[task]])


def _seed(cfg: CfgNode) -> None:
    seed_all_rng(cfg.SEED + comm.get_rank())
