"""The data sets of a run: register custom files, and validate every data set of the config."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from nl_detectron.config import PREDICTORS
from nl_detectron.engine.coco.checking import Source, check_sources
from nl_detectron.engine.coco.files import register_coco_files
from nl_detectron.engine.coco.findings import KINDS, UNREADABLE
from nl_detectron.engine.coco.flipping import flip_pairs
from nl_detectron.engine.coco.metadata import check_names, dataset_metadata
from nl_detectron.safety.checkpoints import one_kind_of_error
from nl_detectron.safety.pickles import read_pickle

logger = logging.getLogger("nl_detectron")
IMAGE_SECONDS = 20.0  # to check the image files of a data set before a training


def check_is_detector(cfg: CfgNode) -> None:
    """Refuse the models of projects, which have commands of their own.

    Raises:
        ValueError: ``MODEL.META_ARCHITECTURE`` is one of them.
    """
    if cfg.MODEL.META_ARCHITECTURE in PREDICTORS:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} is not a detector: use the "
            "scripts of the project that it belongs to"
        )


def register_custom_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Register the COCO files given as arguments, and make the config use them.

    The numbers of classes and keypoints are set from ``--train-json``, or with ``--eval-only`` from
    ``--test-json`` if only that is given. Without ``--test-json``, a model trained on
    ``--train-json`` is not evaluated. Random flipping is disabled if it would mix up left and
    right.

    Args:
        cfg: config, modified in place.
        args: arguments of a training; the data sets are registered as ``custom_train`` and
            ``custom_test``.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the arguments or files are invalid.
    """
    for split in ("train", "test"):
        json_file, image_dir = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if (json_file is None) != (image_dir is None):
            raise ValueError(f"--{split}-json and --{split}-images must be given together")
        if json_file is None:
            continue
        name = f"custom_{split}"
        register_coco_files(name, json_file, image_dir)
        cfg.DATASETS[split.upper()] = (name,)
        if split == "train" or (args.eval_only and not args.train_json):
            set_num_classes(cfg, name)
    if args.train_json and not args.test_json and "DATASETS.TEST" not in args.opts:
        cfg.DATASETS.TEST = ()
    if args.train_json and cfg.MODEL.KEYPOINT_ON and cfg.INPUT.RANDOM_FLIP == "horizontal":
        _, unpaired = flip_pairs(MetadataCatalog.get("custom_train").get("keypoint_names", ()))
        if unpaired:
            cfg.INPUT.RANDOM_FLIP = "none"


def validate_data_sets(cfg: CfgNode, training: bool, model: Mapping[str, Any]) -> None:
    """Check the data sets before training, rather than fail after it.

    Args:
        cfg: config of the run.
        training: also check the data sets of ``DATASETS.TRAIN``.
        model: metadata stored with the model by an earlier training, if any.

    Raises:
        OSError: a file of a data set is missing.
        ValueError: a data set does not fit the model or the other data sets.
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
            where = _describe_split(split, name)
            if cfg.MODEL.KEYPOINT_ON and not metadata.get("keypoint_names"):
                raise ValueError(f"MODEL.KEYPOINT_ON is True, but {where} defines no keypoints")
            try:
                check_names(cfg, metadata, where, model)
            except ValueError as error:
                if not training or split == "TRAIN":
                    raise
                train = _describe_split("TRAIN", cfg.DATASETS.TRAIN[0])
                raise ValueError(f"{error}, which is trained on {train}") from error
            model = model or metadata
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST:
        num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        num_sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # COCO's person by default
        if num_keypoints != num_sigmas:
            raise ValueError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {num_sigmas} values, but the model has "
                f"{num_keypoints} keypoints; give one value per keypoint, such as "
                f'"({",".join(["0.05"] * num_keypoints)})"'
            )


def sources(cfg: CfgNode, training: bool) -> list[Source]:
    """Return the data sets of a run that are COCO files, with what the model needs of them."""
    splits: dict[str, list[str]] = {}
    for split in ("train", "test") if training else ("test",):
        for name in cfg.DATASETS[split.upper()]:
            splits.setdefault(name, []).append(split)
    found = []
    for name, used in splits.items():
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
            continue  # someone's code, or of another format
        polygons = cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon" and "train" in used
        found.append(
            Source(
                PathManager.get_local_path(metadata.json_file),
                PathManager.get_local_path(metadata.image_root),
                tuple(used),
                _required_keys(cfg, used),
                "polygon" if polygons else "",
            )
        )
    return found


def check_data(
    cfg: CfgNode, training: bool, treat: Mapping[str, str], max_bad_images: float
) -> None:
    """Check the files of a run's data sets, within a limited time; log warnings.

    Args:
        cfg: config of the run.
        training: also check the data sets of ``DATASETS.TRAIN``.
        treat: severities that differ from the usual ones.
        max_bad_images: share of the training images that may be unreadable.

    Raises:
        OSError: a folder of images does not exist.
        ValueError: there are errors in them.
    """
    check_proposals(cfg, training)
    used = sources(cfg, training)
    *each, overlap = check_sources(used, IMAGE_SECONDS)
    for source, findings in zip([*used, None], [*each, overlap]):
        levels = treat
        bad = sum(findings.counts.get(kind, 0) for kind in UNREADABLE)
        if source and source.splits == ("train",) and bad <= max_bad_images * findings.files:
            levels = dict.fromkeys(UNREADABLE, "warning") | dict(treat)
        if warnings := findings.of_severity("warning", levels):
            logger.warning("%s", findings.sentence(warnings))
        if findings.unchecked:
            logger.warning("%s: %s", findings.title, "; ".join(findings.notes))
        if errors := findings.of_severity("error", levels):
            changeable = [kind for kind in errors if not KINDS[kind].fixed]
            accept = f", and --treat {changeable[0]}=warning accepts it" if changeable else ""
            raise ValueError(
                f"{findings.sentence(errors)}; `nl-detectron check-data` lists everything{accept}"
            )


def check_proposals(cfg: CfgNode, training: bool) -> None:
    """Check the proposal files of a run: detectron2 runs code that they may contain.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file holds anything but boxes and their scores.
    """
    box_mode = {(BoxMode.__module__, BoxMode.__name__): BoxMode}
    older = {"indexes": "ids", "scores": "objectness_logits"}
    for split in ("TRAIN", "TEST") if training else ("TEST",):
        key = f"PROPOSAL_FILES_{split}"
        for file in cfg.DATASETS[key] if cfg.MODEL.LOAD_PROPOSALS else ():
            try:
                with one_kind_of_error():
                    content = read_pickle(PathManager.get_local_path(file), box_mode)
                    content = {older.get(name, name): value for name, value in content.items()}
                    parts = [content[name] for name in ("ids", "boxes", "objectness_logits")]
                    fit = all(
                        np.shape(boxes) == (len(scores), 4)
                        for _, boxes, scores in zip(*parts, strict=True)
                    )
            except ValueError as error:
                raise ValueError(f"DATASETS.{key}: {file}: {error}") from error
            if not fit:
                raise ValueError(f"DATASETS.{key}: {file} must hold N x 4 boxes for N scores")


def data_set_notes(cfg: CfgNode) -> list[str]:
    """Return messages about the data sets that the user should see in the log."""
    notes = []
    if not cfg.DATASETS.TEST:
        notes.append("No evaluation: neither --test-json nor DATASETS.TEST is given.")
    if cfg.MODEL.KEYPOINT_ON and "custom_train" in DatasetCatalog.list():
        pairs, unpaired = flip_pairs(MetadataCatalog.get("custom_train").keypoint_names)
        if unpaired and cfg.INPUT.RANDOM_FLIP == "none":
            notes.append(
                "Images are not flipped (INPUT.RANDOM_FLIP none): these left or right keypoints "
                f"have no unique counterpart: {', '.join(unpaired)}."
            )
        elif cfg.INPUT.RANDOM_FLIP == "horizontal":
            swapped = ", ".join(" and ".join(pair) for pair in pairs) or "none"
            notes.append(f"Keypoints swapped when an image is flipped: {swapped}.")
    return notes


def _required_keys(cfg: CfgNode, splits: Collection[str]) -> tuple[str, ...]:
    """Return the keys every annotation needs; otherwise a KeyError would follow much later."""
    test = "test" in splits
    keys = ["area", "iscrowd"] * test + ["segmentation"] * cfg.MODEL.MASK_ON
    if cfg.MODEL.KEYPOINT_ON:
        keys += ["keypoints", *["num_keypoints"] * test]
    return tuple(keys)


def set_num_classes(cfg: CfgNode, name: str) -> None:
    """Set a config's numbers of classes and keypoints to those of a data set."""
    metadata = MetadataCatalog.get(name)
    num_classes = len(metadata.thing_classes)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    if cfg.MODEL.KEYPOINT_ON:
        names = metadata.get("keypoint_names", ())
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(names)


def _describe_split(split: str, name: str) -> str:
    """Return the name of a data set for an error message."""
    if name == f"custom_{split.lower()}":
        return f"--{split.lower()}-json {MetadataCatalog.get(name).json_file}"
    return f"{name} in DATASETS.{split}"


def _check_files(split: str, name: str) -> None:
    lower = split.lower()
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"DATASETS.{split}: no data set {name!r} is registered; give custom files with "
            f"--{lower}-json and --{lower}-images"
        )
    metadata = MetadataCatalog.get(name)
    if split == "TEST" and metadata.get("evaluator_type") != "coco":
        raise ValueError(
            f"DATASETS.TEST: the evaluator_type of {name!r} must be 'coco', got "
            f"{metadata.get('evaluator_type')!r}; for other types run detectron2's own script, "
            "`python -m tools.train_net`, with the same arguments"
        )
    json_file = metadata.get("json_file")
    if json_file and not PathManager.isfile(json_file):
        raise FileNotFoundError(
            f"DATASETS.{split}: {name!r} needs {json_file}, which does not exist; give custom "
            f"files with --{lower}-json and --{lower}-images, or set DETECTRON2_DATASETS"
        )
