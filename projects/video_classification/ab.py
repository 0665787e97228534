"""Train a video classifier with and without its blocks under identical conditions, and compare.

As `nl-detectron ab`, with the arguments of train_net.py. OUTPUT_DIR receives the output of both
trainings, in stock/ and non_local/, and the comparison: losses.png and ab.json.

    cd projects/video_classification
    python ab.py --config-file configs/Kinetics/c2d_R_50_NL_32x2.yaml \\
        --train-data videos/train --test-data videos/test --scale-lr \\
        SOLVER.IMS_PER_BATCH 8 MODEL.WEIGHTS init.pth
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from train_net import add_video_data

from nl_detectron_cli.ab import check_models, compare_models, parse_comparison
from nl_detectron_cli.arguments import training_parser
from nl_detectron_cli.threads import limit_thread_spinning

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return parse_comparison(training_parser(__doc__, add_video_data), argv)


def check(args: argparse.Namespace, cfg: CfgNode) -> None:
    from video_classification.trainer import VideoTrainer

    check_models(VideoTrainer, args, cfg)


def compare(args: argparse.Namespace) -> None:
    from video_classification.trainer import PairedVideoTrainer, setup

    compare_models(PairedVideoTrainer, args, setup(args))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    limit_thread_spinning()
    from video_classification.trainer import read_config

    from nl_detectron.engine.launch import launch

    launch(compare, args, read_config, check)


if __name__ == "__main__":
    main()
