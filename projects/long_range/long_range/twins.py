"""Twins: a stock detector and the same detector with a non-local block, trained alike."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter, get_event_storage

from nl_detectron import add_non_local_config

from .dataset import check_choice

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG_NAMES = {"instances": "mask_rcnn_R_50_FPN", "keypoints": "keypoint_rcnn_R_50_FPN"}
SUFFIXES = {"stock": "", "non_local": "_NL"}
"""The twins, and what their configs' names end with."""
TASKS = {"instances": ("bbox", "segm"), "keypoints": ("bbox", "keypoints")}


def twin_config(kind: str, twin: str, *, output: Path, seed: int, budget: float = 1.0) -> CfgNode:
    """Reads the config of a twin.

    Args:
        kind: a key of `CONFIG_NAMES`.
        twin: a key of `SUFFIXES`.
        output: folder for checkpoints, metrics and predictions.
        seed: for the initial weights and the order of the pictures.
        budget: iterations, as a multiple of what the config says.

    Returns:
        The config.

    Raises:
        ValueError: unknown ``kind`` or ``twin``, or a budget of less than one iteration.
    """
    check_choice("kind", kind, CONFIG_NAMES)
    check_choice("twin", twin, SUFFIXES)
    cfg = get_cfg()
    add_non_local_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{CONFIG_NAMES[kind]}{SUFFIXES[twin]}.yaml"))
    cfg.SOLVER.MAX_ITER = round(cfg.SOLVER.MAX_ITER * budget)
    if cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"budget must give at least one iteration, got {budget}")
    cfg.SOLVER.WARMUP_ITERS = cfg.SOLVER.MAX_ITER // 10
    cfg.SEED = seed
    cfg.OUTPUT_DIR = str(output)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def build_trainer(cfg: CfgNode, kind: str) -> Trainer:
    """Returns the trainer of a twin, ready to start; the data set must be registered.

    Twins of one seed have the same stock weights (and the non-local block starts as the identity),
    see the same pictures in the same order, and so their first losses are the same, too.
    """
    stock = twin_config(kind, "stock", output=Path(cfg.OUTPUT_DIR), seed=cfg.SEED)
    seed_all_rng(cfg.SEED)
    initial_weights = build_model(stock).state_dict()
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.model.load_state_dict(initial_weights, strict=False)
    # Once more, as a larger model has taken more random numbers to build.
    seed_all_rng(cfg.SEED)
    return trainer


def train_twin(
    kind: str, twin: str, *, output: Path, seed: int, budget: float = 1.0
) -> dict[str, float]:
    """Trains a twin and evaluates it; the arguments are those of `twin_config`.

    Returns:
        AP by task, such as ``{"bbox": 98.1, "segm": 97.5}``.
    """
    output.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(twin_config(kind, twin, output=output, seed=seed, budget=budget), kind)
    trainer.train()
    latest = trainer.storage.latest()
    return {task: latest[f"{task}/AP"][0] for task in TASKS[kind]}


class Trainer(DefaultTrainer):
    """detectron2's trainer with AdamW, which from random weights needs far fewer steps than SGD."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """AdamW in place of SGD."""
        params = get_default_optimizer_params(
            model, base_lr=cfg.SOLVER.BASE_LR, weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM
        )
        return torch.optim.AdamW(params, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's measures, with the config's keypoint sigmas."""
        return COCOEvaluator(
            dataset_name,
            output_dir=cfg.OUTPUT_DIR,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

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
