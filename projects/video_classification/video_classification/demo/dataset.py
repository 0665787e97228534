"""Write the generated clips as videos, and register them with detectron2."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..data import register_folder, write_video
from .clips import CLASSES, SPLITS, group_size, make_clip

FPS = 10


def write_dataset(folder: Path, task: str, split: str, *, seed: int, size: int) -> None:
    """Write a folder of videos for each class, unless ``folder`` exists.

    The videos are lossless. Otherwise what is far from a square could depend on its color, and a
    video would not show the same backwards.

    Args:
        folder: folder to write to.
        task: a key of `CLASSES`.
        split: one of `SPLITS`; splits with the same seed share no clip.
        seed: seed of the data set; the same seed gives the same bytes.
        size: number of videos, in whole groups.

    Raises:
        ValueError: unknown ``task`` or ``split``, or a ``size`` that is not a multiple of
            `group_size`.
    """
    for name, value, allowed in (("task", task, CLASSES), ("split", split, SPLITS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
    if size < 1 or size % group_size(task):
        raise ValueError(f"size must be a multiple of {group_size(task)}, got {size}")
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in CLASSES[task]:
        (partial / name).mkdir(parents=True)
    for index in range(size):
        frames, label = make_clip(task, split, seed, index)
        write_video(partial / CLASSES[task][label] / f"{index:06d}.mp4", frames, FPS, crf=0)
    partial.rename(folder)  # last: if the folder exists, it is complete


def register_dataset(folder: Path) -> str:
    """Register a data set that was written with detectron2; return its name, the folder's."""
    register_folder(folder.name, folder)
    return folder.name
