"""detectron2's data loaders, for videos."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import TrainingSampler
from torch.utils.data import DataLoader, Dataset

from .decode import UnreadableVideo
from .mapper import Record, VideoMapper

logger = logging.getLogger("nl_detectron")


class TrainingVideos(Dataset):
    """Clips of the videos of a data set; a random other video stands in for an unreadable one.

    (``MapDataset`` of detectron2 0.6 would do so, too, but fails there on Python 3.11.) Each
    unreadable video is named once, whichever worker of the loader finds it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        mapper: VideoMapper,
        max_unreadable: float,
        seed: int = -1,
    ):
        """Set up the data set.

        Args:
            records: the videos.
            mapper: decodes them.
            max_unreadable: share of the videos that may be unreadable.
            seed: decides, with the place of a clip in the training, what is random about the clip;
                if negative, NumPy's global numbers do, which detectron2 seeds in every worker.

        Raises:
            ValueError: ``max_unreadable`` is not from 0 to 1.
        """
        if not 0 <= max_unreadable <= 1:
            raise ValueError(f"DATALOADER.MAX_UNREADABLE must be from 0 to 1, got {max_unreadable}")
        self._records = DatasetFromList(list(records), copy=False)
        self._mapper, self._max_unreadable, self._seed = mapper, max_unreadable, seed
        # In memory that is shared with the workers.
        self._unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        """Return a clip of a video, given by place and index, see :class:`TrainingOrder`."""
        place, index = draw
        rng = np.random.RandomState((self._seed, place)) if self._seed >= 0 else np.random
        while True:
            try:
                return self._mapper(self._records[index], rng)
            except UnreadableVideo as error:
                if not self._unreadable[index]:
                    self._unreadable[index] = True
                    logger.warning("Not used for training: %s", error)
                self.check()
            index = rng.randint(len(self))

    def unreadable(self) -> list[str]:
        """Return the names of the videos that could not be decoded so far."""
        return [self._records[int(i)]["file_name"] for i in self._unreadable.nonzero()]

    def check(self) -> None:
        """Raise an error if too many videos were unreadable so far.

        Raises:
            ValueError: their share is larger than ``max_unreadable``.
        """
        count = int(self._unreadable.sum())
        if count > self._max_unreadable * len(self):
            raise ValueError(
                f"{count} of {len(self)} training videos cannot be decoded, more than "
                f"DATALOADER.MAX_UNREADABLE {self._max_unreadable} allows: "
                + ", ".join(self.unreadable()[:5])
                + (", ..." if count > 5 else "")
            )


class TrainingOrder(TrainingSampler):
    """detectron2's endless random order of the videos, as pairs of place in the order and index.

    Attributes:
        start: the first place.
    """

    start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = enumerate(self._infinite_indices())
        return itertools.islice(places, self.start + self._rank, None, self._world_size)


class TrainLoader:
    """An endless stream of batches, each a list of clips.

    With a ``SEED``, a batch depends on its number and the number of workers alone: a training that
    is resumed gets the batches that it would have got without the interruption.

    Attributes:
        start: number of the first batch, from 0; set it before the first one is taken.
        videos: the data set.
        num_workers: number of processes that decode; 0 for none but this one.
    """

    def __init__(
        self, loader: DataLoader, videos: TrainingVideos, order: TrainingOrder, batch_size: int
    ):
        self._loader, self._order, self._batch_size = loader, order, batch_size
        self.start = 0
        self.videos = videos
        self.num_workers = loader.num_workers

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # Workers take turns, so a round of theirs has to be begun where they began it before.
        done_in_round = self.start % max(1, self.num_workers)
        self._order.start = (self.start - done_in_round) * self._batch_size
        with torch.random.fork_rng(devices=[]):  # dropout's random numbers stay as they were
            batches = iter(self._loader)
        for number in itertools.count():
            try:
                batch = next(batches)
            except Exception:
                self.videos.check()  # the message alone, without a worker's traceback
                raise
            if number >= done_in_round:
                yield batch


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
    videos = TrainingVideos(
        get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False),
        VideoMapper(cfg, is_train=True),
        cfg.DATALOADER.MAX_UNREADABLE,
        cfg.SEED,
    )
    order = TrainingOrder(len(videos), seed=cfg.SEED if cfg.SEED >= 0 else None)
    loader = build_detection_train_loader(
        videos,
        mapper=None,  # the data set maps
        sampler=order,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,  # all clips have one size
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return TrainLoader(loader, videos, order, cfg.SOLVER.IMS_PER_BATCH)


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


def benchmark_loader(loader: TrainLoader, seconds: float = 30) -> LoaderSpeed:
    """Measure how fast a loader delivers clips to a model that takes no time.

    The batches that workers prepare ahead do not count: the first three of each are skipped.

    Args:
        loader: as built by :func:`build_train_loader`.
        seconds: how long to measure.
    """
    batches = iter(loader)
    for _ in range(1 + 3 * loader.num_workers):
        next(batches)
    clips, start = 0, time.perf_counter()
    while not clips or time.perf_counter() - start < seconds:
        clips += len(next(batches))
    return LoaderSpeed(clips, time.perf_counter() - start, loader.num_workers)
