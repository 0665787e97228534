"""Train or evaluate on COCO-format data; detectron2's own train_net, without its blind spots.

Beyond the stock script: the device is chosen where CUDA is absent, several CPU processes train,
TEST.KEYPOINT_OKS_SIGMAS counts, a person's own COCO files come from the command line, and a
checkpoint that would leave part of the network untrained is refused.

    python tools/train_net.py --num-gpus 8 \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
from typing import Any

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from nl_detectron.checkpoint import StrictCheckpointer
from nl_detectron.engine import Trainer, argument_parser, launch, setup
from nl_detectron.health import BlockHealthHook


def main(args: argparse.Namespace) -> Any:
    """Train or evaluate; runs in every process."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = StrictCheckpointer(model, cfg.OUTPUT_DIR, may_lack=args.may_lack)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg, args.may_lack)
    if args.health_period:
        trainer.register_hooks([BlockHealthHook(args.health_period, trainer.model)])
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--health-period",
        type=int,
        default=0,
        metavar="N",
        help="log every N iterations what the non-local blocks do; 0 is off",
    )
    args = parser.parse_args()
    if args.health_period < 0:
        parser.error(f"--health-period must be 0 or more, got {args.health_period}")
    launch(main, args)
