"""ResNeXt stages for LazyConfig: stock's ``make_default_stages`` knows ResNet's widths only."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BottleneckBlock, ResNet


def resnext_32x8d_stages(blocks_per_stage):
    """Stages res2 to res5 of 32 groups, 8 channels wide each in res2, as Caffe2 trained them."""
    return [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=num_blocks,
            stride_per_block=[1 if stage == 0 else 2] + [1] * (num_blocks - 1),
            in_channels=64 if stage == 0 else 128 * 2**stage,
            out_channels=256 * 2**stage,
            bottleneck_channels=32 * 8 * 2**stage,
            num_groups=32,
            stride_in_1x1=False,
            norm="FrozenBN",
        )
        for stage, num_blocks in enumerate(blocks_per_stage)
    ]
