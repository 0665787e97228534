"""Train or evaluate on COCO-format data; detectron2's own train_net, without its blind spots.

Beyond the stock script: the device is chosen where CUDA is absent, several CPU processes train,
TEST.KEYPOINT_OKS_SIGMAS counts, custom COCO files come from the command line, and a checkpoint that
would leave part of the network untrained is refused.

    nl-detectron train --num-gpus 8 \\
        --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nl_detectron_cli.arguments import argument_parser, at_least, load_options
from nl_detectron_cli.threads import let_threads_sleep

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, without importing what takes seconds to import."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--health-period",
        type=at_least(0),
        default=0,
        metavar="N",
        help="log every N iterations what the non-local blocks do; 0 is off (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.eval_only and (args.allow_missing or args.strip_blocks or args.scale_lr):
        parser.error(
            "--allow-missing, --allow-partial, --strip-blocks and --scale-lr are for training: "
            "--eval-only takes the whole model that a training left"
        )
    return args


def check(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Refuse weights that are not the model's, and a model without blocks to log the health of."""
    from nl_detectron.engine.coco.trainer import CocoTrainer
    from nl_detectron.non_local import find_blocks

    model = CocoTrainer.rehearse(cfg, args.resume, **load_options(args))
    if args.health_period:
        find_blocks(model, "*")


def train(args: argparse.Namespace) -> Any:
    """Train or evaluate; runs in every process."""
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from nl_detectron.analysis.health import BlockHealthHook
    from nl_detectron.engine.coco.trainer import CocoTrainer, setup

    cfg = setup(args)
    if args.eval_only:
        model = CocoTrainer.build_model(cfg)
        checkpointer = CocoTrainer.build_checkpointer(cfg, model, **load_options(args))
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = CocoTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = CocoTrainer(cfg, **load_options(args))
    if args.health_period:
        trainer.register_hooks([BlockHealthHook(args.health_period, trainer.model)])
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    let_threads_sleep()
    from nl_detectron.engine.coco.trainer import read_config
    from nl_detectron.engine.launch import launch

    launch(train, args, read_config, check)
