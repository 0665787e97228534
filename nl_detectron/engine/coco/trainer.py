"""Train detectors on COCO-format data, and build the config of a run from its arguments."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.modeling.backbone import FPN
from torch import nn

from nl_detectron.config import load_config
from nl_detectron.engine.ablation import PairedTrainer
from nl_detectron.engine.checkpoint import checkpoint_to_load, stored_metadata
from nl_detectron.engine.coco.data_sets import (
    check_is_detector,
    data_set_notes,
    register_custom_data,
    validate_data_sets,
)
from nl_detectron.engine.coco.evaluation import Evaluator
from nl_detectron.engine.coco.metadata import dataset_metadata
from nl_detectron.engine.loader import (
    ReadOrError,
    TestLoader,
    TrainLoader,
    build_train_loader,
)
from nl_detectron.engine.schedule import scale_schedule, schedule_table
from nl_detectron.engine.trainer import StrictTrainer, setup_run

logger = logging.getLogger("nl_detectron")


class CocoTrainer(StrictTrainer):
    """Trains detectors, and scores them by COCO's AP."""

    metrics = {"bbox/AP": "box AP", "segm/AP": "mask AP", "keypoints/AP": "keypoint AP"}

    @classmethod
    def backbone_prefix(cls, model: nn.Module) -> str:
        """Return the prefix of the ResNet's parameters, without the FPN."""
        backbone = getattr(model, "backbone", None)
        return "backbone.bottom_up." if isinstance(backbone, FPN) else "backbone."

    @classmethod
    def model_metadata(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the names of classes and keypoints, and the OKS sigmas."""
        metadata = dataset_metadata(cfg.DATASETS.TRAIN[0])
        if cfg.MODEL.KEYPOINT_ON and cfg.TEST.KEYPOINT_OKS_SIGMAS:
            metadata["keypoint_oks_sigmas"] = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        return metadata

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Return the loader of training images."""
        return build_train_loader(cfg, DatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        """Return the loader of a test set; one that cannot be read ends the evaluation."""
        mapper = ReadOrError(DatasetMapper(cfg, is_train=False))
        return TestLoader(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Evaluator:
        """Return the COCO evaluator."""
        return Evaluator(cfg, dataset_name)


class PairedCocoTrainer(PairedTrainer, CocoTrainer):
    """Trains a detector with or without non-local blocks, from identical initial weights."""


def read_config(args: argparse.Namespace) -> CfgNode:
    """Build the config from the arguments of a command, and register their data sets.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: anything else is invalid.
    """
    cfg = load_config(args.config_file, args.opts, allow_remote=args.allow_remote)
    check_is_detector(cfg)
    if args.scale_lr:
        scale_schedule(cfg, _file_config(args), args.opts[::2])
    register_custom_data(cfg, args)
    weights, resuming = checkpoint_to_load(cfg, args.resume)
    if args.eval_only and not weights:
        raise ValueError("--eval-only needs weights, but MODEL.WEIGHTS is empty")
    known = stored_metadata(weights) if args.eval_only or resuming else {}
    if not cfg.TEST.KEYPOINT_OKS_SIGMAS:
        cfg.TEST.KEYPOINT_OKS_SIGMAS = known.get("keypoint_oks_sigmas", [])
    validate_data_sets(cfg, not args.eval_only, known)
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Build the config and set up the run, in every process."""
    cfg = read_config(args)
    setup_run(cfg, args)
    if args.scale_lr:
        table = schedule_table(cfg, _file_config(args), args.opts[::2])
        logger.info("The schedule, scaled to the batch size:\n%s", table)
    for note in data_set_notes(cfg):
        logger.info(note)
    return cfg


def _file_config(args: argparse.Namespace) -> CfgNode:
    return load_config(args.config_file, allow_remote=args.allow_remote)
