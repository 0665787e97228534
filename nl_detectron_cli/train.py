"""Train or evaluate on COCO-format data, like detectron2's train_net.

In addition, it trains on the CPU if there is no CUDA device, also in several processes, reads
custom COCO files from the command line, respects TEST.KEYPOINT_OKS_SIGMAS, and refuses checkpoints
that would leave part of the network untrained.

    nl-detectron train --num-gpus 8 \\
        --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml

PyTorch's launcher can start the processes instead, also on several machines, and start them again
when one is lost:

    torchrun --nproc-per-node 8 --max-restarts 3 -m nl_detectron_cli train --resume \\
        --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nl_detectron_cli.arguments import (
    add_fast,
    add_integer,
    load_options,
    run_options,
    training_parser,
)
from nl_detectron_cli.threads import limit_thread_spinning

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from nl_detectron.engine.trainer import StrictTrainer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments, without slow imports."""
    return parse_training(training_parser(__doc__), argv)


def parse_training(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """Parse the arguments of a training parser, ``--health-period`` among them."""
    add_integer(
        parser,
        "--health-period",
        0,
        "log the health of the blocks every N iterations; 0: never",
        minimum=0,
    )
    add_fast(parser, "; for --eval-only")
    args = parser.parse_args(argv)
    for_training = args.allow_missing or args.strip_blocks or args.scale_lr
    faster = args.channels_last or args.fold_norms
    if args.eval_only and (for_training or faster or args.keep_last or args.keep_best):
        parser.error(
            "--allow-missing, --allow-partial, --strip-blocks, --scale-lr, --keep-last, "
            "--keep-best, --channels-last and --fold-norms are for training; --eval-only needs the "
            "complete checkpoint of a training, and is faster with --fast"
        )
    if args.fast and not args.eval_only:
        parser.error("--fast is for --eval-only: an optimized model cannot be trained")
    return args


def check(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Check the data, that the weights fit, and for ``--health-period`` that there are blocks."""
    from nl_detectron.engine.coco.trainer import CocoTrainer

    check_coco_data(args, cfg)
    check_model(CocoTrainer, args, cfg)


def check_coco_data(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Check the data sets of a training or evaluation."""
    from nl_detectron.engine.coco.data_sets import check_data
    from nl_detectron.engine.coco.findings import parse_treat

    max_bad_images = run_options(args).max_bad_images
    check_data(cfg, not args.eval_only, parse_treat(args.treat), max_bad_images)


def check_model(trainer_class: type[StrictTrainer], args: argparse.Namespace, cfg: CfgNode) -> None:
    """Check the model of a task in the same way."""
    from nl_detectron.engine.checkpoint_files import check_nothing_is_overwritten
    from nl_detectron.engine.checkpoint_hooks import check_metric
    from nl_detectron.engine.optimize import optimize
    from nl_detectron.engine.training_model import prepare_for_training
    from nl_detectron.non_local import find_blocks

    check_metric(args.keep_best, cfg, trainer_class.metrics)
    if not (args.eval_only or args.resume):
        check_nothing_is_overwritten(cfg.OUTPUT_DIR)
    model = trainer_class.dry_run(cfg, args.resume, **load_options(args))
    optimize(model, args.fast)
    prepare_for_training(model, run_options(args))
    if args.health_period:
        find_blocks(model, "*")


def train(args: argparse.Namespace) -> Any:
    """Train or evaluate; runs in every process."""
    from nl_detectron.engine.coco.trainer import CocoTrainer, setup

    return train_model(CocoTrainer, args, setup(args))


def train_model(trainer_class: type[StrictTrainer], args: argparse.Namespace, cfg: CfgNode) -> Any:
    """Train or evaluate the model of a task."""
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from nl_detectron.analysis.health import BlockHealthHook
    from nl_detectron.engine.failures import explained_errors
    from nl_detectron.engine.optimize import optimize

    if args.eval_only:
        model = trainer_class.build_model(cfg)
        checkpointer = trainer_class.build_checkpointer(cfg, model, **load_options(args))
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        with explained_errors():
            results = trainer_class.test(cfg, optimize(model, args.fast))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = trainer_class(cfg, run_options(args), **load_options(args))
    if args.health_period:
        trainer.register_hooks([BlockHealthHook(args.health_period, trainer.model)])
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    limit_thread_spinning()
    from nl_detectron.engine.coco.trainer import read_config
    from nl_detectron.engine.launch import launch

    launch(train, args, read_config, check)
