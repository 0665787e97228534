"""A checkpointer that refuses weights which silently leave part of a network untrained."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from nl_detectron.non_local import find_blocks

METADATA_FILE = "metadata.json"
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_NON_LOCAL_BLOCK = re.compile(r"^(?P<block>(?:.*\.)?non_local\d+)\.")


class StrictCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, for networks that are a known one plus non-local blocks.

    A checkpoint may lack whole non-local blocks, which start as the identity. A checkpoint of a
    backbone alone (ImageNet pretraining) may lack all that is not backbone. Anything else that it
    lacks, or holds in another shape, must have been named in ``allow_missing``. It may hold more
    than the model takes, but neither the layers of a deeper network nor non-local blocks.

    A training that is resumed must find all that the model has, and nothing else.
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
            save_dir: as in ``DetectionCheckpointer``.
            backbone_prefix: what the names of the backbone's parameters begin with; without it, no
                backbone alone is accepted.
            allow_missing: prefixes of parameter names, such as "roi_heads.box_predictor", that keep
                their initial values on purpose; "" stands for all.
            strip_blocks: leave out the checkpoint's non-local blocks on purpose.
            complete: for a model that is used without being trained: refuse a backbone alone, too,
                and all that the model has no place for.
            metadata: goes into every checkpoint that is saved, and into a file beside them; see
                :func:`stored_metadata`.
            kwargs: as in ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.backbone_prefix = backbone_prefix
        self.allow_missing = tuple(allow_missing)
        self.strip_blocks = strip_blocks
        self.complete = complete
        self.metadata = metadata
        self._resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, what goes with it, and the metadata."""
        if self.metadata and self.save_dir and self.save_to_disk:
            write_metadata(self.save_dir, self.metadata)
            kwargs["metadata"] = dict(self.metadata)
        super().save(name, **kwargs)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            ValueError: it is not there, cannot be read, or is not of this model.
        """
        try:
            return super().load(path, *args, **kwargs)
        except (AssertionError, OSError, ValueError) as error:  # no such file is an AssertionError
            raise ValueError(f"weights {path}: {error}") from error

    def _load_file(self, filename: str) -> Any:
        try:
            return super()._load_file(filename)
        except OSError:
            raise
        except pickle.UnpicklingError as error:
            raise ValueError("this file does not hold tensors alone") from error
        except Exception as error:  # broken files raise all sorts
            raise ValueError(f"this file cannot be read as a checkpoint: {error!r}") from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As stock; a checkpoint to resume from must be this very model's."""
        self._resuming = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def _load_model(self, checkpoint: Any) -> Any:
        if self.strip_blocks and not self._resuming:
            blocks = {name for name in checkpoint["model"] if _NON_LOCAL_BLOCK.match(name)}
            for name in blocks:
                del checkpoint["model"][name]
            self.logger.info("Non-local blocks of the checkpoint left out: %s", _blocks(blocks))
        incompatible = super()._load_model(checkpoint)
        missing = set(incompatible.missing_keys)  # with those of another shape
        misshapen = {name for name, *_ in incompatible.incorrect_shapes}
        self._check_lacking(missing, misshapen)
        self._check_surplus(incompatible.unexpected_keys)
        return incompatible

    def _check_lacking(self, lacking: set[str], misshapen: set[str]) -> None:
        names = set(self.model.state_dict())
        if self._resuming:
            self._refuse_lacking(lacking, "It is of another model than the training to resume.")
            return
        unexplained = {name for name in lacking if not name.startswith(self.allow_missing)}
        for block, module in find_blocks(self.model).items():
            own = {f"{block}.{name}" for name in module.state_dict()}
            if own <= lacking - misshapen:
                unexplained -= own

        prefixes = (self.backbone_prefix, "pixel_")
        beyond_backbone = {name for name in names if not name.startswith(prefixes)}
        backbone_alone = bool(beyond_backbone) and beyond_backbone <= lacking
        if backbone_alone and not self.complete:
            unexplained -= beyond_backbone
            self.logger.info("The checkpoint holds a backbone alone; the rest starts from scratch.")
        if any(_NON_LOCAL_BLOCK.match(name) for name in unexplained):
            hint = "Are its non-local blocks of another form or size?"
        else:
            hint = "Is it of another depth or number of classes?"
        if self.complete:
            hint += " A backbone alone is not enough here."
        else:
            hint += (
                " What should start from scratch can be named with allow_missing (--allow-missing "
                "on the command line)."
            )
        self._refuse_lacking(unexplained, hint)

    def _refuse_lacking(self, lacking: set[str], hint: str) -> None:
        if lacking:
            raise ValueError(
                f"the checkpoint lacks {len(lacking)} of the model's "
                f"{len(self.model.state_dict())} tensors, or has them in another shape: "
                f"{_some(lacking)}. {hint}"
            )

    def _check_surplus(self, surplus: Collection[str]) -> None:
        deeper = _deeper(surplus, self.model.state_dict())
        non_local = [name for name in surplus if _NON_LOCAL_BLOCK.match(name)]
        if deeper:
            raise ValueError(
                "the checkpoint holds layers that the model has no place for: "
                f"{_some(deeper)}. Is it of another depth?"
            )
        if non_local:
            hint = "Is its MODEL.NON_LOCAL another one?"
            if not (self.complete or self._resuming):
                hint += (
                    " It can be loaded without its blocks: strip_blocks (--strip-blocks on "
                    "the command line)."
                )
            raise ValueError(
                "the checkpoint holds non-local blocks that the model has no place for: "
                f"{_blocks(non_local)}. {hint}"
            )
        if surplus and (self.complete or self._resuming):
            raise ValueError(
                f"the checkpoint holds tensors that the model has no place for: {_some(surplus)}"
            )


def _blocks(names: Iterable[str]) -> str:
    found = {m["block"] for name in names if (m := _NON_LOCAL_BLOCK.match(name))}
    return _some(found) if found else "it has none"


def _some(names: Iterable[str]) -> str:
    first, rest = sorted(names)[:8], sorted(names)[8:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def _deeper(surplus: Iterable[str], known: Iterable[str]) -> list[str]:
    """Parameters of layers with a number beyond those that the model has in the same place.

    A checkpoint may lack the prefix of a backbone: its "res4.6.conv1.weight" goes beyond
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
        for name in surplus
        for layer in _NUMBER.finditer(name)
        if (there := numbers.get(name[: layer.start()])) and layer[1] not in there
    ]


def stored_metadata(weights: str) -> dict[str, Any]:
    """Return what was stored with a checkpoint: in it, or else in the file beside it.

    Args:
        weights: checkpoint; only ``.pth`` files can hold metadata.

    Returns:
        What the training gave its checkpointer; empty if nothing was stored.
    """
    if not weights.endswith(".pth"):
        return {}
    try:
        path = PathManager.get_local_path(weights)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever loads the weights tells what is wrong with the file
        return {}
    beside = Path(path).with_name(METADATA_FILE)
    if "metadata" in checkpoint:
        return checkpoint["metadata"]
    return json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}


def write_metadata(folder: str, metadata: Mapping[str, Any]) -> None:
    """Write metadata beside checkpoints, for people and for other programs."""
    text = json.dumps(metadata, indent=1, ensure_ascii=False)
    with PathManager.open(str(Path(folder) / METADATA_FILE), "w") as file:
        file.write(text)


def checkpoint_to_load(cfg: CfgNode, resume: bool) -> tuple[str, bool]:
    """Return the checkpoint that a run starts from, and whether it is resumed there."""
    checkpointer = DetectionCheckpointer(nn.Module(), cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        return checkpointer.get_checkpoint_file(), True
    return cfg.MODEL.WEIGHTS, False
