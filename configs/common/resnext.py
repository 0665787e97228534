"""ResNeXt stages for LazyConfig; the stock ``make_default_stages`` only has ResNet's widths."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BottleneckBlock, ResNet


def resnext_32x8d_stages(blocks_per_stage):
    """Return stages res2 to res5 with 32 groups of 8 channels in res2, as trained with Caffe2."""
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
