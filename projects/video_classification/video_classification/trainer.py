"""Train video classifiers, and build the config of a run from its arguments."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nl_detectron.config import load_config
from nl_detectron.engine.ablation import PairedTrainer
from nl_detectron.engine.checkpoint import checkpoint_to_load, stored_metadata
from nl_detectron.engine.options import DEFAULT_OPTIONS, RunOptions
from nl_detectron.engine.schedule import scale_schedule, schedule_table
from nl_detectron.engine.trainer import StrictTrainer, setup_run

from .config import default_video_config
from .data import TrainLoader, build_test_loader, build_train_loader
from .data_sets import check_data_sets, register_custom_data
from .evaluation import VideoEvaluator
from .views import MultiViewClassifier

logger = logging.getLogger("nl_detectron")

MIN_CLIPS = 4
"""With fewer clips at a time, the statistics of batch norm are poor; the paper has eight."""


class VideoTrainer(StrictTrainer):
    """Trains video classifiers, and scores them on many views of each video."""

    metrics = {"video/top1": "top-1", "video/top5": "top-5", "video/mAP": "mAP"}

    def __init__(self, cfg: CfgNode, options: RunOptions = DEFAULT_OPTIONS, **load_options: Any):
        """See :class:`StrictTrainer`."""
        super().__init__(cfg, options, **load_options)
        warn_of_small_batches(cfg, self.model)

    @classmethod
    def backbone_prefix(cls, model: nn.Module) -> str:
        """Return the prefix of the trunk's parameters."""
        return "backbone."

    @classmethod
    def model_metadata(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the names of the classes."""
        return {"classes": list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).classes)}

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build SGD with the learning rates of the parts of the model.

        ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` may also be "full_model": all gradients as one vector.
        """
        solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        groups = parameter_groups(cfg, model)
        if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
            return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(groups, **options)
        optimizer = torch.optim.SGD(groups, **options)
        parameters = [parameter for group in groups for parameter in group["params"]]

        def clip_gradients(*_: Any) -> None:
            nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Return the loader of random clips."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> torch.utils.data.DataLoader:
        """Return the loader of all views of a video."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> VideoEvaluator:
        """Return the evaluator of clips and videos."""
        return VideoEvaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
        """Evaluate a model on the views of ``TEST.VIEWS``.

        All processes use the statistics of batch norm that the checkpoint has, those of the main
        process.
        """
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if comm.get_world_size() > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        return super().test(cfg, MultiViewClassifier(model, cfg.TEST.VIEWS.BATCH_SIZE), evaluators)


class PairedVideoTrainer(PairedTrainer, VideoTrainer):
    """Trains a classifier with or without non-local blocks, from identical initial weights."""


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters by learning rate and weight decay.

    ``BIAS_LR_FACTOR`` and ``WEIGHT_DECAY_BIAS`` are for biases of convolutions and linear layers,
    as in TSM; norms have the base learning rate and ``WEIGHT_DECAY_NORM``.
    """
    solver = cfg.SOLVER
    groups = []
    for part, factor in ((model.backbone, 1.0), (model.head, cfg.MODEL.VIDEO.HEAD.LR_FACTOR)):
        groups += get_default_optimizer_params(
            part,
            base_lr=solver.BASE_LR * factor,
            weight_decay=solver.WEIGHT_DECAY,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
    norms = [
        parameter
        for module in model.modules()
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    ]
    options = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY_NORM}
    return reduce_param_groups([*groups, {"params": norms, **options}])


def warn_of_small_batches(cfg: CfgNode, model: nn.Module) -> None:
    """Warn if batch norm sees few clips at a time."""
    clips = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.ACCUMULATE
    norms = [norm for norm in get_bn_modules(model) if not isinstance(norm, nn.SyncBatchNorm)]
    if norms and clips < MIN_CLIPS:
        logger.warning(
            "Batch norm sees %s at a time (SOLVER.IMS_PER_BATCH, divided by the number of "
            "processes and by SOLVER.ACCUMULATE), which gives poor statistics. With "
            "MODEL.RESNETS.NORM and MODEL.NON_LOCAL.NORM GN it does not matter; FrozenBN, for "
            "trained weights, and blocks without a norm need no statistics at all.",
            "1 clip" if clips == 1 else f"{clips} clips",
        )


def read_config(args: argparse.Namespace) -> CfgNode:
    """Build the config from the arguments of a command, and register their data sets.

    Raises:
        ValueError: an argument, a key, a file or the data is invalid.
    """
    remote = args.allow_remote
    cfg = load_config(args.config_file, args.opts, default_video_config, allow_remote=remote)
    if args.scale_lr:
        scale_schedule(cfg, _file_config(args), args.opts[::2])
    weights, resuming = checkpoint_to_load(cfg, args.resume)
    if args.eval_only and not weights:
        raise ValueError("--eval-only needs weights, but MODEL.WEIGHTS is empty")
    known = stored_metadata(weights) if args.eval_only or resuming else {}
    register_custom_data(cfg, args, known)
    check_data_sets(cfg, not args.eval_only, known)
    if not args.eval_only:
        _check_parts(cfg, (args.num_processes or args.num_gpus) * args.num_machines)
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Build the config and set up the run, in every process."""
    cfg = read_config(args)
    setup_run(cfg, args)
    if args.scale_lr:
        table = schedule_table(cfg, _file_config(args), args.opts[::2])
        logger.info("The schedule, scaled to the batch size:\n%s", table)
    if not cfg.DATASETS.TEST:
        logger.info("No evaluation: neither --test-data nor DATASETS.TEST is given.")
    return cfg


def _file_config(args: argparse.Namespace) -> CfgNode:
    remote = args.allow_remote
    return load_config(args.config_file, (), default_video_config, allow_remote=remote)


def _check_parts(cfg: CfgNode, processes: int) -> None:
    parts, batch = cfg.SOLVER.ACCUMULATE, cfg.SOLVER.IMS_PER_BATCH
    if parts < 1 or (batch // processes) % parts:
        raise ValueError(
            "SOLVER.ACCUMULATE must divide the number of clips that a process has in a batch "
            f"(SOLVER.IMS_PER_BATCH {batch}, {processes} processes), got {parts}"
        )
