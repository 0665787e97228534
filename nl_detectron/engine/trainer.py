"""What the tools have in common: detectron2's engine, without its blind spots.

Beyond the stock one: the device is chosen where CUDA is absent, several CPU processes train,
``TEST.KEYPOINT_OKS_SIGMAS`` counts, a person's own COCO files come from the command line, and a
checkpoint that would leave part of the network untrained is refused.
"""

from __future__ import annotations

import argparse
import functools
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2 import engine
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from nl_detectron.config import load_config
from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.coco.data_sets import check_data_sets, describe_data, use_custom_data
from nl_detectron.engine.coco.evaluation import Evaluator
from nl_detectron.engine.coco.metadata import dataset_metadata, stored_metadata

logger = logging.getLogger("nl_detectron")


class Trainer(engine.DefaultTrainer):
    """``DefaultTrainer`` with a COCO evaluator and a strict checkpointer."""

    def __init__(self, cfg: CfgNode, **load_options: Any):
        """See ``DefaultTrainer``; options are those of :class:`StrictCheckpointer`."""
        self.load_options = load_options
        with _ddp_on(cfg.MODEL.DEVICE):
            super().__init__(cfg)

    def build_hooks(self) -> list:
        """Stock hooks, in the last step of ``__init__`` and the first that needs a checkpointer."""
        metadata = dataset_metadata(self.cfg.DATASETS.TRAIN[0])
        if self.cfg.MODEL.KEYPOINT_ON and self.cfg.TEST.KEYPOINT_OKS_SIGMAS:
            metadata["keypoint_oks_sigmas"] = list(self.cfg.TEST.KEYPOINT_OKS_SIGMAS)
        self.checkpointer = StrictCheckpointer(
            self._trainer.model,
            self.cfg.OUTPUT_DIR,
            metadata=metadata,
            trainer=weakref.proxy(self),
            **self.load_options,
        )
        return super().build_hooks()

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Evaluator:
        """COCO's scores."""
        return Evaluator(cfg, dataset_name)


def read_config(args: argparse.Namespace) -> CfgNode:
    """Build the config from the arguments of a tool, and register their data sets.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: anything else that is wrong with them.
    """
    cfg = load_config(args.config_file, args.opts)
    use_custom_data(cfg, args)
    weights, resuming = weights_to_load(cfg, args.resume)
    if args.eval_only and not weights:
        raise ValueError("--eval-only: MODEL.WEIGHTS is empty, so there is no model to evaluate")
    known = stored_metadata(weights) if args.eval_only or resuming else {}
    if not cfg.TEST.KEYPOINT_OKS_SIGMAS:
        cfg.TEST.KEYPOINT_OKS_SIGMAS = known.get("keypoint_oks_sigmas", [])
    check_data_sets(cfg, not args.eval_only, known)
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config, and set up logging and seeds as detectron2 does; in every process."""
    cfg = read_config(args)
    engine.default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="nl_detectron")
    logger.info("Device: %s", cfg.MODEL.DEVICE)
    for sentence in describe_data(cfg):
        logger.info(sentence)
    return cfg


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what arguments say about loading a checkpoint, for :class:`StrictCheckpointer`."""
    options = {"allow_missing": args.allow_missing, "strip_blocks": args.strip_blocks}
    return {**options, "complete": args.eval_only}


def weights_to_load(cfg: CfgNode, resume: bool) -> tuple[str, bool]:
    """Return the checkpoint that a run starts from, and whether it is resumed there."""
    checkpointer = DetectionCheckpointer(torch.nn.Module(), cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        return checkpointer.get_checkpoint_file(), True
    return cfg.MODEL.WEIGHTS, False


@contextmanager
def _ddp_on(device: str) -> Iterator[None]:
    """Within, ``DefaultTrainer`` can prepare a model on the CPU for several processes, too.

    It hands the local rank to ``DistributedDataParallel`` as a GPU number, which is refused there,
    and leaves no other place to say so than the function that it calls.
    """
    stock = engine.defaults.create_ddp_model
    if device == "cpu":
        engine.defaults.create_ddp_model = functools.partial(stock, device_ids=None)
    try:
        yield
    finally:
        engine.defaults.create_ddp_model = stock
