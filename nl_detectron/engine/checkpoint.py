"""A checkpointer that refuses weights which silently leave part of a network untrained."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone import FPN
from torch import nn

from nl_detectron.engine.coco.metadata import write_metadata
from nl_detectron.non_local import NonLocalBlock

_RESIDUAL_BLOCK = re.compile(r"\b(?P<stage>res\d)\.\d+\.")
_NON_LOCAL_BLOCK = re.compile(r"^(?P<block>(?:.*\.)?non_local\d+)\.")


class StrictCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, for networks that are a known one plus non-local blocks.

    A checkpoint may lack whole non-local blocks, which start as the identity. A checkpoint of a
    backbone alone (ImageNet pretraining) may lack all that is not backbone. Anything else that it
    lacks, or holds in another shape, must have been named in ``allow_missing``. It may hold more
    than the model takes, but neither residual blocks of a deeper network nor non-local blocks.

    A training that is resumed must find all that the model has, and nothing else.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
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
            allow_missing: prefixes of parameter names, such as "roi_heads.box_predictor", that keep
                their initial values on purpose; "" stands for all.
            strip_blocks: leave out the checkpoint's non-local blocks on purpose.
            complete: for a model that is used without being trained: refuse a backbone alone, too,
                and all that the model has no place for.
            metadata: goes into every checkpoint that is saved, and into a file beside them; see
                :func:`nl_detectron.engine.coco.metadata.dataset_metadata`.
            kwargs: as in ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
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
        for block, module in self.model.named_modules():
            if isinstance(module, NonLocalBlock):
                own = {f"{block}.{name}" for name in module.state_dict()}
                if own <= lacking - misshapen:
                    unexplained -= own

        backbone = getattr(self.model, "backbone", None)
        prefix = "backbone.bottom_up." if isinstance(backbone, FPN) else "backbone."
        beyond_backbone = {name for name in names if not name.startswith((prefix, "pixel_"))}
        backbone_alone = beyond_backbone <= lacking
        if backbone_alone and not self.complete:
            unexplained -= beyond_backbone
            self.logger.info("The checkpoint holds a backbone alone; the rest starts from scratch.")
        if self.complete and backbone_alone:
            hint = "It holds no more than a backbone."
        elif any(_NON_LOCAL_BLOCK.match(name) for name in unexplained):
            hint = "Are its non-local blocks of another form or size?"
        else:
            hint = "Is it of another depth or number of classes?"
        if not self.complete:
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
        known = [m for name in self.model.state_dict() if (m := _RESIDUAL_BLOCK.search(name))]
        stages, blocks = {m["stage"] for m in known}, {m[0] for m in known}
        deeper = [
            name
            for name in surplus
            if (m := _RESIDUAL_BLOCK.search(name)) and m["stage"] in stages and m[0] not in blocks
        ]
        non_local = [name for name in surplus if _NON_LOCAL_BLOCK.match(name)]
        if deeper:
            raise ValueError(
                "the checkpoint holds residual blocks that the model has no place for: "
                f"{_some(deeper)}. Is it of another depth?"
            )
        if non_local:
            hint = "Is its MODEL.NON_LOCAL another one?"
            if not (self.complete or self._resuming):
                hint += (
                    " It can be loaded without its blocks: strip_blocks, or --strip-blocks of "
                    "tools/train_net.py."
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
