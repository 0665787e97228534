"""ResNet and ResNeXt backbones: stock detectron2 networks with non-local blocks inserted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet, build_resnet_backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from torch import nn
from torch.nn.modules.conv import _ConvNd

from nl_detectron.config import backbone_options
from nl_detectron.non_local import NonLocalBlock, insert_after
from nl_detectron.padding import forget_sizes, remember_sizes


def insert_non_local_blocks(
    resnet: nn.Module,
    after_blocks: Mapping[str, Sequence[int]],
    stage_options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    mask_padding: bool = False,
    **block_options: Any,
) -> None:
    """Insert non-local blocks into the stages of a ResNet-like backbone, in place.

    A block after residual block ``i`` becomes the child ``non_local{i}`` of the stage, next to its
    child ``i``. No stock child is renamed, so stock checkpoints still load. A block inserted into a
    stage that is already frozen, by ``freeze_at`` for example, is trained.

    Args:
        resnet: a detectron2 ``ResNet``, or any network whose stages run their children in order:
            each an ``nn.Sequential`` (torchvision's ResNets for images and video, for example), an
            ``nn.ModuleList`` that is iterated over (``res_blocks`` in each of pytorchvideo's
            ``ResStage``), or of ``CNNBlockBase`` children (``RegNet``).
        after_blocks: stage, such as "res4" or "layer3", to the indices of the residual blocks to
            insert after; 0-based, negative ones count from the end.
        stage_options: stage to those of ``block_options`` that differ for its blocks.
        mask_padding: leave keys in the padding of a batch out of the sums, so that the response at
            a position of an image is that of the image alone. The sizes of the images are read
            from the backbone's input, see :mod:`nl_detectron.padding`. For 2-D networks of
            ``CNNBlockBase`` (``ResNet``, ``RegNet``), whose strides are known. Statistics that a
            norm takes from its input (GN; BN in training) include the padding, as in the backbone.
        block_options: arguments of :class:`~nl_detectron.NonLocalBlock`. ``in_channels`` is only
            needed where the last convolution of a residual block is not its output.

    Raises:
        ValueError: a stage that is not built, an index that is out of range or given twice, a
            ``dim`` that is not that of the stage's convolutions, options of a stage without blocks,
            or ``mask_padding`` for another network.
    """
    stage_options = stage_options or {}
    for stage_name, options in stage_options.items():
        if options and not after_blocks.get(stage_name):
            raise ValueError(
                f"stage_options {stage_name!r} (config key STAGE_OPTIONS.{stage_name.upper()}): no "
                "block is inserted into this stage"
            )
    places = [
        (*place, {**block_options, **stage_options.get(stage_name, {})})
        for stage_name, indices in after_blocks.items()
        if len(indices)
        for place in _places(resnet, stage_name, indices)
    ]
    for stage, _, name, options in places:
        _check_dim(stage.get_submodule(name), options.get("dim", 2))
        if mask_padding:
            _check_images(resnet, options.get("dim", 2))
    for stage, i, name, options in places:
        channels = options.pop("in_channels", None) or _out_channels(stage.get_submodule(name))
        block = NonLocalBlock(channels, **options)
        insert_after(stage, name, f"non_local{i}", block.to(next(stage.parameters())))
        if mask_padding:
            block.image_stride = block_stride(resnet, block)
    if mask_padding and places:
        resnet.register_forward_pre_hook(remember_sizes)
        resnet.register_forward_hook(forget_sizes, always_call=True)


def block_stride(backbone: nn.Module, block: nn.Module) -> int:
    """Return the stride of a block's map relative to the input of a detectron2 backbone.

    Raises:
        ValueError: the block is not part of the backbone.
    """
    stride = 1
    for module in backbone.modules():
        if module is block:
            return stride
        if isinstance(module, CNNBlockBase):
            stride *= module.stride
    raise ValueError("the block is not in this backbone")


class NonLocalResNet(ResNet):
    """detectron2's ResNet with non-local blocks.

    In a LazyConfig, it replaces ``ResNet``: ``bottom_up._target_ = NonLocalResNet``.
    """

    def __init__(
        self,
        *args: Any,
        after_blocks: Mapping[str, Sequence[int]],
        block_options: Mapping[str, Any] | None = None,
        mask_padding: bool = False,
        **kwargs: Any,
    ):
        """Create the ResNet, then insert the blocks.

        Args:
            args: positional arguments of ``ResNet``.
            after_blocks: see :func:`insert_non_local_blocks`.
            block_options: arguments of :class:`~nl_detectron.NonLocalBlock`.
            mask_padding: see :func:`insert_non_local_blocks`.
            kwargs: keyword arguments of ``ResNet``.
        """
        super().__init__(*args, **kwargs)
        options = block_options or {}
        insert_non_local_blocks(self, after_blocks, mask_padding=mask_padding, **options)


@BACKBONE_REGISTRY.register()
def build_non_local_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """``build_resnet_backbone`` with the blocks of ``MODEL.NON_LOCAL``."""
    resnet = build_resnet_backbone(cfg, input_shape)
    insert_non_local_blocks(resnet, **backbone_options(cfg))
    return resnet


@BACKBONE_REGISTRY.register()
def build_non_local_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_resnet_fpn_backbone`` with the blocks of ``MODEL.NON_LOCAL``."""
    fpn = build_resnet_fpn_backbone(cfg, input_shape)
    insert_non_local_blocks(fpn.bottom_up, **backbone_options(cfg))
    return fpn


@BACKBONE_REGISTRY.register()
def build_non_local_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_retinanet_resnet_fpn_backbone`` with the blocks of ``MODEL.NON_LOCAL``."""
    fpn = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    insert_non_local_blocks(fpn.bottom_up, **backbone_options(cfg))
    return fpn


def _places(
    resnet: nn.Module, stage_name: str, indices: Sequence[int]
) -> list[tuple[nn.Module, int, str]]:
    """Check the indices; return for each the stage, the index from 0, and the child's name."""
    where = f"after_blocks {stage_name!r} (config key AFTER_BLOCKS.{stage_name.upper()})"
    built = [name for name, child in resnet.named_children() if _residual_blocks(child)]
    if stage_name not in built:
        raise ValueError(
            f"{where}: the backbone has no such stage; it has {built}. Stages that no output "
            "feature needs are not built."
        )
    stage = resnet.get_submodule(stage_name)
    names = _residual_blocks(stage)
    bad = [i for i in indices if not -len(names) <= i < len(names)]
    if bad:
        raise ValueError(
            f"{where}: {stage_name} has {len(names)} residual blocks, so an index must be in "
            f"[{-len(names)}, {len(names) - 1}], got {bad}"
        )
    positions = [i % len(names) for i in indices]
    taken = [i for i in positions if positions.count(i) > 1 or hasattr(stage, f"non_local{i}")]
    if taken:
        raise ValueError(
            f"{where}: more than one non-local block after block {taken[0]}, got {indices}"
        )
    return [(stage, i, names[i]) for i in positions]


def _check_dim(residual_block: nn.Module, dim: int) -> None:
    dims = {len(m.kernel_size) for m in residual_block.modules() if isinstance(m, _ConvNd)}
    if dims and dim not in dims:
        raise ValueError(
            f"dim (config key MODEL.NON_LOCAL.DIM) must be {' or '.join(map(str, sorted(dims)))}, "
            f"as the convolutions of the backbone are, got {dim!r}"
        )


def _check_images(resnet: nn.Module, dim: int) -> None:
    what = "mask_padding (config key MODEL.NON_LOCAL.MASK_PADDING) must be False for"
    if dim != 2:
        raise ValueError(f"{what} blocks that are not 2-D, got True for dim {dim}")
    known = {
        m for block in resnet.modules() if isinstance(block, CNNBlockBase) for m in block.modules()
    }
    for name, module in resnet.named_modules():
        if isinstance(module, _ConvNd) and module not in known:
            raise ValueError(
                f"{what} a network whose strides are not known, got True for "
                f"{type(resnet).__name__} with {name!r}, which is not in a CNNBlockBase"
            )


def _residual_blocks(stage: nn.Module) -> list[str]:
    in_order = isinstance(stage, (nn.Sequential, nn.ModuleList))
    return [
        name
        for name, child in stage.named_children()
        if (in_order or isinstance(child, CNNBlockBase)) and not isinstance(child, NonLocalBlock)
    ]


def _out_channels(residual_block: Any) -> int:
    if isinstance(residual_block, CNNBlockBase):
        return residual_block.out_channels
    convs = [m for m in residual_block.modules() if isinstance(m, _ConvNd)]
    if not convs:
        raise ValueError(
            f"{type(residual_block).__name__} has no convolution that tells its number of output "
            "channels: give in_channels"
        )
    return convs[-1].out_channels
