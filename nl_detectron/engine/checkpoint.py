"""A checkpointer that refuses weights that would silently leave part of a network untrained."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from nl_detectron.engine.checkpoint_files import (
    AtomicPathManager,
    check_records,
    newest_checkpoint,
    non_finite_tensors,
    remove_partial_files,
    write_atomically,
)
from nl_detectron.non_local import find_blocks
from nl_detectron.safety.checkpoints import checked_torch_file, one_kind_of_error, read

METADATA_FILE = "metadata.json"
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_NON_LOCAL_BLOCK = re.compile(r"^(?P<block>(?:.*\.)?non_local\d+)\.")


class StrictCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, for known networks with added non-local blocks.

    Whole non-local blocks may be missing from a checkpoint; they start as the identity. A
    backbone-only checkpoint (ImageNet pretraining) may lack everything outside the backbone. Any
    other parameter that is missing or has another shape must match ``allow_missing``. Unexpected
    parameters are ignored, except for layers of a deeper network and non-local blocks, which are
    refused.

    To resume training, the checkpoint must match the model exactly. It is the newest valid one in
    the folder; the tag ``last_checkpoint`` is written for detectron2's own tools only.

    Checkpoints are written atomically. Weights that are not finite are neither saved nor loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        backbone_prefix: str = "",
        allow_missing: Sequence[str] = (),
        strip_blocks: bool = False,
        complete: bool = False,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Create the checkpointer.

        Args:
            model: the model to load into.
            save_dir: see ``DetectionCheckpointer``.
            backbone_prefix: prefix of the names of the backbone's parameters; if empty,
                backbone-only checkpoints are refused.
            allow_missing: prefixes of parameters, such as "roi_heads.box_predictor", that may keep
                their initial values; "" matches all.
            strip_blocks: drop the checkpoint's non-local blocks.
            complete: for inference: also refuse backbone-only checkpoints and all unexpected
                parameters.
            metadata: saved with every checkpoint, and in a file next to it; see
                :func:`stored_metadata`.
            kwargs: see ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.backbone_prefix = backbone_prefix
        self.allow_missing = tuple(allow_missing)
        self.strip_blocks = strip_blocks
        self.complete = complete
        self.metadata = metadata
        self.path_manager = AtomicPathManager()
        self._newest: str | None = None  # not known yet
        self._resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, its checkpointables and the metadata.

        Raises:
            FloatingPointError: a weight is not finite.
            OSError: the checkpoint cannot be written; earlier ones are intact.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        if names := non_finite_tensors(self.model.state_dict()):
            raise FloatingPointError(
                f"{path} is not saved, because the weights are not finite: {_abbreviate(names)}; "
                f"{self._last_saved()}"
            )
        remove_partial_files(self.save_dir)
        try:
            if self.metadata:
                write_metadata(self.save_dir, self.metadata)
                kwargs["metadata"] = dict(self.metadata)
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:  # PyTorch hides an OSError behind a RuntimeError
            raise OSError(
                f"{path} cannot be saved: {_reason(error)}; {self._last_saved()}"
            ) from error
        self._newest = path

    def _last_saved(self) -> str:
        return f"the last checkpoint is {self._newest}" if self._newest else "there is no other"

    def has_checkpoint(self) -> bool:
        """Return whether the folder has a valid checkpoint of a training.

        Raises:
            ValueError: it has checkpoints, but none is valid.
        """
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return the newest valid checkpoint, or ""; after saving, the one saved last."""
        if self._newest is None:
            self._newest = newest_checkpoint(self.save_dir) if self.save_dir else ""
        return self._newest

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            ValueError: the checkpoint is missing, cannot be read, or does not fit the model.
        """
        try:
            return super().load(path, *args, **kwargs)
        except (AssertionError, OSError, ValueError) as error:  # AssertionError: no such file
            raise ValueError(f"weights {path}: {error}") from error

    def _load_file(self, filename: str) -> Any:
        checkpoint = self._load_pickle(filename) if filename.endswith(".pkl") else None
        if checkpoint is None:
            with checked_torch_file(filename):
                check_records(filename)
                with one_kind_of_error():
                    checkpoint = super()._load_file(filename)
        state = checkpoint["model"]
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError(f"it holds a {type(state).__name__}, not a dictionary of tensors")
        return checkpoint

    def _load_pickle(self, filename: str) -> dict[str, Any]:
        """Read a file of detectron2's model zoo, or Detectron's: the stock method runs its code."""
        data = read(filename)
        if not isinstance(data, dict) or ("model" in data and "__author__" in data):
            return data if isinstance(data, dict) else {"model": data}
        state = data.get("blobs", data)
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if not str(k).endswith("_momentum")}
        return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As in ``DetectionCheckpointer``, but never resume from another model's checkpoint."""
        self._resuming = resume and self.has_checkpoint()
        if resume and not self._resuming:
            self.logger.info("No checkpoint to resume from in %s.", self.save_dir)
        return super().resume_or_load(path, resume=resume)

    def _load_model(self, checkpoint: Any) -> Any:
        if self.strip_blocks and not self._resuming:
            blocks = {name for name in checkpoint["model"] if _NON_LOCAL_BLOCK.match(name)}
            for name in blocks:
                del checkpoint["model"][name]
            self.logger.info("Dropped non-local blocks of the checkpoint: %s", _block_names(blocks))
        incompatible = super()._load_model(checkpoint)
        missing = set(incompatible.missing_keys)  # includes those of another shape
        incorrect_shapes = {name for name, *_ in incompatible.incorrect_shapes}
        self._check_missing_keys(missing, incorrect_shapes)
        self._check_unexpected_keys(incompatible.unexpected_keys)
        if names := non_finite_tensors(self.model.state_dict()):
            raise ValueError(f"the weights are not finite: {_abbreviate(names)}")
        return incompatible

    def _check_missing_keys(self, missing: set[str], incorrect_shapes: set[str]) -> None:
        names = set(self.model.state_dict())
        if self._resuming:
            self._refuse_missing(missing, "To resume, it must be of the same model.")
            return
        unexplained = {name for name in missing if not name.startswith(self.allow_missing)}
        for block, module in find_blocks(self.model).items():
            own = {f"{block}.{name}" for name in module.state_dict()}
            # PyTorch makes up this counter for checkpoints that carry no version, such as pickles.
            counter = {f"{block}.norm.num_batches_tracked"}
            if own - counter <= missing - incorrect_shapes:
                unexplained -= own

        prefixes = (self.backbone_prefix, "pixel_")
        beyond_backbone = {name for name in names if not name.startswith(prefixes)}
        backbone_only = bool(beyond_backbone) and beyond_backbone <= missing - incorrect_shapes
        if backbone_only and not self.complete:
            unexplained -= beyond_backbone
            self.logger.info("The checkpoint holds only a backbone; the rest starts from scratch.")
        if any(_NON_LOCAL_BLOCK.match(name) for name in unexplained):
            hint = "Do its non-local blocks have another pairwise form or size?"
        else:
            hint = "Does it have another depth or number of classes?"
        if self.complete:
            hint += " A backbone is not enough here."
        else:
            hint += (
                " Name what may start from scratch with allow_missing (--allow-missing on the "
                "command line)."
            )
        self._refuse_missing(unexplained, hint)

    def _refuse_missing(self, missing: set[str], hint: str) -> None:
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} of the model's "
                f"{len(self.model.state_dict())} tensors, or has them in another shape: "
                f"{_abbreviate(missing)}. {hint}"
            )

    def _check_unexpected_keys(self, unexpected: Collection[str]) -> None:
        deeper = _keys_of_deeper_layers(unexpected, self.model.state_dict())
        non_local = [name for name in unexpected if _NON_LOCAL_BLOCK.match(name)]
        if deeper:
            raise ValueError(
                "the checkpoint holds layers that the model does not have: "
                f"{_abbreviate(deeper)}. Does it have another depth?"
            )
        if non_local:
            hint = "Was it trained with another MODEL.NON_LOCAL?"
            if not (self.complete or self._resuming):
                hint += " strip_blocks (--strip-blocks on the command line) drops its blocks."
            raise ValueError(
                "the checkpoint holds non-local blocks that the model does not have: "
                f"{_block_names(non_local)}. {hint}"
            )
        if unexpected and (self.complete or self._resuming):
            raise ValueError(
                "the checkpoint holds tensors that the model does not have: "
                f"{_abbreviate(unexpected)}"
            )


def _reason(error: BaseException) -> str:
    """Return what the operating system said, if it is among the causes of an error."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _block_names(names: Iterable[str]) -> str:
    found = {m["block"] for name in names if (m := _NON_LOCAL_BLOCK.match(name))}
    return _abbreviate(found) if found else "none"


def _abbreviate(names: Iterable[str]) -> str:
    first, rest = sorted(names)[:8], sorted(names)[8:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def _keys_of_deeper_layers(unexpected: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the keys of layers whose number the model does not have in the same place.

    A checkpoint may lack the backbone's prefix: "res4.6.conv1.weight" is deeper than
    "backbone.bottom_up.res4.5.conv1.weight".
    """
    numbers: dict[str, set[str]] = {}
    for name in known:
        for layer in _NUMBER.finditer(name):
            stage = name[: layer.start()].split(".")
            for i in range(len(stage)):
                numbers.setdefault(".".join(stage[i:]), set()).add(layer[1])
    return [
        name
        for name in unexpected
        for layer in _NUMBER.finditer(name)
        if (there := numbers.get(name[: layer.start()])) and layer[1] not in there
    ]


def stored_metadata(weights: str) -> dict[str, Any]:
    """Return the metadata stored in a checkpoint, or else in the file next to it.

    Args:
        weights: checkpoint; only ``.pth`` files can hold metadata.

    Returns:
        The metadata that the checkpointer was given in training; empty if there is none.

    Raises:
        ValueError: they have another form.
    """
    if not weights.endswith(".pth"):
        return {}
    try:
        path = PathManager.get_local_path(weights)
        checkpoint = read(path, mmap=True)
    except Exception:  # the error is reported when the weights are loaded
        return {}
    known = checkpoint.get("metadata") if isinstance(checkpoint, dict) else None
    sidecar = Path(path).with_name(METADATA_FILE)
    if known is None and sidecar.exists():
        try:
            known = json.loads(sidecar.read_text(encoding="utf-8"))
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{sidecar} is not JSON: {error}") from error
    known = {} if known is None else known
    if not isinstance(known, dict):
        raise ValueError(f"weights {weights}: the metadata stored with them are not a dictionary")
    for name, form in _METADATA.items():
        if name in known and not _fits(known[name], form):
            raise ValueError(
                f"weights {weights}: the metadata stored with them have a wrong {name}"
            )
    return known


# What the metadata of a task hold: a list of what is in a list, and a tuple for one of its length.
_METADATA: dict[str, Any] = {
    "classes": [str],
    "thing_classes": [str],
    "category_ids": [object],
    "keypoint_names": [str],
    "keypoint_flip_map": [(str, str)],
    "keypoint_connection_rules": [(str, str, (int, int, int))],
    "keypoint_oks_sigmas": [float],
}


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, type):
        return isinstance(value, form) or (form is float and isinstance(value, int))
    if not isinstance(value, (list, tuple)):
        return False
    parts = form * len(value) if isinstance(form, list) else form
    return len(parts) == len(value) and all(map(_fits, value, parts))


def write_metadata(folder: str, metadata: Mapping[str, Any]) -> None:
    """Write the metadata next to the checkpoints, as JSON."""
    text = json.dumps(metadata, indent=1, ensure_ascii=False)
    with write_atomically(Path(folder) / METADATA_FILE) as file:
        file.write(text)


def checkpoint_to_load(cfg: CfgNode, resume: bool) -> tuple[str, bool]:
    """Return the checkpoint that a run loads, and whether it resumes from there.

    Raises:
        ValueError: it is to resume, but no checkpoint is valid.
    """
    newest = newest_checkpoint(cfg.OUTPUT_DIR, quiet=True) if resume else ""
    return newest or cfg.MODEL.WEIGHTS, bool(newest)
