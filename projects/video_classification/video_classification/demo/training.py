"""Train and test the networks, several at a time, and keep the results of those that are done."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch

from nl_detectron.engine.ablation import train_and_evaluate
from nl_detectron.engine.checkpoint_files import write_atomically
from nl_detectron.engine.console import suppress_detectron2_warnings

from ..trainer import PairedVideoTrainer
from .clips import SPLITS
from .dataset import register_dataset
from .networks import network_config


class Run(NamedTuple):
    """One training.

    Attributes:
        task: a key of `CLASSES`.
        network: a key of `NETWORKS`.
        seed: of the initial weights and the order of clips.
        budget: multiple of the config's iterations.
        options: changes to the config, keys and values.
    """

    task: str
    network: str
    seed: int
    budget: float = 1.0
    options: tuple = ()

    def __str__(self) -> str:
        return f"{self.task}, {self.network}, seed {self.seed}, {self.budget:g}x"

    def folder(self, output: Path) -> Path:
        """Folder for everything that the training writes."""
        return output / f"{self.task}_{self.network}_seed{self.seed}_x{self.budget:g}"


class Result(NamedTuple):
    """What a training led to.

    Attributes:
        accuracy: on the test set, in percent.
        cross_entropy: likewise, in nats.
        seconds: of the training and the test.
        cpu_seconds: likewise, of the processor.
    """

    accuracy: float
    cross_entropy: float
    seconds: float
    cpu_seconds: float

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.1f}, cross-entropy {self.cross_entropy:.3f} "
            f"({self.seconds:.0f} s, {self.cpu_seconds:.0f} s of CPU)"
        )


def run_all(
    runs: Sequence[Run], data: Path, output: Path, jobs: int
) -> Iterator[tuple[Run, Result]]:
    """Train and test, each run in one thread; yield results as they come.

    Args:
        runs: trainings; those of one task should follow one another, as their videos are decoded
            once by every process.
        data: folder of the data sets, ``{task}_train`` and ``{task}_test``.
        output: folder to write to. What it has of results is not run again.
        jobs: number of processes; 1 is this one.
    """
    left = []
    for run in runs:
        file = run.folder(output) / "result.json"
        if file.exists():
            yield run, Result(**json.loads(file.read_text()))
        else:
            left.append(run)
    if jobs == 1:
        _set_up_process()
        for run in left:
            yield run, train(run, data, output)
    elif left:
        with ProcessPoolExecutor(jobs, get_context("spawn"), _set_up_worker) as pool:
            futures = {pool.submit(train, run, data, output): run for run in left}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)


def train(run: Run, data: Path, output: Path) -> Result:
    """Train and test a network, and write ``result.json`` when it is done."""
    folder = run.folder(output)
    cfg = network_config(run.network)
    cfg.merge_from_list(list(run.options))
    for split in SPLITS:
        cfg.DATASETS[split.upper()] = (register_dataset(data / f"{run.task}_{split}"),)
    cfg.SOLVER.MAX_ITER = max(1, round(cfg.SOLVER.MAX_ITER * run.budget))
    cfg.SOLVER.WARMUP_ITERS = cfg.SOLVER.MAX_ITER // 10
    cfg.SEED, cfg.OUTPUT_DIR = run.seed, str(folder)
    start = time.perf_counter(), time.process_time()
    with suppress_detectron2_warnings():
        scores = train_and_evaluate(cfg, PairedVideoTrainer, resume=True).scores
    tested = json.loads((folder / "inference" / f"{run.task}_test" / "results.json").read_text())
    result = Result(
        scores["video/top1"],
        cross_entropy(tested["predictions"]),
        time.perf_counter() - start[0],
        time.process_time() - start[1],
    )
    with write_atomically(folder / "result.json") as file:
        file.write(json.dumps(result._asdict()))
    return result


def cross_entropy(predictions: Sequence[dict]) -> float:
    """Return the mean of -ln(score of the right class) over the videos of a results.json."""
    scores = [
        next(guess["score"] for guess in video["top5"] if guess["class"] == video["label"])
        for video in predictions
    ]
    return sum(-math.log(max(score, 1e-38)) for score in scores) / len(scores)


def _set_up_worker() -> None:
    _set_up_process()

    def follow(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    # A worker does not notice by itself that the demo was killed.
    Thread(target=follow, args=[parent_process()], daemon=True).start()


def _set_up_process() -> None:
    torch.set_num_threads(1)
    # detectron2 would log to the terminal.
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger().setLevel(logging.INFO)
