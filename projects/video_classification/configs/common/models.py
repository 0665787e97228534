"""C2D, I3D and TSM as lazy configs; what is not given is that of C2D R50 for 32 frames."""

from detectron2.config import LazyCall as L
from video_classification.models import (
    ClassificationHead,
    VideoClassifier,
    make_non_local_resnet3d,
    make_resnet3d,
)

HEAD = {"num_classes": 400, "pool_size": 7}
CHARADES = {"num_classes": 157, "multi_label": True, "pool_size": 9}
R101 = {"num_blocks": [3, 4, 23, 3]}
I3D = {"stem_kernel": [5, 7, 7], "inflate": "3x1x1"}
# The placement of 1, 5 and 10 blocks is that of the YAML configs' Base-Video.yaml.
NL = {"after_blocks": {"res4": [-2]}}
NL5 = {"after_blocks": {"res3": [1, 3], "res4": [1, 3, 5]}}
NL10 = {"after_blocks": {"res3": [0, 1, 2, 3], "res4": [0, 1, 2, 3, 4, 5]}}
R101_NL5 = {**R101, "after_blocks": {"res3": [1, 3], "res4": [6, 13, 20]}}
R101_NL10 = {**R101, "after_blocks": {"res3": [0, 1, 2, 3], "res4": [2, 6, 10, 14, 18, 22]}}


def classifier(head=None, *, after_blocks=None, block_options=None, stage_options=None, **resnet):
    """The model of Base-Video.yaml: a head for Kinetics, and a network without blocks or with."""
    backbone = L(make_resnet3d)(**resnet)
    if after_blocks:
        backbone = L(make_non_local_resnet3d)(
            **resnet,
            after_blocks=after_blocks,
            block_options={"subsample": 2, "norm": "BN", **(block_options or {})},
            stage_options=stage_options or {},
        )
    return L(VideoClassifier)(
        backbone=backbone,
        head=L(ClassificationHead)(in_channels=2048, **{**HEAD, **(head or {})}),
        pixel_mean=[114.75, 114.75, 114.75],
        pixel_std=[57.375, 57.375, 57.375],
    )


def long_classifier(head=None, **options):
    """The model of Base-Video-128x1.yaml."""
    if "after_blocks" in options:
        options["block_options"] = {"norm": ""}
        options["stage_options"] = {"res3": {"group_frames": 4}}
    return classifier(head, norm="FrozenBN", **options)


def tsm(shift=None, **options):
    """The model of Base-TSM.yaml."""
    shift = {"direction": "bidirectional", **(shift or {})}
    model = classifier({"pool_size": 0, "init_std": 0.001}, pooling="space", shift=shift, **options)
    model.pixel_mean = [123.675, 116.28, 103.53]
    model.pixel_std = [58.395, 57.12, 57.375]
    return model
