"""detectron2's data loaders, for videos."""

from __future__ import annotations

import time
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from torch.utils.data import DataLoader

from nl_detectron.engine import loader
from nl_detectron.engine.loader import TrainLoader

from .mapper import VideoMapper


def build_train_loader(cfg: CfgNode) -> TrainLoader:
    """Build the loader of ``DATASETS.TRAIN``; one batch has ``SOLVER.IMS_PER_BATCH`` clips.

    Raises:
        ValueError: a key has a value that is unknown, or of no use for videos.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN must be 'TrainingSampler' for videos, got "
            f"{cfg.DATALOADER.SAMPLER_TRAIN!r}"
        )
    # All clips of a batch have one size.
    mapper = VideoMapper(cfg, is_train=True)
    return loader.build_train_loader(cfg, mapper, aspect_ratio_grouping=False)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build the loader of a data set for testing: every video once, batches of one."""
    return build_detection_test_loader(
        get_detection_dataset_dicts(dataset_name, filter_empty=False),
        mapper=VideoMapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


class LoaderSpeed(NamedTuple):
    """What :func:`benchmark_loader` measured, in one process of the training."""

    clips: int
    seconds: float
    num_workers: int

    def __str__(self) -> str:
        speed = self.clips / self.seconds
        each = f", {speed / self.num_workers:.2f} per worker" if self.num_workers else ""
        return (
            f"{self.clips} clips in {self.seconds:.1f} s: {speed:.2f} clips/s with "
            f"{self.num_workers} workers{each}"
        )


def benchmark_loader(clips: TrainLoader, seconds: float = 30) -> LoaderSpeed:
    """Measure how fast a loader delivers clips to a model that takes no time.

    The batches that workers prepare ahead do not count: the first three of each are skipped.

    Args:
        clips: as built by :func:`build_train_loader`.
        seconds: how long to measure.
    """
    batches = iter(clips)
    for _ in range(1 + 3 * clips.num_workers):
        next(batches)
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        count += len(next(batches))
    return LoaderSpeed(count, time.perf_counter() - start, clips.num_workers)
