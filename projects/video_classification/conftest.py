"""Lets the tests import `video_classification`, which is not installed; and its fixtures."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def video_cfg():
    """A C2D with one residual block a stage, a few channels and three classes, on the CPU."""
    from video_classification.config import default_video_config

    cfg = default_video_config()
    cfg.merge_from_file(str(Path(__file__).parent / "configs" / "Base-Video.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.VIDEO.NUM_BLOCKS = (1, 2, 2, 1)
    cfg.MODEL.VIDEO.POOLING = "space"
    cfg.MODEL.VIDEO.HEAD.NUM_CLASSES = 3
    return cfg


@pytest.fixture
def randomize():
    """Gives a model weights and statistics as after training: no norm is 0 or 1, none is idle."""

    def randomize(model):
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "running_var")):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                torch.nn.init.normal_(tensor, std=0.2)
            elif tensor.dim() > 1:
                torch.nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
        return model

    return randomize


@pytest.fixture
def coded_frames():
    """Makes frames in which a pixel is (number of its frame, x, y): what is cut out shows where."""

    def coded_frames(count, height=48, width=64):
        y, x = np.mgrid[:height, :width]
        return [
            np.stack([np.full_like(x, k), x, y], axis=-1).astype(np.uint8) for k in range(count)
        ]

    return coded_frames


@pytest.fixture
def coded_video(tmp_path, coded_frames):
    """Writes such frames to a lossless video, and returns its name."""
    from video_classification.data import write_video

    def coded_video(count, height=48, width=64, fps=10, name="video.mp4"):
        write_video(tmp_path / name, coded_frames(count, height, width), fps, crf=0)
        return str(tmp_path / name)

    return coded_video


@pytest.fixture
def real_videos():
    """The folder with real clips, of which a clone has none; tests that need it are skipped."""
    repository = Path(__file__).parents[2]
    root = Path(os.environ.get("DETECTRON2_DATASETS", repository.parent / "shared" / "datasets"))
    if not (root / "asl").is_dir():
        pytest.skip(f"needs the clips of github.com/intel-iot-devkit/sample-videos in {root}/asl")
    return root
