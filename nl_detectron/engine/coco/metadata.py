"""Names of a model's classes and keypoints, stored with its weights.

detectron2 looks them up by the name of a data set, which a new process has not registered if it is
a custom one.
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
    """Return the metadata of a data set that is stored with a model, in JSON-compatible types.

    Args:
        name: name of the data set in detectron2's catalog.

    Returns:
        The known entries, by their names in the catalog; ``category_ids`` lists the json's id of
        each class.
    """
    metadata = MetadataCatalog.get(name)
    known = {key: _to_lists(metadata.get(key)) for key in _KEYS if metadata.get(key) is not None}
    class_of_id = metadata.get("thing_dataset_id_to_contiguous_id")
    if class_of_id:
        known["category_ids"] = sorted(class_of_id, key=class_of_id.get)
    return known


def model_metadata(cfg: CfgNode, weights: str | None = None) -> Metadata:
    """Return the metadata of a trained model's classes and keypoints, for detectron2's functions.

    It comes from the checkpoint if training stored it there, otherwise from the config's data sets,
    if they are registered and their numbers of classes and keypoints match the model's.

    Args:
        cfg: config of the model; its data sets need not be registered.
        weights: checkpoint; default: ``MODEL.WEIGHTS``.

    Returns:
        The metadata, empty if nothing is known.
    """
    weights = cfg.MODEL.WEIGHTS if weights is None else weights
    known = stored_metadata(weights)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if not known and name in MetadataCatalog.list():
            known = _if_counts_match(cfg, dataset_metadata(name))
    class_of_id = {i: n for n, i in enumerate(known.get("category_ids", ()))}
    metadata = Metadata(name=weights)
    metadata.set(**{key: _to_tuples(key, known[key]) for key in _KEYS if key in known})
    if class_of_id:
        metadata.thing_dataset_id_to_contiguous_id = class_of_id
    return metadata


def check_names(
    cfg: CfgNode,
    found: Mapping[str, Any] | Metadata,
    where: str,
    model: Mapping[str, Any] | Metadata | None = None,
) -> None:
    """Require a data set to have the model's classes and, for keypoint models, its keypoints.

    Args:
        cfg: config of the model.
        found: metadata of the data set; missing entries are not checked.
        where: name of the data set for error messages.
        model: metadata of the model; without it, only the numbers are compared.

    Raises:
        ValueError: the numbers or the names differ.
    """
    for key, what, number in _expected_counts(cfg):
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
                    f"the {what} of {where} do not match the model's: number {i} is "
                    f"{other!r} there, {own!r} in the model"
                )


def _expected_counts(cfg: CfgNode) -> list[tuple[str, str, int]]:
    """Return the metadata key, a plural noun, and the model's number of each kind of name."""
    parts = []
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        parts.append(("thing_classes", "classes", cfg.MODEL.RETINANET.NUM_CLASSES))
    elif cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork":
        parts.append(("thing_classes", "classes", cfg.MODEL.ROI_HEADS.NUM_CLASSES))
    if cfg.MODEL.KEYPOINT_ON:
        number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        parts.append(("keypoint_names", "keypoints", number))
    return parts


def _if_counts_match(cfg: CfgNode, metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        check_names(cfg, metadata, "")
    except ValueError:
        return {}
    return metadata


def _to_lists(value: Sequence) -> list:
    return [_to_lists(v) if isinstance(v, (list, tuple)) else v for v in value]


def _to_tuples(key: str, value: list) -> list:
    """Undo :func:`_to_lists`: detectron2 stores pairs and colors as tuples."""
    if key == "keypoint_flip_map":
        return [tuple(pair) for pair in value]
    if key == "keypoint_connection_rules":
        return [(a, b, tuple(color)) for a, b, color in value]
    return value
