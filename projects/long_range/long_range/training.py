"""Training of the demo: configs with and without blocks, the optimizer, and a progress line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.events import EventWriter, get_event_storage

from nl_detectron.config import load_config, without_blocks
from nl_detectron.engine.ablation import VARIANTS
from nl_detectron.engine.coco.trainer import PairedCocoTrainer

from .dataset import check_choice

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG_NAMES = {"instances": "mask_rcnn_R_50_FPN_NL", "keypoints": "keypoint_rcnn_R_50_FPN_NL"}


def variant_config(
    kind: str, variant: str, *, output: Path, seed: int, budget: float = 1.0
) -> CfgNode:
    """Load the config of one of the two models.

    Args:
        kind: a key of `CONFIG_NAMES`.
        variant: a key of `VARIANTS`.
        output: folder for checkpoints, metrics and predictions.
        seed: seed of the initial weights and the image order.
        budget: multiple of the config's iterations.

    Returns:
        The config.

    Raises:
        ValueError: unknown ``kind`` or ``variant``, or a budget of less than one iteration.
    """
    check_choice("kind", kind, CONFIG_NAMES)
    check_choice("variant", variant, VARIANTS)
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
    """Trains with AdamW, which needs far fewer steps from scratch than SGD."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Build AdamW in place of SGD."""
        params = get_default_optimizer_params(
            model, base_lr=cfg.SOLVER.BASE_LR, weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM
        )
        return torch.optim.AdamW(params, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict:
        """Run the stock test, and redirect pycocotools' tables to a file."""
        with open(Path(cfg.OUTPUT_DIR) / "coco_tables.txt", "w") as file:
            with contextlib.redirect_stdout(file):
                return super().test(cfg, model, evaluators)

    def build_writers(self) -> list[EventWriter]:
        """Add the progress line to the stock writers."""
        return [*super().build_writers(), Progress(self.max_iter)]


class Progress(EventWriter):
    """Prints iteration, loss and remaining time on a single line."""

    def __init__(self, max_iter: int):
        self._max_iter = max_iter

    def write(self) -> None:
        """Update the line; the stock ``PeriodicWriter`` calls this."""
        storage = get_event_storage()
        done = storage.iter + 1
        if done > self._max_iter:  # the evaluation writes once more after the end
            return
        times = storage.histories().get("time")  # not of the first iterations
        left = times.median(1000) * (self._max_iter - done) if times else 0.0
        loss = storage.history("total_loss").median(20)
        print(
            f"\r  iteration {done}/{self._max_iter}, loss {loss:.2f}, {left / 60:.1f} min left ",
            end="" if done < self._max_iter else "\n",
            flush=True,
        )
