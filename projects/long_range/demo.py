"""Train a stock detector and its non-local twin where only a far look tells what an object is.

Makes the data set, trains both on it alike, and prints their AP side by side.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from nl_detectron_cli.threads import let_threads_sleep


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="for data, weights and order")
    parser.add_argument("--output", type=Path, default=Path("output/long_range"), help="folder")
    parser.add_argument("--budget", type=float, default=1.0, help="iterations, times the config's")
    parser.add_argument("--only", choices=("stock", "non_local"), help="train one twin, not both")
    parser.add_argument("--keypoints", action="store_true", help="which end of a bar is its head?")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from long_range.comparison import draw_figure
    from long_range.dataset import SPLIT_SIZES, register, write_dataset
    from long_range.training import AdamWTrainer, twin_config

    from nl_detectron.engine.ablation import LABELS, ap_table, draw_losses, train_twin
    from nl_detectron.engine.console import mistakes_in_one_sentence

    kind = "keypoints" if args.keypoints else "instances"
    seed_folder = args.output / f"seed{args.seed}"
    folder = seed_folder / f"{kind}_x{args.budget:g}"
    with mistakes_in_one_sentence():
        folder.mkdir(parents=True, exist_ok=True)
        configs = {
            twin: twin_config(kind, twin, output=folder / twin, seed=args.seed, budget=args.budget)
            for twin in ([args.only] if args.only else LABELS)
        }
    # detectron2 tells everything to this file, which leaves the terminal for the result.
    logging.basicConfig(filename=folder / "log.txt", level=logging.INFO)

    for split, size in SPLIT_SIZES.items():
        data = seed_folder / "data" / f"{kind}_{split}"
        print(f"data: {data}", flush=True)
        write_dataset(data, kind, split, seed=args.seed, size=size)
        register(data, kind, split)

    runs = {}
    for number, (twin, cfg) in enumerate(configs.items(), start=1):
        label = LABELS[twin]
        print(f"{label} twin, training {number} of {len(configs)}", flush=True)
        start = time.monotonic()
        runs[label] = train_twin(cfg, trainer_class=AdamWTrainer)
        print(f"  done in {(time.monotonic() - start) / 60:.1f} min")
    print("\n" + ap_table({label: run.ap for label, run in runs.items()}) + "\n", flush=True)

    path = folder / "losses.png"
    draw_losses(path, {label: run.losses["total_loss"] for label, run in runs.items()})
    print(path)
    files = {
        label: folder / twin / "inference" / "coco_instances_results.json"
        for twin, label in LABELS.items()
        if label in runs
    }
    for first in (0, 2, 4):
        path = folder / f"pictures{first // 2}.png"
        draw_figure(path, data, files, (first, first + 1))
        print(path)


if __name__ == "__main__":
    args = parse_args()
    let_threads_sleep()
    from nl_detectron.engine.console import quiet_detectron2

    with quiet_detectron2():
        main(args)
