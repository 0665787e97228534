"""What the tools have in common: detectron2's engine, without its blind spots.

Beyond the stock one: the device is chosen where CUDA is absent, several CPU processes train,
``TEST.KEYPOINT_OKS_SIGMAS`` counts, a person's own COCO files come from the command line, and a
checkpoint that would leave part of the network untrained is refused.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2 import engine
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from nl_detectron.checkpoint import StrictCheckpointer
from nl_detectron.coco_files import use_coco_files
from nl_detectron.config import load_config
from nl_detectron.metadata import dataset_metadata

logger = logging.getLogger("nl_detectron")


class Trainer(engine.DefaultTrainer):
    """``DefaultTrainer`` with a COCO evaluator and a strict checkpointer."""

    def __init__(self, cfg: CfgNode, may_lack: Sequence[str] = ()):
        """See ``DefaultTrainer``; ``may_lack`` as in :class:`StrictCheckpointer`."""
        self.may_lack = may_lack
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
            may_lack=self.may_lack,
            metadata=metadata,
            trainer=weakref.proxy(self),
        )
        return super().build_hooks()

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO boxes, masks and keypoints, whatever the predictions hold."""
        return COCOEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )


def build_predictor(cfg: CfgNode, weights: str | None = None) -> engine.DefaultPredictor:
    """Build a model and load weights for it, which must be all there and all of use.

    Args:
        cfg: is not changed.
        weights: checkpoint; without it, the config's. "" leaves the model at its initial values.

    Returns:
        A function from a BGR image, (H, W, 3), to what the model finds, and its ``model``.

    Raises:
        ValueError: no model can be built from ``cfg``, or the weights are not its own.
    """
    weights = cfg.MODEL.WEIGHTS if weights is None else weights
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""  # stock would load any, whatever they lack
    with model_errors():
        predictor = engine.DefaultPredictor(cfg)
    StrictCheckpointer(predictor.model, complete=True).load(weights)
    return predictor


def network_input(predictor: engine.DefaultPredictor, image: np.ndarray) -> dict[str, Any]:
    """What a predictor gives its model for a BGR image, (H, W, 3), where that must be run alone."""
    height, width = image.shape[:2]
    if predictor.input_format == "RGB":
        image = image[:, :, ::-1]
    resized = predictor.aug.get_transform(image).apply_image(image)
    pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
    return {"image": pixels, "height": height, "width": width}


def read_config(args: argparse.Namespace) -> CfgNode:
    """Build the config from the arguments of a tool, and register their data sets.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: anything else that is wrong with them.
    """
    cfg = load_config(args.config_file, args.opts)
    _use_own_data(cfg, args)
    _check_data(cfg)
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config, and set up logging and seeds as detectron2 does; in every process."""
    cfg = read_config(args)
    engine.default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="nl_detectron")
    logger.info("Device: %s", cfg.MODEL.DEVICE)
    return cfg


def _use_own_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    for split in ("train", "test"):
        json_file, image_dir = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if (json_file is None) != (image_dir is None):
            raise ValueError(f"--{split}-json and --{split}-images go together")
        if json_file is None:
            continue
        use_coco_files(cfg, split, json_file, image_dir)
        num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        num_sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # COCO's person by default
        if cfg.MODEL.KEYPOINT_ON and num_keypoints != num_sigmas:
            raise ValueError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {num_sigmas} values, but the categories of "
                f"{json_file} have {num_keypoints} keypoints"
            )
    if args.train_json and args.test_json:
        for what in ["thing_classes", *["keypoint_names"] * cfg.MODEL.KEYPOINT_ON]:
            train, test = (MetadataCatalog.get(f"own_{s}").get(what) for s in ("train", "test"))
            if train != test:
                raise ValueError(
                    "--train-json and --test-json must have the same categories and keypoints, "
                    f"got {train} and {test}"
                )


def _check_data(cfg: CfgNode) -> None:
    """Say what is wrong with the data sets now, rather than after the training."""
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog.list():
                raise ValueError(f"DATASETS.{key}: no data set {name!r} is registered")
            metadata = MetadataCatalog.get(name)
            if metadata.evaluator_type != "coco":
                raise ValueError(
                    f"DATASETS.{key}: {name!r} is of type {metadata.evaluator_type!r}, this tool "
                    "takes 'coco'; run `python -m tools.train_net`, detectron2's own, with the "
                    "same arguments"
                )
            if not PathManager.isfile(metadata.json_file):
                raise FileNotFoundError(
                    f"DATASETS.{key}: {name!r} needs {metadata.json_file}, which does not exist; "
                    f"name your own files with --{key.lower()}-json and --{key.lower()}-images, or "
                    "set DETECTRON2_DATASETS"
                )


@contextmanager
def model_errors() -> Iterator[None]:
    """Report a config that no model can be built from as a ``ValueError``."""
    try:
        yield
    except (AssertionError, KeyError) as error:  # KeyError: a name that no registry knows
        raise ValueError(f"no model can be built from the config: {error!r}") from error


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
