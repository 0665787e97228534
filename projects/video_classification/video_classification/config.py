"""The config keys of video classification and their defaults.

Stock keys keep their meaning: ``MODEL.RESNETS`` has depth, widths and norm of the trunk,
``MODEL.NON_LOCAL`` the blocks, ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD`` the values of pixels,
``INPUT.MIN_SIZE_TRAIN``, ``MIN_SIZE_TEST``, ``CROP`` and ``RANDOM_FLIP`` the size of the frames.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

from nl_detectron.config import default_config

_DEFAULTS: dict[str, Any] = {
    # Temporal stride of conv1 and both poolings, one of models.resnet3d.POOLINGS. Weights that were
    # trained with one give other scores with another.
    "POOLING": "released_32x2",
    # Kernel of conv1 over time, height and width: (1, 7, 7) for C2D, (5, 7, 7) for I3D.
    "STEM_KERNEL": (1, 7, 7),
    # Which convolutions of the I3D's residual blocks see three frames: none of them (""), the first
    # of a block (3x1x1), or its middle one (3x3x3).
    "INFLATE": "",
    # Residual blocks of each stage; () for those of MODEL.RESNETS.DEPTH, which is 50, 101 or 152.
    "NUM_BLOCKS": (),
    # Start with residual branches that add nothing, as all released configs do.
    "ZERO_INIT_RESIDUAL": True,
    # Temporal shift (TSM)
    "SHIFT": {
        # bidirectional, unidirectional (for online use), or none
        "DIRECTION": "",
        # This part of the channels is shifted in each direction.
        "DIVISOR": 8,
        # Shift in every block (1) or in every other one (2, as released for ResNet-101).
        "EVERY": 1,
    },
    "HEAD": {
        "NUM_CLASSES": 400,
        # Height and width of the window, in positions of the last map, whose mean is classified;
        # the scores of a map that holds several windows are the mean over them, after the softmax.
        # 7 for models trained on 224 x 224 pixels; 0: the whole map.
        "POOL_SIZE": 0,
        "DROPOUT": 0.5,
        # Any number of classes at a time, as in Charades: sigmoid instead of softmax.
        "MULTI_LABEL": False,
        # Of the initial weights; 0.001 in TSM.
        "INIT_STD": 0.01,
        # Of the head's learning rate relative to the backbone's; 5 in TSM.
        "LR_FACTOR": 1.0,
    },
}
_INPUT_CLIP: dict[str, Any] = {
    "NUM_FRAMES": 32,
    # Distance of two frames in the video; 2 takes every other frame.
    "STRIDE": 2,
}
_TEST_VIEWS: dict[str, Any] = {
    # Clips per video, and where they start: one of data.sampling.TEST_CLIPS.
    "NUM_CLIPS": 10,
    "STARTS": "released",
    # Crops of each clip: 3 along the longer side, 1 in the center, 0 for the whole frame.
    "NUM_CROPS": 3,
    "CROP_SIZE": 256,
    # How the scores of the views become those of the video: mean or max.
    "COMBINE": "mean",
    # Views in one forward pass.
    "BATCH_SIZE": 1,
}


def add_video_config(cfg: CfgNode) -> None:
    """Add the keys with their defaults to a detectron2 config, unless they are there."""
    if "VIDEO" in cfg.MODEL:
        return
    cfg.MODEL.VIDEO = CfgNode(_DEFAULTS)
    cfg.INPUT.CLIP = CfgNode(_INPUT_CLIP)
    cfg.TEST.VIEWS = CfgNode(_TEST_VIEWS)
    # Parts that a batch is processed in, one after the other, to save memory; gradients add up.
    cfg.SOLVER.ACCUMULATE = 1
    # Share of the videos of a test set that may be unreadable; more end the test.
    cfg.TEST.MAX_UNREADABLE = 0.1
    # Decoded videos that each process keeps in memory, for small data sets of short videos.
    cfg.DATALOADER.CACHE_VIDEOS = 0


def default_video_config() -> CfgNode:
    """detectron2's default config with the keys of the package and of video."""
    cfg = default_config()
    add_video_config(cfg)
    return cfg
