"""Exported models: one program for any number of clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch.testing import assert_close
from video_classification.config import default_video_config

from nl_detectron.config import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "Kinetics"


def export(model, clips):
    dynamic = {"inputs": {0: torch.export.Dim("clips", max=99)}}
    return torch.export.export(model, (clips,), dynamic_shapes=dynamic)


SLOW = pytest.param("i3d_R_50_NL5_128x1", marks=pytest.mark.slow)


@pytest.mark.parametrize("leaf", ["c2d_R_50_32x2", "i3d_R_50_NL5_32x2", "tsm_R_50_NL5_8x8", SLOW])
def test_any_number_of_clips(leaf, randomize):
    """A narrow network with the layers of a config, as after training."""
    cfg = load_config(CONFIGS / f"{leaf}.yaml", ["MODEL.DEVICE", "cpu"], default_video_config)
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8, 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.VIDEO.HEAD.NUM_CLASSES = 16, 5
    model = randomize(build_model(cfg)).double().eval()
    frames = 64 if "128" in leaf else 16  # two groups of frames in res3
    exported = export(model, torch.rand(2, 3, frames, 48, 48).double()).module()
    for clips in (1, 2, 5):
        x = 255 * torch.rand(clips, 3, frames, 48, 48).double()
        with torch.no_grad():
            expected = torch.cat([model(clip) for clip in x.split(1)])
        assert expected.std() > 0.01
        assert_close(exported(x), expected)


@pytest.mark.slow
def test_full_size():
    cfg = load_config(
        CONFIGS / "i3d_R_50_NL5_32x2.yaml", ["MODEL.DEVICE", "meta"], default_video_config
    )
    with torch.device("meta"):
        model = build_model(cfg).eval()
        program = export(model, torch.rand(2, 3, 32, 224, 224))
        assert program.module()(torch.rand(5, 3, 32, 224, 224)).shape == (5, 400)
