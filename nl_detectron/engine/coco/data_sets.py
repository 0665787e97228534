"""The data sets of a run: custom files by their paths, and what must be true of any of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from nl_detectron.engine.coco.files import register_coco_files
from nl_detectron.engine.coco.flipping import flip_pairs
from nl_detectron.engine.coco.metadata import check_names, dataset_metadata


def use_custom_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Let a config train and test on the COCO files that arguments name.

    Numbers of classes and keypoints become those of ``--train-json``; with ``--eval-only``, those
    of ``--test-json`` if it is alone. Without ``--test-json``, a model trained on ``--train-json``
    is not evaluated. Random flipping is turned off where it would confuse left and right.

    Args:
        cfg: is changed.
        args: of a training; the data sets are registered as ``custom_train``, ``custom_test``.

    Raises:
        OSError, ValueError: the arguments or files cannot be used.
    """
    for split in ("train", "test"):
        json_file, image_dir = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if (json_file is None) != (image_dir is None):
            raise ValueError(f"--{split}-json and --{split}-images go together")
        if json_file is None:
            continue
        name = f"custom_{split}"
        register_coco_files(name, json_file, image_dir, _needs(cfg, split))
        cfg.DATASETS[split.upper()] = (name,)
        if split == "train" or (args.eval_only and not args.train_json):
            take_numbers(cfg, name)
    if args.train_json and not args.test_json and "DATASETS.TEST" not in args.opts:
        cfg.DATASETS.TEST = ()
    if args.train_json and cfg.MODEL.KEYPOINT_ON and cfg.INPUT.RANDOM_FLIP == "horizontal":
        _, alone = flip_pairs(MetadataCatalog.get("custom_train").get("keypoint_names", ()))
        if alone:
            cfg.INPUT.RANDOM_FLIP = "none"


def check_data_sets(cfg: CfgNode, training: bool, model: Mapping[str, Any]) -> None:
    """Say what is wrong with the data sets now, rather than after the training.

    Args:
        cfg: of the run.
        training: whether those to train on are used, too.
        model: metadata of the model if it has some from a training before.

    Raises:
        OSError, ValueError: a data set is missing, or does not fit the model or the others.
    """
    splits = ("TRAIN", "TEST") if training else ("TEST",)
    if not cfg.DATASETS[splits[0]]:
        raise ValueError(
            f"DATASETS.{splits[0]} is empty: give --{splits[0].lower()}-json and "
            f"--{splits[0].lower()}-images"
        )
    for split in splits:
        for name in cfg.DATASETS[split]:
            _check_files(split, name)
            metadata = dataset_metadata(name)
            where = _where(split, name)
            if cfg.MODEL.KEYPOINT_ON and not metadata.get("keypoint_names"):
                raise ValueError(f"MODEL.KEYPOINT_ON, but {where} names no keypoints")
            try:
                check_names(cfg, metadata, where, model)
            except ValueError as error:
                if not training or split == "TRAIN":
                    raise
                train = _where("TRAIN", cfg.DATASETS.TRAIN[0])
                raise ValueError(f"{error}, which is trained on {train}") from error
            model = model or metadata
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST:
        num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        num_sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # COCO's person by default
        if num_keypoints != num_sigmas:
            raise ValueError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {num_sigmas} values, but the model has "
                f"{num_keypoints} keypoints; give one for each, such as "
                f'"({",".join(["0.05"] * num_keypoints)})"'
            )


def describe_data(cfg: CfgNode) -> list[str]:
    """Say what is done with the data sets and might surprise."""
    sentences = []
    if not cfg.DATASETS.TEST:
        sentences.append("Nothing will be evaluated: there is no --test-json, or DATASETS.TEST.")
    if cfg.MODEL.KEYPOINT_ON and "custom_train" in DatasetCatalog.list():
        pairs, alone = flip_pairs(MetadataCatalog.get("custom_train").keypoint_names)
        if alone and cfg.INPUT.RANDOM_FLIP == "none":
            sentences.append(
                "Images are not flipped (INPUT.RANDOM_FLIP none): by their names, these keypoints "
                f"are of one side, but have not one partner on the other: {', '.join(alone)}."
            )
        elif cfg.INPUT.RANDOM_FLIP == "horizontal":
            swapped = ", ".join(" and ".join(pair) for pair in pairs) or "none"
            sentences.append(f"Keypoints that swap where an image is flipped: {swapped}.")
    return sentences


def _needs(cfg: CfgNode, split: str) -> list[str]:
    """What each annotation must have; detectron2 and pycocotools find out late, with a KeyError."""
    needs = ["area", "iscrowd"] if split == "test" else ["bbox"]
    if cfg.MODEL.MASK_ON:
        needs.append("segmentation")
    if cfg.MODEL.KEYPOINT_ON:
        needs += ["keypoints", "num_keypoints"] if split == "test" else ["keypoints"]
    return needs


def take_numbers(cfg: CfgNode, name: str) -> None:
    """Let a config's model have as many classes and keypoints as a data set."""
    metadata = MetadataCatalog.get(name)
    num_classes = len(metadata.thing_classes)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    if cfg.MODEL.KEYPOINT_ON:
        names = metadata.get("keypoint_names", ())
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(names)


def _where(split: str, name: str) -> str:
    """What to call a data set in a message."""
    if name == f"custom_{split.lower()}":
        return f"--{split.lower()}-json {MetadataCatalog.get(name).json_file}"
    return f"{name} in DATASETS.{split}"


def _check_files(split: str, name: str) -> None:
    lower = split.lower()
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"DATASETS.{split}: no data set {name!r} is registered; name custom files with "
            f"--{lower}-json and --{lower}-images"
        )
    metadata = MetadataCatalog.get(name)
    if split == "TEST" and metadata.get("evaluator_type") != "coco":
        raise ValueError(
            f"DATASETS.TEST: {name!r} has the evaluator_type {metadata.get('evaluator_type')!r} "
            "in its metadata, this tool takes 'coco'; for others run `python -m tools.train_net`, "
            "detectron2's own, with the same arguments"
        )
    json_file = metadata.get("json_file")
    if json_file and not PathManager.isfile(json_file):
        raise FileNotFoundError(
            f"DATASETS.{split}: {name!r} needs {json_file}, which does not exist; name custom "
            f"files with --{lower}-json and --{lower}-images, or set DETECTRON2_DATASETS"
        )
