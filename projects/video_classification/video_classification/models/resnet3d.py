"""C2D and I3D: detectron2's ResNet with convolutions over time, height and width.

The modules have the names that detectron2's have, so the weights do, too. Differences from other
libraries are in :data:`POOLINGS`.

Shapes: N batch, C channels, T H W axes of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from torch import Tensor, nn

from nl_detectron.backbone import insert_non_local_blocks
from nl_detectron.config import STOCK_BUILDERS, backbone_options

from .layers import Bottleneck3d, Pool, Stem3d

NUM_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
INFLATE = {
    # kernels of the first two convolutions of a block that sees several frames
    "": ((1, 1, 1), (1, 3, 3)),
    "3x1x1": ((3, 1, 1), (1, 3, 3)),
    "3x3x3": ((1, 1, 1), (3, 3, 3)),
}
_INFLATED = {"res2": slice(0, None), "res3": slice(0, None, 2), "res4": slice(0, None, 2)}
_INFLATED["res5"] = slice(1, None, 2)  # these blocks of a stage; the same in all libraries


class Pooling(NamedTuple):
    """Where a network gives up resolution besides the stride of 2 of res3, res4 and res5.

    Attributes:
        stem_stride: of conv1 in time; in space it is 2.
        pool1: after conv1.
        pool2: before res3.
        min_frames: of a clip.
    """

    stem_stride: int
    pool1: Pool | None
    pool2: Pool | None
    min_frames: int


_PAIRS = Pool((2, 1, 1), (2, 1, 1), (0, 0, 0))
_TRIPLES = Pool((3, 1, 1), (2, 1, 1), (1, 0, 0))
POOLINGS = {
    # Table 1 of the paper; its padding follows from the sizes.
    "paper": Pooling(2, Pool((3, 3, 3), (2, 2, 2), (1, 1, 1)), _TRIPLES, 1),
    # video-nonlocal-net, resnet_video_org.py: the models of 32 (stride 2) and 128 frames
    "released_32x2": Pooling(2, Pool((2, 3, 3), (2, 2, 2), (0, 0, 0)), _PAIRS, 7),
    # video-nonlocal-net, resnet_video.py: 8 frames (stride 8), 32 (stride 4); mmaction2's C2D
    "released_8x8": Pooling(1, Pool((1, 3, 3), (1, 2, 2), (0, 0, 0)), _PAIRS, 2),
    # SlowFast and pytorchvideo, C2D and I3D; long-term feature banks
    "slowfast": Pooling(1, Pool((1, 3, 3), (1, 2, 2), (0, 1, 1)), _PAIRS, 2),
    # mmaction2, I3D: drops every other frame after conv1
    "mmaction2": Pooling(2, Pool((1, 3, 3), (2, 2, 2), (0, 1, 1)), _PAIRS, 5),
    # All frames are kept: TSM, and the variants that others call "nopool"
    "space": Pooling(1, Pool((1, 3, 3), (1, 2, 2), (0, 1, 1)), None, 1),
    # TSM, --temporal_pool
    "tsm_temporal_pool": Pooling(1, Pool((1, 3, 3), (1, 2, 2), (0, 1, 1)), _TRIPLES, 1),
    "none": Pooling(1, None, None, 1),
}


class ResNet3d(ResNet):
    """detectron2's ResNet for clips, with a pooling between res2 and res3."""

    def __init__(self, stem: Stem3d, stages: list, pooling: Pooling, **options: Any):
        """Create the network.

        Args:
            stem: conv1 and pool1.
            stages: residual blocks of each stage.
            pooling: its pool2 and min_frames; the rest of it is in the stem.
            options: ``out_features`` and ``freeze_at``, as in ``ResNet``.
        """
        super().__init__(stem, stages, **options)
        self.pool2 = nn.MaxPool3d(*pooling.pool2) if pooling.pool2 else nn.Identity()
        self.min_frames = pooling.min_frames

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of clips.

        Args:
            x: (N, C, T, H, W).

        Returns:
            Name of a stage to its map.

        Raises:
            ValueError: another shape, or too few frames for the poolings.
        """
        if x.dim() != 5 or x.shape[2] < self.min_frames:
            raise ValueError(
                f"clips must be (N, C, T, H, W) with T >= {self.min_frames} for this "
                f"MODEL.VIDEO.POOLING, got {tuple(x.shape)}"
            )
        outputs = {}
        x = self.stem(x)
        if "stem" in self._out_features:
            outputs["stem"] = x
        for name, stage in zip(self.stage_names, self.stages):
            x = stage(self.pool2(x) if name == "res3" else x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


def make_resnet3d(
    *,
    num_blocks: Sequence[int] = NUM_BLOCKS[50],
    in_channels: int = 3,
    stem_channels: int = 64,
    stem_kernel: Sequence[int] = (1, 7, 7),
    res2_channels: int = 256,
    width: int = 64,
    num_groups: int = 1,
    inflate: str = "",
    pooling: str = "released_32x2",
    norm: str = "BN",
    stride_in_1x1: bool = False,
    zero_init_residual: bool = True,
    shift: dict[str, Any] | None = None,
    shift_every: int = 1,
    out_features: Sequence[str] | None = None,
    freeze_at: int = 0,
) -> ResNet3d:
    """Build C2D, I3D or TSM of any depth and width; every stage doubles the channels.

    Args:
        num_blocks: residual blocks of res2 and up to three more stages.
        in_channels: colors.
        stem_channels: of conv1.
        stem_kernel: of conv1.
        res2_channels: of the output of res2.
        width: of the middle convolutions of res2, all groups together.
        num_groups: of the middle convolutions.
        inflate: a key of :data:`INFLATE`.
        pooling: a key of :data:`POOLINGS`.
        norm: one of :data:`NORMS`.
        stride_in_1x1: see :class:`Bottleneck3d`.
        zero_init_residual: likewise ``zero_init``.
        shift: likewise.
        shift_every: 1 shifts in every block, 2 in every other one, and so on.
        out_features: of ``ResNet``; default: the last stage.
        freeze_at: of ``ResNet``.

    Raises:
        ValueError: an argument is not one of its allowed values.
    """
    _check("INFLATE", inflate, INFLATE)
    _check("POOLING", pooling, POOLINGS)
    if not 1 <= len(num_blocks) <= 4 or min(num_blocks) < 1:
        raise ValueError(
            "num_blocks (config key MODEL.VIDEO.NUM_BLOCKS) must have 1 to 4 numbers >= 1, got "
            f"{tuple(num_blocks)}"
        )
    if len(stem_kernel) != 3 or not all(k % 2 for k in stem_kernel):
        raise ValueError(
            "stem_kernel (config key MODEL.VIDEO.STEM_KERNEL) must be three odd numbers, got "
            f"{tuple(stem_kernel)}"
        )
    if shift_every < 1:
        raise ValueError(
            f"shift_every (config key MODEL.VIDEO.SHIFT.EVERY) must be >= 1, got {shift_every}"
        )
    layout = POOLINGS[pooling]
    stem = Stem3d(in_channels, stem_channels, stem_kernel, layout.stem_stride, layout.pool1, norm)
    stages, channels = [], stem_channels
    for i, number in enumerate(num_blocks):
        inflated = range(number)[_INFLATED[f"res{i + 2}"]]
        stages.append(
            ResNet.make_stage(
                Bottleneck3d,
                number,
                in_channels=channels,
                out_channels=(channels := res2_channels * 2**i),
                bottleneck_channels=width * 2**i,
                kernels_per_block=[
                    INFLATE[inflate if j in inflated else ""] for j in range(number)
                ],
                stride_per_block=[1 if i == 0 or j else 2 for j in range(number)],
                num_groups=num_groups,
                norm=norm,
                stride_in_1x1=stride_in_1x1,
                zero_init=zero_init_residual,
                shift_per_block=[None if j % shift_every else shift for j in range(number)],
            )
        )
    return ResNet3d(stem, stages, layout, out_features=out_features, freeze_at=freeze_at)


def make_non_local_resnet3d(
    *,
    after_blocks: Mapping[str, Sequence[int]],
    stage_options: Mapping[str, Mapping[str, Any]] | None = None,
    block_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> ResNet3d:
    """Build the same with non-local blocks, for lazy configs.

    Args:
        after_blocks: see :func:`nl_detectron.insert_non_local_blocks`.
        stage_options: likewise.
        block_options: likewise; ``dim`` is 3.
        options: of :func:`make_resnet3d`.
    """
    resnet = make_resnet3d(**options)
    insert_non_local_blocks(resnet, after_blocks, stage_options, dim=3, **(block_options or {}))
    return resnet


@BACKBONE_REGISTRY.register()
def build_resnet3d_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet3d:
    """The network of ``MODEL.VIDEO`` and ``MODEL.RESNETS``."""
    node, resnets = cfg.MODEL.VIDEO, cfg.MODEL.RESNETS
    if not node.NUM_BLOCKS and resnets.DEPTH not in NUM_BLOCKS:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH must be one of {tuple(NUM_BLOCKS)} for videos, got "
            f"{resnets.DEPTH}; MODEL.VIDEO.NUM_BLOCKS takes any other depth"
        )
    shift = {"divisor": node.SHIFT.DIVISOR, "direction": node.SHIFT.DIRECTION}
    return make_resnet3d(
        num_blocks=node.NUM_BLOCKS or NUM_BLOCKS[resnets.DEPTH],
        in_channels=input_shape.channels,
        stem_channels=resnets.STEM_OUT_CHANNELS,
        stem_kernel=node.STEM_KERNEL,
        res2_channels=resnets.RES2_OUT_CHANNELS,
        width=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP,
        num_groups=resnets.NUM_GROUPS,
        inflate=node.INFLATE,
        pooling=node.POOLING,
        norm=resnets.NORM,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        zero_init_residual=node.ZERO_INIT_RESIDUAL,
        shift=shift if node.SHIFT.DIRECTION else None,
        shift_every=node.SHIFT.EVERY,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_non_local_resnet3d_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet3d:
    """The same with the blocks of ``MODEL.NON_LOCAL``."""
    resnet = build_resnet3d_backbone(cfg, input_shape)
    insert_non_local_blocks(resnet, **backbone_options(cfg))
    return resnet


STOCK_BUILDERS["build_non_local_resnet3d_backbone"] = "build_resnet3d_backbone"


def _check(key: str, value: str, allowed: dict[str, Any]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{key.lower()} (config key MODEL.VIDEO.{key}) must be one of {tuple(allowed)}, got "
            f"{value!r}"
        )
