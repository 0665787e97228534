"""Train or evaluate video classifiers, like detectron2's train_net.

The data are a folder that has a subfolder of videos for each class, or a csv file: path, label, and
optionally start and end in seconds on each line. In addition to what train_net does, it trains on
the CPU if there is no CUDA device, also in several processes, and refuses checkpoints that would
leave part of the network untrained.

    cd projects/video_classification
    python train_net.py --config-file configs/Kinetics/i3d_R_50_NL5_32x2.yaml \\
        --train-data videos/train --test-data videos/test --scale-lr \\
        SOLVER.IMS_PER_BATCH 8 MODEL.WEIGHTS init.pth
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nl_detectron_cli.arguments import run_options, training_parser
from nl_detectron_cli.threads import limit_thread_spinning
from nl_detectron_cli.train import check_model, parse_training, train_model

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_video_data(parser: argparse.ArgumentParser) -> None:
    for split in ("train", "test"):
        parser.add_argument(
            f"--{split}-data", metavar="PATH", help=f"folder or csv file of videos to {split} on"
        )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes, one on each line (default: those stored with the model, or "
        "those of --train-data)",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__, add_video_data)
    parser.add_argument(
        "--benchmark-loader",
        type=float,
        metavar="SECONDS",
        help="only measure for so long how fast clips are read for training",
    )
    return parse_training(parser, argv)


def check(args: argparse.Namespace, cfg: CfgNode) -> None:
    from video_classification.trainer import VideoTrainer

    if not args.benchmark_loader:
        check_model(VideoTrainer, args, cfg)


def train(args: argparse.Namespace) -> Any:
    from detectron2.utils import comm
    from video_classification.data import benchmark_loader, build_train_loader
    from video_classification.trainer import VideoTrainer, setup

    cfg = setup(args)
    if not args.benchmark_loader:
        return train_model(VideoTrainer, args, cfg)
    loader = build_train_loader(cfg)
    loader.max_unreadable = run_options(args).max_bad_images
    speed = benchmark_loader(loader, args.benchmark_loader)
    if comm.is_main_process():
        print(speed)
    return speed


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    limit_thread_spinning()
    from video_classification.trainer import read_config

    from nl_detectron.engine.launch import launch

    launch(train, args, read_config, check)


if __name__ == "__main__":
    main()
