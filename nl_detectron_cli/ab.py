"""Train a detector with and without its non-local blocks under identical conditions, and compare.

The config must have blocks. Both models start from the same weights, are trained on the same images
in the same order (SEED, or 0 if the config has none), and are evaluated. The arguments are those of
`nl-detectron train`. OUTPUT_DIR receives the output of both trainings, in stock/ and non_local/,
and the comparison: losses.png, and all losses and scores in ab.json.

    nl-detectron ab --config-file quick_schedules/mask_rcnn_R_18_NL_FPN_overfit.yaml \\
        --train-json train.json --train-images train/ --test-json val.json --test-images val/ \\
        OUTPUT_DIR output/ab
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nl_detectron_cli.arguments import load_options, run_options, training_parser
from nl_detectron_cli.threads import limit_thread_spinning
from nl_detectron_cli.train import check_coco_data

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from nl_detectron.engine.ablation import PairedTrainer, TrainingResult
    from nl_detectron.engine.trainer import StrictTrainer

logger = logging.getLogger("nl_detectron.ab")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of a training, and reject two that do not apply."""
    return parse_comparison(training_parser(__doc__), argv)


def parse_comparison(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """Parse the arguments of a training parser in the same way."""
    args = parser.parse_args(argv)
    if args.eval_only:
        parser.error("--eval-only does not apply: both models are trained")
    return args


def check(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Check the data, that the config has blocks, and that the weights fit both models."""
    from nl_detectron.engine.coco.trainer import CocoTrainer

    check_coco_data(args, cfg)
    check_models(CocoTrainer, args, cfg)


def check_models(
    trainer_class: type[StrictTrainer], args: argparse.Namespace, cfg: CfgNode
) -> None:
    """Check the models of a task in the same way."""
    from nl_detectron.config import without_blocks
    from nl_detectron.engine.ablation import VARIANTS
    from nl_detectron.engine.checkpoint_files import check_nothing_is_overwritten
    from nl_detectron.engine.checkpoint_hooks import check_metric
    from nl_detectron.engine.training_model import prepare_for_training
    from nl_detectron.non_local import find_blocks

    check_metric(args.keep_best, cfg, trainer_class.metrics)
    options = load_options(args)
    model = trainer_class.dry_run(cfg, resume=False, **options)
    prepare_for_training(model, run_options(args))
    if not find_blocks(model):
        raise ValueError(
            f"{args.config_file} has no blocks to compare without: MODEL.BACKBONE.NAME is "
            f"{cfg.MODEL.BACKBONE.NAME}, MODEL.ROI_KEYPOINT_HEAD.NAME is "
            f"{cfg.MODEL.ROI_KEYPOINT_HEAD.NAME}"
        )
    for variant in () if args.resume else VARIANTS:
        check_nothing_is_overwritten(str(Path(cfg.OUTPUT_DIR) / variant))
    trainer_class.dry_run(without_blocks(cfg), resume=False, **options)


def compare(args: argparse.Namespace) -> None:
    """Train and compare both models; runs in every process."""
    from nl_detectron.engine.coco.trainer import PairedCocoTrainer, setup

    compare_models(PairedCocoTrainer, args, setup(args))


def compare_models(
    trainer_class: type[PairedTrainer], args: argparse.Namespace, cfg: CfgNode
) -> None:
    """Train and compare the models of a task."""
    from detectron2.utils import comm

    from nl_detectron.config import without_blocks
    from nl_detectron.engine.ablation import VARIANTS, train_and_evaluate

    runs = {}
    for number, (variant, label) in enumerate(VARIANTS.items(), start=1):
        logger.info("Training %d of %d: %s", number, len(VARIANTS), label)
        variant_cfg = without_blocks(cfg) if variant == "stock" else cfg.clone()
        variant_cfg.defrost()
        variant_cfg.SEED = max(cfg.SEED, 0)
        variant_cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / variant)
        runs[variant] = train_and_evaluate(
            variant_cfg,
            trainer_class,
            run_options(args),
            resume=args.resume,
            **load_options(args),
        )
    if comm.is_main_process():
        write_report(runs, Path(cfg.OUTPUT_DIR), trainer_class.metrics)


def write_report(runs: dict[str, TrainingResult], output: Path, metrics: Mapping[str, str]) -> None:
    """Write and print the comparison."""
    from nl_detectron.engine.ablation import VARIANTS, draw_losses, score_table

    scores = {variant: run.scores for variant, run in runs.items()}
    gains = {name: scores["non_local"][name] - score for name, score in scores["stock"].items()}
    losses = {variant: run.losses for variant, run in runs.items()}
    report = {"scores": {**scores, "difference": gains}, "losses": losses}
    (output / "ab.json").write_text(json.dumps(report))
    draw_losses(
        output / "losses.png",
        {VARIANTS[variant]: curves["total_loss"] for variant, curves in losses.items()},
    )

    first, other = ({name: loss[0] for name, loss in run.losses.items()} for run in runs.values())
    print("\nloss of the first iteration: ", end="")
    if first == other:
        print(f"{first['total_loss']} in both, bit for bit")
    else:
        print(
            f"{first['total_loss']} and {other['total_loss']}, not equal: this device is not "
            "deterministic"
        )
    if gains:
        labelled = {VARIANTS[variant]: score for variant, score in scores.items()}
        print("\n" + score_table(labelled, metrics))
    print(f"\n{output / 'losses.png'}\n{output / 'ab.json'}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    limit_thread_spinning()
    from nl_detectron.engine.coco.trainer import read_config
    from nl_detectron.engine.launch import launch

    launch(compare, args, read_config, check)
