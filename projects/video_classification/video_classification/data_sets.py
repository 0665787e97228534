"""The data sets of a run: register custom ones, and check that they fit the model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .data import load, register_csv, register_folder
from .data.annotations import read_classes


def register_custom_data(cfg: CfgNode, args: argparse.Namespace, model: Mapping[str, Any]) -> None:
    """Register the videos given as arguments, and make the config use them.

    Their classes are those of ``--classes``, or of the model, or else of ``--train-data``; the
    config's number of classes is set to theirs. Without ``--test-data``, a model trained on
    ``--train-data`` is not evaluated.

    Args:
        cfg: config, modified in place.
        args: arguments of a training; the data sets are registered as ``custom_train`` and
            ``custom_test``.
        model: metadata stored with the model by an earlier training, if any.

    Raises:
        ValueError: something is wrong in the data.
    """
    classes = read_classes(Path(args.classes)) if args.classes else model.get("classes")
    if args.classes and not (args.train_data or args.test_data):
        raise ValueError("--classes needs --train-data or --test-data")
    for split in ("train", "test"):
        path = getattr(args, f"{split}_data")
        if path is None or (split == "train" and args.eval_only):
            continue
        name = f"custom_{split}"
        try:
            if Path(path).is_dir():
                register_folder(name, path, classes)
            else:
                register_csv(name, path, None, classes, cfg.MODEL.VIDEO.HEAD.MULTI_LABEL)
        except ValueError as error:
            raise ValueError(f"--{split}-data: {error}") from error
        cfg.DATASETS[split.upper()] = (name,)
        if split == "train" and not classes:
            classes = MetadataCatalog.get(name).classes
        if classes:
            cfg.MODEL.VIDEO.HEAD.NUM_CLASSES = len(classes)
    if args.train_data and not args.test_data and "DATASETS.TEST" not in args.opts:
        cfg.DATASETS.TEST = ()


def check_data_sets(cfg: CfgNode, training: bool, model: Mapping[str, Any]) -> None:
    """Check the data sets before training, rather than fail after it.

    Args:
        cfg: config of the run.
        training: also check the data sets of ``DATASETS.TRAIN``.
        model: metadata stored with the model by an earlier training, if any.

    Raises:
        ValueError: a data set is wrong, or does not fit the model or the other data sets.
    """
    splits = ("TRAIN", "TEST") if training else ("TEST",)
    if not cfg.DATASETS[splits[0]]:
        option = f"--{splits[0].lower()}-data"
        raise ValueError(f"DATASETS.{splits[0]} is empty: give {option}")
    known = model.get("classes")
    for split in splits:
        for name in cfg.DATASETS[split]:
            try:
                load(name)
            except ValueError as error:
                hint = "" if name.startswith("custom_") else f"; give --{split.lower()}-data"
                raise ValueError(f"DATASETS.{split}: {error}{hint}") from error
            metadata = MetadataCatalog.get(name)
            if metadata.multi_label != cfg.MODEL.VIDEO.HEAD.MULTI_LABEL:
                raise ValueError(
                    f"DATASETS.{split}: MODEL.VIDEO.HEAD.MULTI_LABEL must be "
                    f"{metadata.multi_label} for {name}"
                )
            _check_classes(f"DATASETS.{split}: {name}", metadata.classes, known, cfg)
            known = known or metadata.classes


def _check_classes(
    where: str, classes: Sequence[str], known: Sequence[str] | None, cfg: CfgNode
) -> None:
    number = len(known) if known else cfg.MODEL.VIDEO.HEAD.NUM_CLASSES
    if len(classes) != number:
        raise ValueError(
            f"{where} has {len(classes)} classes, but the model has {number}; --classes names all "
            "classes of the model"
        )
    for i, (own, other) in enumerate(zip(known or classes, classes)):
        if own != other:
            raise ValueError(
                f"{where}: its classes are not the model's: number {i} is {other!r} there, {own!r} "
                "in the model"
            )
