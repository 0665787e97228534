"""Train or evaluate on COCO-format data; detectron2's own train_net, without its blind spots.

Beyond the stock script: the device is chosen where CUDA is absent, several CPU processes train,
TEST.KEYPOINT_OKS_SIGMAS counts, custom COCO files come from the command line, and a checkpoint that
would leave part of the network untrained is refused.

    python tools/train_net.py --num-gpus 8 \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import nn


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a type of argument."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {text}")
        return int(text)

    return parse


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of detectron2's train_net, and ours."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    processes = parser.add_mutually_exclusive_group()
    processes.add_argument(
        "--num-gpus",
        type=at_least(1),
        default=1,
        metavar="N",
        help="GPUs on each machine (default: %(default)s)",
    )
    processes.add_argument(
        "--num-processes", type=at_least(1), metavar="N", help="the same where there is no GPU"
    )
    parser.add_argument(
        "--num-machines", type=at_least(1), default=1, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--machine-rank",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of this machine (default: %(default)s)",
    )
    # A port for each user, as in detectron2: a second run of the same user says that it is taken.
    port = 2**15 + 2**14 + hash(os.getuid() if hasattr(os, "getuid") else 1) % 2**14
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        help="where processes meet; on one machine, auto finds a free port (default: %(default)s)",
    )
    for split in ("train", "test"):
        parser.add_argument(f"--{split}-json", help=f"custom COCO annotations to {split} on")
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
        "--allow-partial",
        action="append_const",
        dest="may_lack",
        const="",
        help="accept a checkpoint that lacks anything",
    )
    parser.add_argument(
        "--strip-blocks",
        action="store_true",
        help="leave out the non-local blocks of the checkpoint, which is refused otherwise where "
        "the model has no place for them",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config keys and values, such as SOLVER.BASE_LR 0.01"
    )
    return parser


def run(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    check: Callable[[argparse.Namespace, CfgNode, nn.Module], None],
) -> None:
    """Launch a tool with threads that spin only briefly before they sleep.

    By default a waiting thread of OpenMP spins for long, more than a thousand times in each
    iteration. Where other work wants the cores, too, that wastes their time, and training takes
    several times as long. OpenMP reads the variable when PyTorch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from nl_detectron.launch import launch

    launch(main, args, check)


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
    if args.eval_only and (args.may_lack or args.strip_blocks):
        parser.error(
            "--may-lack, --allow-partial and --strip-blocks are for training: --eval-only takes "
            "the whole model that a training left"
        )
    return args


def check(args: argparse.Namespace, cfg: CfgNode, model: nn.Module) -> None:
    """Refuse a model without blocks whose health should be logged."""
    from nl_detectron.attention import find_blocks

    if args.health_period:
        find_blocks(model)


def main(args: argparse.Namespace) -> Any:
    """Train or evaluate; runs in every process."""
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from nl_detectron.checkpoint import StrictCheckpointer
    from nl_detectron.engine import Trainer, load_options, setup
    from nl_detectron.health import BlockHealthHook

    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = StrictCheckpointer(model, cfg.OUTPUT_DIR, **load_options(args))
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg, **load_options(args))
    if args.health_period:
        trainer.register_hooks([BlockHealthHook(args.health_period, trainer.model)])
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    run(main, parse_args(), check)
