"""What the numbers of a model mean: names of classes and keypoints, kept with its weights.

detectron2 knows them by the name of a data set, and a new process does not know a custom one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog

from nl_detectron.engine.checkpoint import stored_metadata

_KEYS = (
    "thing_classes",
    "keypoint_names",
    "keypoint_flip_map",
    "keypoint_connection_rules",
    "keypoint_oks_sigmas",
)


def dataset_metadata(name: str) -> dict[str, Any]:
    """Return what has to travel of a data set's metadata, as lists, numbers and text alone.

    Args:
        name: of the data set in detectron2's catalog.

    Returns:
        By name as there, what is known; ``category_ids`` has the json's id of each class.
    """
    metadata = MetadataCatalog.get(name)
    known = {key: _plain(metadata.get(key)) for key in _KEYS if metadata.get(key) is not None}
    class_of_id = metadata.get("thing_dataset_id_to_contiguous_id")
    if class_of_id:
        known["category_ids"] = sorted(class_of_id, key=class_of_id.get)
    return known


def model_metadata(cfg: CfgNode, weights: str | None = None) -> Metadata:
    """Return what is known of a trained model's classes and keypoints, for detectron2's functions.

    It is what training stored with the weights. For others, it is what detectron2 knows of the
    config's data sets, if their number of classes and keypoints is the model's.

    Args:
        cfg: of the model; its data sets need not be known to this process.
        weights: checkpoint; without it, the config's.

    Returns:
        Metadata, empty where nothing is known.
    """
    weights = cfg.MODEL.WEIGHTS if weights is None else weights
    known = stored_metadata(weights)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if not known and name in MetadataCatalog.list():
            known = _if_it_fits(cfg, dataset_metadata(name))
    class_of_id = {i: n for n, i in enumerate(known.get("category_ids", ()))}
    metadata = Metadata(name=weights)
    metadata.set(**{key: _with_tuples(key, known[key]) for key in _KEYS if key in known})
    if class_of_id:
        metadata.thing_dataset_id_to_contiguous_id = class_of_id
    return metadata


def check_names(
    cfg: CfgNode,
    found: Mapping[str, Any] | Metadata,
    where: str,
    model: Mapping[str, Any] | Metadata | None = None,
) -> None:
    """Refuse a data set whose classes or, for a keypoint model, keypoints are not the model's.

    Args:
        cfg: of the model.
        found: metadata of the data set; what it does not know is not checked.
        where: what to call it in a message.
        model: metadata of the model; without it, numbers alone are compared.

    Raises:
        ValueError: other numbers or other names.
    """
    for key, what, number in _named_parts(cfg):
        names = found.get(key)
        if not names:
            continue
        known = (model or {}).get(key)
        number = len(known) if known else number
        if len(names) != number:
            raise ValueError(f"{where} has {len(names)} {what}, but the model has {number}")
        for i, (own, other) in enumerate(zip(known or names, names), start=1):
            if own != other:
                raise ValueError(
                    f"the {what} of {where} are not the model's: number {i} is {other!r} there, "
                    f"{own!r} in the model"
                )


def _named_parts(cfg: CfgNode) -> list[tuple[str, str, int]]:
    """Key of the metadata, what it is, and how many of it the model has."""
    parts = []
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        parts.append(("thing_classes", "classes", cfg.MODEL.RETINANET.NUM_CLASSES))
    elif cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork":
        parts.append(("thing_classes", "classes", cfg.MODEL.ROI_HEADS.NUM_CLASSES))
    if cfg.MODEL.KEYPOINT_ON:
        number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        parts.append(("keypoint_names", "keypoints", number))
    return parts


def _if_it_fits(cfg: CfgNode, metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        check_names(cfg, metadata, "")
    except ValueError:
        return {}
    return metadata


def _plain(value: Sequence) -> list:
    return [_plain(v) if isinstance(v, (list, tuple)) else v for v in value]


def _with_tuples(key: str, value: list) -> list:
    """Undo :func:`_plain`: pairs and colours are tuples in detectron2."""
    if key == "keypoint_flip_map":
        return [tuple(pair) for pair in value]
    if key == "keypoint_connection_rules":
        return [(a, b, tuple(colour)) for a, b, colour in value]
    return value
