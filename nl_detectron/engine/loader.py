"""detectron2's data loaders, with batches that a seed and their number decide.

The order of the samples is that of detectron2's samplers. Batches are formed before anything is
read, so a training that is resumed goes on with the batch that it would have had, at once; and what
is random about a sample depends on the seed and its place in the order, so the number of worker
processes makes no difference.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from nl_detectron.engine.randomness import seeded_generators

logger = logging.getLogger("nl_detectron")

Mapper = Callable[[dict[str, Any]], Any]
"""Reads the files of a record, and returns what a model takes."""
MAX_NAMED_FILES = 10
_READING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,  # a broken PNG, says PIL
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class UnreadableFile(ValueError):
    """A file of the data that cannot be read. The message names it."""


class TrainLoader:
    """An endless stream of batches, each a list of samples.

    Another sample, chosen at random, stands in for one whose files cannot be read.

    Attributes:
        start: number of the first batch, from 0.
        seed: of the order and of the samples, at least 0.
        max_unreadable: share of the records that may be unreadable. Like the two above, to be set
            before the first batch is taken.
        num_workers: number of processes that read; 0 for none but this one.
        unreadable: what cannot be read, by index, and why.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Mapper,
        make_sampler: Callable[[Dataset, int], Iterable[int]],
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        aspect_ratio_grouping: bool = False,
    ):
        """Create the loader.

        Args:
            records: entries of a data set, with "file_name".
            mapper: reads the files of a record.
            make_sampler: returns this process's endless order of indices of records for a seed.
            batch_size: of this process.
            seed: see above.
            num_workers: see above.
            aspect_ratio_grouping: have only wide or only tall images in a batch, as detectron2's
                ``AspectRatioGroupedDataset`` does, by "width" and "height" of the records.

        Raises:
            ValueError: there is a record without size, by which it could be grouped.
        """
        self.start, self.seed, self.max_unreadable = 0, seed, 0.0
        self.num_workers = num_workers
        self.unreadable: dict[int, UnreadableFile] = {}
        self._groups = [_is_wide(record) for record in records] if aspect_ratio_grouping else None
        self._records = DatasetFromList(list(records), copy=False)
        self._mapper, self._make_sampler, self._batch_size = mapper, make_sampler, batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield batches from the first one on, without end.

        Raises:
            UnreadableFile: too many files cannot be read; names the first ones.
        """
        allowed = min(self.max_unreadable * len(self._records), len(self._records) - 1)
        loader = DataLoader(
            _TrainingSamples(self._records, self._mapper, self.seed, allowed),
            batch_sampler=itertools.islice(self._batches(), self.start, None),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # or it would draw one of the global numbers
        )
        for batch in loader:
            for _, errors in batch:
                self._note(errors, allowed)
            yield [sample for sample, _ in batch]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the samples of each batch: place in the order of all processes, and index."""
        places = itertools.count(comm.get_rank(), comm.get_world_size())
        groups: tuple[list, list] = ([], [])
        for place, index in zip(places, self._make_sampler(self._records, self.seed)):
            group = groups[self._groups[index] if self._groups else 0]
            group.append((place, index))
            if len(group) == self._batch_size:
                yield group[:]
                group.clear()

    def _note(self, errors: Mapping[int, UnreadableFile], allowed: float) -> None:
        for index, error in errors.items():
            if index not in self.unreadable:
                self.unreadable[index] = error
                if self.max_unreadable:
                    logger.warning("Not used for training: %s", error)
        if len(self.unreadable) > allowed:
            found = list(self.unreadable.values())
            if not self.max_unreadable:
                raise UnreadableFile(f"{found[0]} (--bad-images skip trains on others instead)")
            raise UnreadableFile(
                f"{len(found)} of {len(self._records)} training files cannot be read, more than "
                f"--max-bad-images {self.max_unreadable:g} allows: {name_files(found)}"
            )


def build_train_loader(
    cfg: CfgNode, mapper: Mapper, *, aspect_ratio_grouping: bool | None = None
) -> TrainLoader:
    """Build the loader of ``DATASETS.TRAIN``, with the sampler of ``DATALOADER.SAMPLER_TRAIN``.

    Args:
        cfg: config; a negative ``SEED`` counts as 0.
        mapper: reads the files of a record.
        aspect_ratio_grouping: if not ``DATALOADER.ASPECT_RATIO_GROUPING``.
    """
    from_config = build_detection_train_loader.from_config

    def make_sampler(records: Dataset, seed: int) -> Iterable[int]:
        # Some samplers take SEED, some (all of them in detectron2 0.6) draw a number instead.
        seeded = cfg.clone()
        seeded.defrost()
        seeded.SEED = seed
        with seeded_generators(seed):
            return from_config(seeded, mapper=mapper, dataset=records)["sampler"]

    if aspect_ratio_grouping is None:
        aspect_ratio_grouping = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    return TrainLoader(
        from_config(cfg, mapper=mapper, sampler=())["dataset"],
        mapper,
        make_sampler,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        seed=max(cfg.SEED, 0),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        aspect_ratio_grouping=aspect_ratio_grouping,
    )


class TestLoader:
    """Batches of a loader whose mapper is a :class:`ReadOrError`; raises the error of a sample."""

    def __init__(self, loader: DataLoader):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self._loader:
            for sample in batch:
                if isinstance(sample, UnreadableFile):
                    raise sample
            yield batch


class ReadOrError:
    """A mapper that returns an :class:`UnreadableFile` where another one raises an error.

    Raised in a worker of a loader, it would arrive with a traceback for a message.
    """

    def __init__(self, mapper: Mapper):
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        """Return what the mapper returns, or the error."""
        try:
            return self._mapper(record)
        except _READING_ERRORS as error:
            return _unreadable(record["file_name"], error)


class _TrainingSamples(Dataset):
    """Samples, each with the errors of those whose place it takes, by index."""

    def __init__(self, records: DatasetFromList, mapper: Mapper, seed: int, allowed: float):
        self._records, self._read = records, ReadOrError(mapper)
        self._seed, self._allowed = seed, allowed

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Any, dict[int, UnreadableFile]]:
        place, index = draw
        errors: dict[int, UnreadableFile] = {}
        with seeded_generators(self._seed, place):
            while len(errors) <= self._allowed:
                sample = self._read(self._records[index])
                if not isinstance(sample, UnreadableFile):
                    return sample, errors
                errors[index] = sample
                index = np.random.randint(len(self._records))
        return None, errors  # which end the training


def leave_signals_to_the_parent(worker: int = 0) -> None:
    """Ignore, in a worker of a data loader, the signals that ask a training to stop.

    They reach all processes of a terminal or of a job at once. The training still needs the worker
    to finish its iteration, and ends it then.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in threads started later

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def name_files(errors: Sequence[Exception | str]) -> str:
    """Return the first errors, and the number of the others."""
    rest = len(errors) - MAX_NAMED_FILES
    return "; ".join([*map(str, errors[:MAX_NAMED_FILES]), *[f"and {rest} more"] * (rest > 0)])


def _unreadable(file_name: str, error: Exception) -> UnreadableFile:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "not an image"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return UnreadableFile(reason if reason.startswith(file_name) else f"{file_name}: {reason}")


def _is_wide(record: Mapping[str, Any]) -> bool:
    try:
        return record["width"] > record["height"]
    except KeyError as error:
        raise ValueError(
            "DATALOADER.ASPECT_RATIO_GROUPING must be False for a data set without sizes: "
            f"{record['file_name']} has no {error}"
        ) from error


def _as_list(batch: list[Any]) -> list[Any]:
    return batch
