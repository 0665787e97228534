"""A checkpointer that refuses weights which silently leave part of a network untrained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone import FPN
from torch import nn

from nl_detectron.non_local import NonLocalBlock


class StrictCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, for networks that are a known one plus non-local blocks.

    A checkpoint may lack the parameters of non-local blocks, which start as the identity. A
    checkpoint of a backbone alone (ImageNet pretraining) may lack all that is not backbone.
    Anything else that it lacks, or holds in another shape, must have been named in ``may_lack``.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, may_lack: Sequence[str] = (), **kwargs: Any
    ):
        """Create the checkpointer.

        Args:
            model: the model to load into.
            save_dir: as in ``DetectionCheckpointer``.
            may_lack: prefixes of parameter names, such as "roi_heads.box_predictor", that keep
                their initial values on purpose; "" stands for all.
            kwargs: as in ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.may_lack = tuple(may_lack)

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        self._check(set(incompatible.missing_keys))  # those of another shape are among them
        return incompatible

    def _check(self, lacking: set[str]) -> None:
        names = set(self.model.state_dict())
        blocks = tuple(
            f"{name}." for name, m in self.model.named_modules() if isinstance(m, NonLocalBlock)
        )
        backbone = getattr(self.model, "backbone", None)
        prefix = "backbone.bottom_up." if isinstance(backbone, FPN) else "backbone."
        beyond_backbone = {name for name in names if not name.startswith((prefix, "pixel_"))}

        unexplained = {name for name in lacking if not name.startswith(blocks + self.may_lack)}
        if beyond_backbone <= lacking:
            unexplained -= beyond_backbone
            self.logger.info("The checkpoint holds a backbone alone; the rest starts from scratch.")
        if unexplained:
            shown = ", ".join(sorted(unexplained)[:8])
            raise ValueError(
                f"the checkpoint lacks {len(unexplained)} of the model's {len(names)} tensors, or "
                f"has them in another shape: {shown}{', ...' if len(unexplained) > 8 else ''}. Is "
                "it of another depth or number of classes? What should start from scratch can be "
                "named: may_lack, or --may-lack of tools/train_net.py."
            )
