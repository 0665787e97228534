"""Measure what our trainer's precautions cost, and what its options gain: times of an iteration.

Our trainer and detectron2's train the same detector on the same data, each in an order of its own,
and take turns in one process; the one that begins changes from round to round. The output is the
median and quartiles of the ratios of their times, the same for saving a checkpoint, and the memory
of each, in processes of their own, after every fifth of the rounds, and at its peak.

With --of, our trainer with options of a run, or with other values of config keys, is compared with
our trainer without them, on the same images in the same order.

    python dev/benchmark_trainer.py --json train.json --images train/ --rounds 500 \\
        --config-file configs/quick_schedules/mask_rcnn_R_18_NL_FPN_overfit.yaml
    python dev/benchmark_trainer.py --json train.json --images train/ --rounds 20 \\
        --of channels_last fold_norms \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml \\
        MODEL.WEIGHTS "" SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN "(320,)" \\
        INPUT.MAX_SIZE_TRAIN 480 SOLVER.BASE_LR 1e-9
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from measure import in_new_process, process_memory, return_freed_memory

from nl_detectron.config import load_config
from nl_detectron.engine.coco.data_sets import set_num_classes
from nl_detectron.engine.coco.files import register_coco_files
from nl_detectron.engine.coco.trainer import CocoTrainer
from nl_detectron.engine.options import RunOptions

NAME = "benchmark_trainer"
SAVES = 7
OPTIONS = [field.name for field in dataclasses.fields(RunOptions) if field.type == "bool"]


class Turns:
    """Runs the iterations of a trainer one at a time, hooks included."""

    def __init__(self, trainer: DefaultTrainer):
        """Begin the training."""
        self._trainer = trainer
        trainer.resume_or_load(resume=False)
        self._storage = trainer.storage = EventStorage(0)
        with self._storage:
            trainer.before_train()

    def iteration(self, number: int) -> float:
        """Run an iteration; return the seconds."""
        trainer = self._trainer
        start = time.perf_counter()
        with self._storage:
            trainer.iter = number
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        return time.perf_counter() - start

    def save(self) -> float:
        """Save a checkpoint; return the seconds."""
        start = time.perf_counter()
        self._trainer.checkpointer.save("benchmark")
        return time.perf_counter() - start


def run_config(args: argparse.Namespace, output: Path) -> CfgNode:
    """The config of a training that is never evaluated and saved by hand."""
    cfg = load_config(args.config_file, args.opts)
    set_num_classes(cfg, NAME)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (NAME,), ()
    if args.of:
        cfg.SEED = max(cfg.SEED, 0)
    cfg.SOLVER.MAX_ITER = args.rounds + 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 10 * args.rounds
    cfg.OUTPUT_DIR = str(output)
    output.mkdir()
    torch.manual_seed(0)  # Both start from the same weights.
    return cfg


def stock(args: argparse.Namespace, folder: Path) -> DefaultTrainer:
    """detectron2's trainer."""
    return DefaultTrainer(run_config(args, folder / "stock"))


def ours(args: argparse.Namespace, folder: Path) -> DefaultTrainer:
    """Our trainer, which takes every precaution."""
    options = RunOptions(keep_last=2, max_bad_images=0.1)
    return CocoTrainer(run_config(args, folder / "ours"), options)


def changed(args: argparse.Namespace, folder: Path) -> DefaultTrainer:
    """Our trainer with what --of names."""
    options: dict[str, Any] = {name: True for name in args.of if name in OPTIONS}
    cfg = run_config(args, folder / "changed")
    cfg.merge_from_list([word for of in args.of if "=" in of for word in of.split("=", 1)])
    return CocoTrainer(cfg, RunOptions(keep_last=2, max_bad_images=0.1, **options))


def option_or_key(text: str) -> str:
    """Argparse type: an option of a run that can be on or off, or KEY=VALUE of a config."""
    if text not in OPTIONS and "=" not in text:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE or one of {OPTIONS}, got {text}")
    return text


def memory_of(
    build: Callable[[argparse.Namespace, Path], DefaultTrainer], args: argparse.Namespace
) -> list[int]:
    """Return the resident memory in MB after each fifth of the rounds, and at the peak."""
    return_freed_memory()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        turns = Turns(build(args, Path(folder)))
        for number in range(args.rounds):
            turns.iteration(number)
            if (number + 1) % (args.rounds // 5) == 0:
                found.append(process_memory("VmRSS") // 2**20)
    return [*found, process_memory("VmHWM") // 2**20]


def compare(name: str, times: list[float], base: list[float]) -> str:
    """Format the median and quartiles of the ratios of two lists of times."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, base)])
    return (
        f"{median:.3f} of the time of {name} (quartiles {low:.3f}, {high:.3f}; "
        f"{1000 * statistics.median(base):.0f} ms; {len(base)} rounds)"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", type=Path, required=True)
    parser.add_argument("--json", required=True, help="COCO annotations")
    parser.add_argument("--images", required=True, help="image folder of --json")
    parser.add_argument("--rounds", type=int, default=500, help="at least 5")
    parser.add_argument(
        "--of",
        nargs="+",
        type=option_or_key,
        default=[],
        metavar="OPTION|KEY=VALUE",
        help=f"of {', '.join(OPTIONS)} and config keys such as SOLVER.AMP.ENABLED=True, all "
        "together; default: compare with detectron2's trainer",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    register_coco_files(NAME, args.json, args.images)
    logging.disable(logging.WARNING)
    builders = (changed, ours) if args.of else (ours, stock)
    for build in builders:
        *memory, peak = in_new_process(memory_of, build, args)
        print(
            f"memory, {build.__name__}: {' '.join(map(str, memory))} MB, peak {peak} MB", flush=True
        )
    with tempfile.TemporaryDirectory() as folder:
        both = tuple(Turns(build(args, Path(folder))) for build in builders)
        for number in range(2):
            for one in both:
                one.iteration(number)
        times: dict[Turns, list[float]] = {one: [] for one in both}
        for number in range(2, args.rounds + 2):
            for one in both if number % 2 else both[::-1]:
                times[one].append(one.iteration(number))
        print(f"iteration: {compare(builders[1].__name__, *times.values())}", flush=True)
        saves: dict[Turns, list[float]] = {one: [] for one in both}
        for number in range(SAVES):
            for one in both if number % 2 else both[::-1]:
                saves[one].append(one.save())
        print(f"saving a checkpoint: {compare(builders[1].__name__, *saves.values())}")


if __name__ == "__main__":
    main()
