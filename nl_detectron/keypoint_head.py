"""The keypoint head of Mask R-CNN with non-local blocks (Sec. 6 of the paper, Table 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead
from detectron2.structures import Instances
from torch import Tensor

from nl_detectron.config import keypoint_head_options
from nl_detectron.non_local import NonLocalBlock, insert_after


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class NonLocalKeypointHead(KRCNNConvDeconvUpsampleHead):
    """The stock head, a stack of 3x3 convolutions, with a non-local block after every two of them.

    Blocks follow the ReLU of their convolution and are named after it: ``non_local2`` follows
    ``conv_fcn2``. All stock parameters keep their names; losses and inference are the stock head's.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_keypoints: int,
        conv_dims: Sequence[int],
        after_convs: Sequence[int] = (2, 4, 6, 8),
        block_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Create the stock head, then insert the blocks.

        Args:
            input_shape: shape of the RoI features.
            num_keypoints: J, keypoints per instance.
            conv_dims: output channels of each convolution.
            after_convs: numbers of the convolutions to insert a block after; 1-based, as in
                ``conv_fcn1``.
            block_options: arguments of :class:`~nl_detectron.NonLocalBlock`, the same for all
                blocks.
            kwargs: arguments of the stock head (``loss_weight``, ``loss_normalizer``).

        Raises:
            ValueError: ``after_convs`` has a number that is out of range or repeated.
        """
        super().__init__(input_shape, num_keypoints=num_keypoints, conv_dims=conv_dims, **kwargs)
        allowed = range(1, len(conv_dims) + 1)
        if len(set(after_convs)) < len(after_convs) or not set(after_convs) <= set(allowed):
            raise ValueError(
                "after_convs (config key KEYPOINT_HEAD.AFTER_CONVS) must be distinct numbers from "
                f"1 to {len(conv_dims)}, the number of convolutions, got {tuple(after_convs)}"
            )
        # Not earlier: the stock __init__ ends by initialising every parameter of the head.
        for number in after_convs:
            block = NonLocalBlock(conv_dims[number - 1], **(block_options or {}))
            insert_after(self, f"conv_fcn_relu{number}", f"non_local{number}", block)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the stock head's keys and ``MODEL.NON_LOCAL``."""
        return {**super().from_config(cfg, input_shape), **keypoint_head_options(cfg)}

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """Run the stock head on RoI features (R, C, 14, 14); check the targets in training.

        Raises:
            ValueError: the targets and the head have different numbers of keypoints. (The stock
                head would train on garbage.)
        """
        if self.training:
            for targets in instances:
                number = (
                    targets.gt_keypoints.tensor.shape[1] if len(targets) else self.num_keypoints
                )
                if number != self.num_keypoints:
                    raise ValueError(
                        f"num_keypoints (config key MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS) is "
                        f"{self.num_keypoints}, but the annotations have {number} keypoints"
                    )
        return super().forward(x, instances)
