"""Register data sets with detectron2, under a name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

``MetadataCatalog.get(name)`` then has ``classes``, the names of the classes, and ``multi_label``,
whether a video has any number of them. For what a record is, see
:mod:`video_classification.data.annotations`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from .annotations import Records, read_charades, read_classes, read_csv, read_folder

StrPath = str | os.PathLike[str]
Classes = Sequence[str] | os.PathLike[str]
"""Names of classes, or a file that has one on each line."""
Reader = Callable[[], tuple[Records, list[str]]]


def register_folder(name: str, root: StrPath, classes: Classes | None = None) -> None:
    """Register a folder that has a subfolder of videos for each class.

    Args:
        name: of the data set; one that is registered already is replaced.
        root: the folder.
        classes: names of the classes; the sorted names of the subfolders if not given.

    Raises:
        ValueError: see :func:`read_folder`.
    """
    _register(name, functools.partial(read_folder, Path(root), _names(classes)), multi_label=False)
    load(name)


def register_csv(
    name: str,
    file: StrPath,
    root: StrPath | None = None,
    classes: Classes | None = None,
    multi_label: bool = False,
) -> None:
    """Register a list of videos, see :func:`read_csv`.

    Args:
        name: of the data set; one that is registered already is replaced.
        file: the list.
        root: where relative paths begin; the folder of ``file`` if not given.
        classes: names of the classes.
        multi_label: a video has any number of labels, separated by semicolons.

    Raises:
        ValueError: see :func:`read_csv`.
    """
    folder = Path(root) if root is not None else None
    reader = functools.partial(read_csv, Path(file), folder, _names(classes), multi_label)
    _register(name, reader, multi_label)
    load(name)


def register_charades(
    name: str, file: StrPath, root: StrPath, classes: Classes | None = None
) -> None:
    """Register a csv file of Charades, see :func:`read_charades`.

    Args:
        name: of the data set; one that is registered already is replaced.
        file: such as ``Charades_v1_train.csv``.
        root: folder of the videos, ``<id>.mp4``.
        classes: names of the 157 classes; "c000" to "c156" if not given.

    Raises:
        ValueError: see :func:`read_charades`.
    """
    reader = functools.partial(read_charades, Path(file), Path(root), _names(classes))
    _register(name, reader, multi_label=True)
    load(name)


def register_built_in() -> None:
    """Register Kinetics-400 and Charades where ``DETECTRON2_DATASETS`` has them; read nothing yet.

    ============================================== =================================
    kinetics400_train, kinetics400_val             ``kinetics400/{train,val}.csv``, or else the
                                                   folders ``kinetics400/{train,val}``
    charades_train, charades_val                   ``charades/Charades_v1_{train,test}.csv`` and
                                                   the videos in ``charades/Charades_v1_480``
    ============================================== =================================
    """
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    for split in ("train", "val"):
        reader = functools.partial(_read_kinetics, root / "kinetics400", split)
        _register(f"kinetics400_{split}", reader, multi_label=False)
    for split, official in (("train", "train"), ("val", "test")):
        file = root / "charades" / f"Charades_v1_{official}.csv"
        reader = functools.partial(read_charades, file, root / "charades" / "Charades_v1_480")
        _register(f"charades_{split}", reader, multi_label=True)


def load(name: str) -> Records:
    """Return the records of a data set, and make sure that its metadata has the classes.

    Raises:
        ValueError: no such data set, or something is wrong in it.
    """
    if name not in DatasetCatalog:
        raise ValueError(f"no data set {name!r} is registered")
    return DatasetCatalog.get(name)


def _register(name: str, reader: Reader, multi_label: bool) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    metadata = MetadataCatalog.get(name)
    metadata.multi_label = multi_label

    @functools.cache  # so that files are read once
    def records() -> Records:
        records, metadata.classes = reader()
        return records

    DatasetCatalog.register(name, records)


def _names(classes: Classes | None) -> Sequence[str] | None:
    return read_classes(Path(classes)) if isinstance(classes, os.PathLike) else classes


def _read_kinetics(root: Path, split: str) -> tuple[Records, list[str]]:
    file = root / f"{split}.csv"
    return read_csv(file) if file.is_file() else read_folder(root / split)
