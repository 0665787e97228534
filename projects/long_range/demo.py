"""Train a detector with and without non-local blocks on a task that needs long-range context.

Generates the data set, trains both models on it under identical conditions, and prints their AP.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from nl_detectron_cli.threads import limit_thread_spinning


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and image order")
    parser.add_argument(
        "--output", type=Path, default=Path("output/long_range"), help="output folder"
    )
    parser.add_argument(
        "--budget", type=float, default=1.0, help="multiple of the config's iterations"
    )
    parser.add_argument("--only", choices=("stock", "non_local"), help="train only one of the two")
    parser.add_argument("--keypoints", action="store_true", help="keypoints instead of instances")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from long_range.comparison import draw_predictions
    from long_range.dataset import SPLIT_SIZES, register_dataset, write_dataset
    from long_range.training import AdamWTrainer, variant_config

    from nl_detectron.engine.ablation import VARIANTS, draw_losses, score_table, train_and_evaluate
    from nl_detectron.engine.console import errors_without_traceback

    kind = "keypoints" if args.keypoints else "instances"
    seed_folder = args.output / f"seed{args.seed}"
    folder = seed_folder / f"{kind}_x{args.budget:g}"
    with errors_without_traceback():
        folder.mkdir(parents=True, exist_ok=True)
        configs = {
            variant: variant_config(
                kind, variant, output=folder / variant, seed=args.seed, budget=args.budget
            )
            for variant in ([args.only] if args.only else VARIANTS)
        }
    # detectron2 logs to this file, which keeps the terminal for the results.
    logging.basicConfig(filename=folder / "log.txt", level=logging.INFO)

    for split, size in SPLIT_SIZES.items():
        data = seed_folder / "data" / f"{kind}_{split}"
        print(f"data: {data}", flush=True)
        write_dataset(data, kind, split, seed=args.seed, size=size)
        register_dataset(data, kind, split)

    runs = {}
    for number, (variant, cfg) in enumerate(configs.items(), start=1):
        label = VARIANTS[variant]
        print(f"{label}, training {number} of {len(configs)}", flush=True)
        start = time.monotonic()
        runs[label] = train_and_evaluate(cfg, AdamWTrainer, resume=True)
        print(f"  done in {(time.monotonic() - start) / 60:.1f} min")
    scores = {label: run.scores for label, run in runs.items()}
    print("\n" + score_table(scores, AdamWTrainer.metrics) + "\n", flush=True)

    path = folder / "losses.png"
    draw_losses(path, {label: run.losses["total_loss"] for label, run in runs.items()})
    print(path)
    files = {
        label: folder / variant / "inference" / "coco_instances_results.json"
        for variant, label in VARIANTS.items()
        if label in runs
    }
    for first in (0, 2, 4):
        path = folder / f"pictures{first // 2}.png"
        draw_predictions(path, data, files, (first, first + 1))
        print(path)


if __name__ == "__main__":
    args = parse_args()
    limit_thread_spinning()
    from nl_detectron.engine.console import suppress_detectron2_warnings

    with suppress_detectron2_warnings():
        main(args)
