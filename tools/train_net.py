"""Train or evaluate on COCO-format data; detectron2's own train_net, without its blind spots.

Beyond the stock script: the device is chosen where CUDA is absent, several CPU processes train,
TEST.KEYPOINT_OKS_SIGMAS counts, a person's own COCO files come from the command line, and a
checkpoint that would leave part of the network untrained is refused.

    python tools/train_net.py --num-gpus 8 \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    DefaultTrainer,
    default_argument_parser,
    default_setup,
    defaults,
    launch,
)
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm

from nl_detectron import add_non_local_config
from nl_detectron.checkpoint import StrictCheckpointer
from nl_detectron.coco_files import register_coco_files
from nl_detectron.health import BlockHealthHook

logger = logging.getLogger("nl_detectron")


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with a COCO evaluator and a strict checkpointer."""

    def __init__(self, cfg: CfgNode, may_lack: list[str], health_period: int):
        """See ``DefaultTrainer``; ``may_lack`` as in :class:`StrictCheckpointer`.

        ``health_period`` as in :class:`BlockHealthHook`; 0 is off.
        """
        self.may_lack = may_lack
        self.health_period = health_period
        super().__init__(cfg)

    def build_hooks(self) -> list:
        """Stock hooks, in the last step of ``__init__`` and the first that needs a checkpointer."""
        self.checkpointer = StrictCheckpointer(
            self._trainer.model,
            self.cfg.OUTPUT_DIR,
            may_lack=self.may_lack,
            trainer=weakref.proxy(self),
        )
        hooks = super().build_hooks()
        if self.health_period:
            hooks.append(BlockHealthHook(self.health_period, self._trainer.model))
        return hooks

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO boxes, masks and keypoints, whatever the predictions hold."""
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind != "coco":
            raise ValueError(
                f"data set {dataset_name!r} is of type {kind!r}, this tool evaluates 'coco'; "
                "run `python -m tools.train_net`, detectron2's own, with the same arguments"
            )
        return COCOEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )


def setup(args: argparse.Namespace) -> CfgNode:
    """Build the config from the arguments, and set up logging and seeds as detectron2 does."""
    cfg = get_cfg()
    add_non_local_config(cfg)
    try:
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
    except (AssertionError, KeyError) as error:
        raise SystemExit(_with_nearest_key(cfg, error)) from error
    use_own_data(cfg, args)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    default_setup(cfg, args)
    logger.info("Device: %s", cfg.MODEL.DEVICE)
    return cfg


def use_own_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Register the COCO files of the command line, and fit the number of classes and keypoints."""
    for split in ("train", "test"):
        json_file, image_dir = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if (json_file is None) != (image_dir is None):
            raise SystemExit(f"--{split}-json and --{split}-images go together")
        if json_file is None:
            continue
        name = f"own_{split}"
        register_coco_files(name, json_file, image_dir)
        cfg.DATASETS[split.upper()] = (name,)
        metadata = MetadataCatalog.get(name)
        num_classes = len(metadata.thing_classes)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
        if cfg.MODEL.KEYPOINT_ON:
            num_keypoints = len(metadata.get("keypoint_names", ()))
            num_sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # COCO's person by default
            if num_keypoints != num_sigmas:
                raise SystemExit(
                    f"TEST.KEYPOINT_OKS_SIGMAS has {num_sigmas} values, but the categories of "
                    f"{json_file} have {num_keypoints} keypoints"
                )
            cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = num_keypoints


def main(args: argparse.Namespace) -> Any:
    """Train or evaluate; runs in every process."""
    cfg = setup(args)
    may_lack = [""] if args.allow_partial else args.may_lack
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = StrictCheckpointer(model, cfg.OUTPUT_DIR, may_lack=may_lack)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    if cfg.MODEL.DEVICE == "cpu":
        # The stock call hands the local rank to DDP as a GPU number, which DDP refuses on CPU.
        defaults.create_ddp_model = functools.partial(defaults.create_ddp_model, device_ids=None)
    trainer = Trainer(cfg, may_lack, args.health_period)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def parse_args() -> argparse.Namespace:
    """Stock arguments and ours."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--num-processes", type=int, dest="num_gpus", help="--num-gpus, by the name it has on CPU"
    )
    for split in ("train", "test"):
        parser.add_argument(f"--{split}-json", help=f"your COCO annotations to {split} on")
        parser.add_argument(f"--{split}-images", help=f"the image folder of --{split}-json")
    parser.add_argument(
        "--may-lack",
        action="append",
        default=[],
        metavar="PREFIX",
        help="a part of the model to start from scratch, such as roi_heads.box_predictor; all else "
        "but non-local blocks must be in the checkpoint; may be given several times",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="accept a checkpoint that lacks anything"
    )
    parser.add_argument(
        "--health-period",
        type=int,
        default=0,
        metavar="N",
        help="log every N iterations what the non-local blocks do; 0 is off",
    )
    return parser.parse_args()


def _with_nearest_key(cfg: CfgNode, error: Exception) -> str:
    message = str(error.args[0])
    nearest = difflib.get_close_matches(message.split()[-1], list(_flat_keys(cfg)), n=1)
    return f"{message}; did you mean {nearest[0]}?" if nearest else message


def _flat_keys(node: CfgNode, prefix: str = "") -> Any:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _cpu_worker(rank: int, args: argparse.Namespace) -> None:
    """Do what detectron2's worker does, for 0.6, which knows NCCL alone."""
    dist.init_process_group("gloo", args.dist_url, rank=rank, world_size=args.num_gpus)
    comm._LOCAL_PROCESS_GROUP = dist.new_group(list(range(args.num_gpus)))
    comm.synchronize()
    main(args)


if __name__ == "__main__":
    args = parse_args()
    newer_than_0_6 = hasattr(comm, "create_local_process_group")
    if args.num_gpus == 1 or torch.cuda.is_available() or newer_than_0_6:
        launch(
            main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,)
        )
    else:
        mp.start_processes(_cpu_worker, args=(args,), nprocs=args.num_gpus)
