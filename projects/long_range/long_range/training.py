"""How the demo trains: configs with and without blocks, the optimizer, and a line of progress."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.events import EventWriter, get_event_storage

from nl_detectron.config import load_config, without_blocks
from nl_detectron.engine.ablation import LABELS
from nl_detectron.engine.coco.trainer import PairedCocoTrainer

from .dataset import check_choice

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG_NAMES = {"instances": "mask_rcnn_R_50_FPN_NL", "keypoints": "keypoint_rcnn_R_50_FPN_NL"}


def variant_config(
    kind: str, variant: str, *, output: Path, seed: int, budget: float = 1.0
) -> CfgNode:
    """Reads the config of one of the two models.

    Args:
        kind: a key of `CONFIG_NAMES`.
        variant: a key of `LABELS`.
        output: folder for checkpoints, metrics and predictions.
        seed: for the initial weights and the order of the pictures.
        budget: iterations, as a multiple of what the config says.

    Returns:
        The config.

    Raises:
        ValueError: unknown ``kind`` or ``variant``, or a budget of less than one iteration.
    """
    check_choice("kind", kind, CONFIG_NAMES)
    check_choice("variant", variant, LABELS)
    cfg = load_config(CONFIGS / f"{CONFIG_NAMES[kind]}.yaml")
    if variant == "stock":
        cfg = without_blocks(cfg)
    cfg.SOLVER.MAX_ITER = round(cfg.SOLVER.MAX_ITER * budget)
    if cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"budget must give at least one iteration, got {budget}")
    cfg.SOLVER.WARMUP_ITERS = cfg.SOLVER.MAX_ITER // 10
    cfg.SEED = seed
    cfg.OUTPUT_DIR = str(output)
    return cfg


class AdamWTrainer(PairedCocoTrainer):
    """Trains with AdamW, which from random weights needs far fewer steps than SGD."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """AdamW in place of SGD."""
        params = get_default_optimizer_params(
            model, base_lr=cfg.SOLVER.BASE_LR, weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM
        )
        return torch.optim.AdamW(params, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict:
        """The stock test; pycocotools' printed tables go to a file."""
        with open(Path(cfg.OUTPUT_DIR) / "coco_tables.txt", "w") as file:
            with contextlib.redirect_stdout(file):
                return super().test(cfg, model, evaluators)

    def build_writers(self) -> list[EventWriter]:
        """The stock writers and a line of progress."""
        return [*super().build_writers(), Progress(self.max_iter)]


class Progress(EventWriter):
    """Prints one line, over and over: how far the training is and how long it still takes."""

    def __init__(self, max_iter: int):
        self._max_iter = max_iter
        self._start = time.monotonic()

    def write(self) -> None:
        """Called by the stock ``PeriodicWriter``."""
        storage = get_event_storage()
        done = storage.iter + 1
        if done > self._max_iter:  # once more after the end, for what the evaluation logged
            return
        left = (time.monotonic() - self._start) / done * (self._max_iter - done)
        loss = storage.history("total_loss").median(20)
        print(
            f"\r  iteration {done}/{self._max_iter}, loss {loss:.2f}, {left / 60:.1f} min left ",
            end="" if done < self._max_iter else "\n",
            flush=True,
        )
