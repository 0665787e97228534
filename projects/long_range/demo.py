"""Train a stock detector and its non-local twin where only a far look tells what an object is.

Makes the data set, trains both on it alike, and prints their AP side by side.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from long_range.dataset import SPLIT_SIZES, register, write_dataset
from long_range.pictures import draw_figure
from long_range.twins import SUFFIXES, train_twin

LABELS = {"stock": "stock", "non_local": "non-local"}
TASK_LABELS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="for data, weights and order")
    parser.add_argument("--output", type=Path, default=Path("output/long_range"))
    parser.add_argument("--budget", type=float, default=1.0, help="iterations, times the config's")
    parser.add_argument("--only", choices=SUFFIXES, help="train one twin, not both")
    parser.add_argument("--keypoints", action="store_true", help="which end of a bar is its head?")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    kind = "keypoints" if args.keypoints else "instances"
    seed_folder = args.output / f"seed{args.seed}"
    folder = seed_folder / f"{kind}_x{args.budget:g}"
    folder.mkdir(parents=True, exist_ok=True)
    # detectron2 tells everything to this file, which leaves the terminal for the result.
    logging.basicConfig(filename=folder / "log.txt", level=logging.INFO)

    for split, size in SPLIT_SIZES.items():
        data = seed_folder / "data" / f"{kind}_{split}"
        print(f"data: {data}", flush=True)
        write_dataset(data, kind, split, seed=args.seed, size=size)
        register(data, kind, split)

    results = {}
    for twin in [args.only] if args.only else SUFFIXES:
        print(f"{LABELS[twin]} twin", flush=True)
        start = time.monotonic()
        results[twin] = train_twin(
            kind, twin, output=folder / twin, seed=args.seed, budget=args.budget
        )
        print(f"  done in {(time.monotonic() - start) / 60:.1f} min")
    print_table(results)

    files = {LABELS[twin]: folder / twin / "coco_instances_results.json" for twin in results}
    for first in (0, 2, 4):
        path = folder / f"pictures{first // 2}.png"
        draw_figure(path, data, files, (first, first + 1))
        print(path)


def print_table(results: dict[str, dict[str, float]]) -> None:
    """One row a twin, one column a task, and the difference where there are two twins."""
    tasks = list(next(iter(results.values())))
    print("\n" + " " * 12 + "".join(f"{TASK_LABELS[task]:>13}" for task in tasks))
    rows = {LABELS[twin]: [scores[task] for task in tasks] for twin, scores in results.items()}
    for label, scores in rows.items():
        print(f"{label:<12}" + "".join(f"{score:13.1f}" for score in scores))
    if len(rows) == 2:
        stock, non_local = rows.values()
        gains = "".join(f"{b - a:+13.1f}" for a, b in zip(stock, non_local))
        print(f"{'difference':<12}{gains}")
    print(flush=True)


if __name__ == "__main__":
    main()
