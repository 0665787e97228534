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
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
    try:
        predictor = engine.DefaultPredictor(cfg)
    except KeyError as error:
        raise ValueError(f"no model can be built: {error.args[0]}") from error
    try:
        StrictCheckpointer(predictor.model, complete=True).load(weights)
    except pickle.UnpicklingError as error:
        raise ValueError(f"weights {weights}: this file does not hold tensors alone") from error
    except Exception as error:  # broken files raise all sorts
        raise ValueError(f"weights {weights}: {error}") from error
    return predictor


def network_input(predictor: engine.DefaultPredictor, image: np.ndarray) -> dict[str, Any]:
    """What a predictor gives its model for a BGR image, (H, W, 3), where that must be run alone."""
    height, width = image.shape[:2]
    if predictor.input_format == "RGB":
        image = image[:, :, ::-1]
    resized = predictor.aug.get_transform(image).apply_image(image)
    pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
    return {"image": pixels, "height": height, "width": width}


def setup(args: argparse.Namespace) -> CfgNode:
    """Build the config from the arguments, and set up logging and seeds as detectron2 does."""
    try:
        cfg = load_config(args.config_file, args.opts)
        _use_own_data(cfg, args)
        _check_data(cfg)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    cfg.freeze()
    engine.default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="nl_detectron")
    logger.info("Device: %s", cfg.MODEL.DEVICE)
    if cfg.MODEL.DEVICE == "cpu":
        # The stock call hands the local rank to DDP as a GPU number, which DDP refuses on CPU.
        engine.defaults.create_ddp_model = functools.partial(
            engine.defaults.create_ddp_model, device_ids=None
        )
    return cfg


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run ``main(args)`` in as many processes as the arguments ask for, on GPUs or on the CPU."""
    newer_than_0_6 = hasattr(comm, "create_local_process_group")
    if args.num_gpus == 1 or torch.cuda.is_available() or newer_than_0_6:
        engine.launch(
            main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,)
        )
    else:
        mp.start_processes(_cpu_worker, args=(main, args), nprocs=args.num_gpus)


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


def _cpu_worker(
    rank: int, main: Callable[[argparse.Namespace], Any], args: argparse.Namespace
) -> None:
    """Do what detectron2's worker does, for 0.6, which knows NCCL alone."""
    dist.init_process_group("gloo", args.dist_url, rank=rank, world_size=args.num_gpus)
    comm._LOCAL_PROCESS_GROUP = dist.new_group(list(range(args.num_gpus)))
    comm.synchronize()
    main(args)
