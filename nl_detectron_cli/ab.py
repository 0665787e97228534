"""Train a detector with and without its non-local blocks, all else equal, and compare.

Given a config with blocks, makes its stock twin, starts both with the same weights, trains both on
the same images in the same order (SEED, or 0 where the config has none), and evaluates both. Takes
the arguments of tools/train_net.py. OUTPUT_DIR then holds what each training left, in stock/ and
non_local/, and the comparison: losses.png, and in ab.json every loss and AP.

    python tools/ab.py --config-file configs/quick_schedules/mask_rcnn_R_18_NL_FPN_overfit.yaml \\
        --train-json train.json --train-images train/ --test-json val.json --test-images val/ \\
        OUTPUT_DIR output/ab
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from nl_detectron_cli.arguments import argument_parser
from nl_detectron_cli.threads import let_threads_sleep

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import nn

    from nl_detectron.engine.ablation import Run

logger = logging.getLogger("nl_detectron.ab")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of tools/train_net.py, but for two that have no meaning here."""
    parser = argument_parser(__doc__)
    args = parser.parse_args(argv)
    if args.resume or args.eval_only:
        parser.error("--resume and --eval-only: both twins are trained from the start")
    return args


def check(args: argparse.Namespace, cfg: CfgNode, model: nn.Module) -> None:
    """Refuse a config without blocks, and weights that are not the stock twin's, too."""
    from nl_detectron.config import without_blocks
    from nl_detectron.engine.launch import build_and_load
    from nl_detectron.non_local import find_blocks

    if not find_blocks(model):
        raise ValueError(
            f"{args.config_file} has no blocks to leave out: MODEL.BACKBONE.NAME is "
            f"{cfg.MODEL.BACKBONE.NAME}, MODEL.ROI_KEYPOINT_HEAD.NAME is "
            f"{cfg.MODEL.ROI_KEYPOINT_HEAD.NAME}"
        )
    build_and_load(args, without_blocks(cfg))


def compare(args: argparse.Namespace) -> None:
    """Train both twins and compare; runs in every process."""
    from detectron2.utils import comm

    from nl_detectron.config import without_blocks
    from nl_detectron.engine.ablation import LABELS, train_twin
    from nl_detectron.engine.trainer import load_options, setup

    cfg = setup(args)
    runs = {}
    for number, twin in enumerate(LABELS, start=1):
        logger.info("Training %d of %d: %s", number, len(LABELS), LABELS[twin])
        twin_cfg = without_blocks(cfg) if twin == "stock" else cfg.clone()
        twin_cfg.defrost()
        twin_cfg.SEED = max(cfg.SEED, 0)
        twin_cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / twin)
        runs[twin] = train_twin(twin_cfg, **load_options(args))
    if comm.is_main_process():
        report(runs, Path(cfg.OUTPUT_DIR))


def report(runs: dict[str, Run], output: Path) -> None:
    """Write and print the comparison."""
    from nl_detectron.engine.ablation import LABELS, ap_table, draw_losses

    stock, non_local = runs.values()
    difference = {task: non_local.ap[task] - ap for task, ap in stock.ap.items()}
    aps = {**{twin: run.ap for twin, run in runs.items()}, "difference": difference}
    numbers = {"ap": aps, "losses": {twin: run.losses for twin, run in runs.items()}}
    (output / "ab.json").write_text(json.dumps(numbers))
    draw_losses(
        output / "losses.png",
        {LABELS[twin]: run.losses["total_loss"] for twin, run in runs.items()},
    )

    first, other_first = (
        {name: loss[0] for name, loss in run.losses.items()} for run in runs.values()
    )
    print("\nloss of the first iteration: ", end="")
    if first == other_first:
        print(f"{first['total_loss']} in both, equal to the last bit")
    else:
        print(
            f"{first['total_loss']} and {other_first['total_loss']}, not equal: this device does "
            "not compute the same way twice"
        )
    if stock.ap:
        print("\n" + ap_table({LABELS[twin]: run.ap for twin, run in runs.items()}))
    print(f"\n{output / 'losses.png'}\n{output / 'ab.json'}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    let_threads_sleep()
    from nl_detectron.engine.launch import launch

    launch(compare, args, check)
