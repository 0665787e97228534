"""The config that is written with a converted checkpoint, and the one that checks it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from torch.testing import assert_close
from video_classification.config import default_video_config

from nl_detectron.config import load_config
from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.weights import convert
from nl_detectron.weights.config_model import ConfigModel
from nl_detectron.weights.video_config import video_config
from nl_detectron_cli import convert as command

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FORM = {"pairwise": "embedded_gaussian", "subsample": 2}
SPACETIME = {"axes": "spacetime", "group_frames": 0}


def read(path):
    return load_config(path, ["MODEL.DEVICE", "cpu"], default_video_config)


def build_meta(cfg):
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).eval()


@pytest.mark.parametrize(
    ("leaf", "dialect", "pooling", "options", "name", "clip"),
    [
        ("c2d_R_50_32x2", "caffe2", "released_32x2", {}, "c2d_baseline_32x2_IN.pkl", (32, 2)),
        ("i3d_R_50_128x1", "affine", "released_32x2", {}, "i3d_128x1_I3D.pkl", (128, 1)),
        ("i3d_R_50_NL5_32x2", "caffe2", "released_8x8", {**FORM, **SPACETIME}, "x.pkl", (32, 2)),
        ("i3d_R_101_32x2", "pytorchvideo", "slowfast", {}, "I3D_8x8_R50.pyth", (8, 8)),
        ("c2d_R_101_NL10_32x2", "slowfast", "slowfast", FORM, "C2D_NLN_4x16_R101.pyth", (4, 16)),
        ("i3d_R_50_32x2", "mmcv", "mmaction2", {}, "i3d_r50_8xb8-32x2x1-100e.pth", (32, 2)),
        ("tsm_R_101_8x8", "tsm", "space", {}, "TSM_resnet101_shift8_segment8.pth", (32, 2)),
        ("tsm_R_50_8x8", "tsm", "tsm_temporal_pool", {}, "TSM_tpool.pth", (32, 2)),
        (
            *("tsm_R_50_NL5_8x8", "tsm", "space", {**FORM, "scale": False}),
            *("tsm_r50_8xb8-1x1x8-50e.pth", (32, 2)),
        ),
    ],
)
def test_written_config_builds_the_network(tmp_path, leaf, dialect, pooling, options, name, clip):
    """That of a config of this project, which was written by hand."""
    cfg = read(CONFIGS / "Kinetics" / f"{leaf}.yaml")
    cfg.MODEL.VIDEO.POOLING = pooling
    if dialect == "mmcv":  # its data_preprocessor
        cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
        cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    if dialect in ("mmcv", "tsm"):  # their AdaptiveAvgPool; the others have windows of 7 x 7
        cfg.MODEL.VIDEO.HEAD.POOL_SIZE = 0
    model, affine = build_meta(cfg), dialect == "affine"
    dialect = "caffe2" if affine else dialect
    given = {"options": lambda block: options, "pooling": pooling}
    there = convert(model.state_dict(), "nl_detectron", dialect, **given).state
    if affine:  # the statistics are part of scale and bias
        there = {key: value for key, value in there.items() if not key.endswith(("_rm", "_riv"))}
    back = convert(there, dialect, "nl_detectron", **given)
    path = tmp_path / "written.yaml"
    path.write_text(video_config(back, dialect, f"folder/{name}", "weights.pth"))
    line = path.read_text().splitlines()[0]
    assert line.startswith(f"# {name}, converted from {dialect} ")
    assert ("not known" in line) == (clip == (32, 2) and "32x2" not in name)
    written = read(path)
    assert str(build_meta(written)) == str(model)
    for key in ("PIXEL_MEAN", "PIXEL_STD", "VIDEO", "NON_LOCAL"):
        expected, got = cfg.MODEL[key], written.MODEL[key]
        if key == "VIDEO":  # these matter only for training
            expected.HEAD.INIT_STD, expected.HEAD.LR_FACTOR = 0.01, 1.0
        if key == "NON_LOCAL" and not options:
            continue
        assert got == expected
    assert (written.INPUT.FORMAT, written.MODEL.WEIGHTS) == ("RGB", "weights.pth")
    assert (written.INPUT.CLIP.NUM_FRAMES, written.INPUT.CLIP.STRIDE) == clip


def test_config_has_no_more_than_it_needs():
    cfg = read(CONFIGS / "Kinetics" / "i3d_R_50_32x2.yaml")
    there = convert(build_meta(cfg).state_dict(), "nl_detectron", "pytorchvideo").state
    back = convert(there, "pytorchvideo", "nl_detectron")
    assert yaml.safe_load(video_config(back, "pytorchvideo", "I3D_8x8_R50.pyth", "i3d.pth")) == {
        "MODEL": {
            "META_ARCHITECTURE": "VideoClassifier",
            "WEIGHTS": "i3d.pth",
            "BACKBONE": {"NAME": "build_resnet3d_backbone", "FREEZE_AT": 0},
            "RESNETS": {"NORM": "BN", "OUT_FEATURES": ["res5"], "STRIDE_IN_1X1": False},
            "VIDEO": {
                "POOLING": "slowfast",
                "STEM_KERNEL": [5, 7, 7],
                "INFLATE": "3x1x1",
                "HEAD": {"NUM_CLASSES": 400, "POOL_SIZE": 7},
            },
            "PIXEL_MEAN": [114.75] * 3,
            "PIXEL_STD": [57.375] * 3,
        },
        "INPUT": {"FORMAT": "RGB", "CLIP": {"NUM_FRAMES": 8, "STRIDE": 8}},
        "VERSION": 2,
    }


@pytest.fixture
def checkpoint(video_cfg, randomize, tmp_path):
    """A model of ours, its config, and its weights in a file as SlowFast writes it."""
    video_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet3d_backbone"
    video_cfg.MODEL.RESNETS.OUT_FEATURES = ["res3"]
    video_cfg.MODEL.VIDEO.NUM_BLOCKS, video_cfg.MODEL.VIDEO.INFLATE = (1, 1), "3x1x1"
    video_cfg.MODEL.VIDEO.STEM_KERNEL, video_cfg.MODEL.VIDEO.POOLING = (5, 7, 7), "slowfast"
    places = video_cfg.MODEL.NON_LOCAL.AFTER_BLOCKS
    places.RES3, places.RES4 = (0,), ()
    model = randomize(build_model(video_cfg)).eval()
    state = convert(model.state_dict(), "nl_detectron", "slowfast", lambda block: FORM).state
    path = tmp_path / "I3D_NLN_8x8_R50.pyth"
    torch.save({"model_state": state, "epoch": 118}, path)
    return model, video_cfg, path


BLOCK = "--block pairwise=embedded_gaussian subsample=2"


def run(path, *arguments, source="slowfast"):
    """Convert a file; returns the config that is written beside it."""
    output, config = path.with_name("converted.pth"), path.with_name("written.yaml")
    words = [word for part in arguments for word in part.split()] + ["--write-config", str(config)]
    command.main([str(path), str(output), "--from", source, *words])
    return config


def test_command(checkpoint):
    model, _, path = checkpoint
    cfg = read(run(path, "--to nl_detectron --pooling slowfast", BLOCK))
    ours = build_model(cfg).eval()
    StrictCheckpointer(ours, complete=True).load(cfg.MODEL.WEIGHTS)
    clips = 255 * torch.rand(2, 3, 8, 64, 64)
    expected = model(clips)
    assert expected.std() > 0.1
    assert_close(ours(clips), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_command_on_a_checkpoint_of_pytorchvideo(tmp_path, randomize):
    hub = pytest.importorskip(
        "pytorchvideo.models.hub", reason="make peers installs it", exc_type=ImportError
    )
    theirs = hub.i3d_r50(head_pool_kernel_size=(4, 2, 2)).eval()
    randomize(theirs)
    path = tmp_path / "I3D_8x8_R50.pyth"
    torch.save({"model_state": theirs.state_dict()}, path)
    cfg = read(run(path, "--to nl_detectron", source="pytorchvideo"))
    ours = build_model(cfg).eval()
    StrictCheckpointer(ours, complete=True).load(cfg.MODEL.WEIGHTS)
    clips = 255 * torch.rand(2, 3, 8, 64, 64)
    expected = theirs((clips / 255 - 0.45) / 0.225)
    assert_close(ours(clips) / expected.std(), expected / expected.std(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            f"--to nl_detectron {BLOCK}",
            r"I3D_NLN_8x8_R50.pyth: the weights do not show MODEL.VIDEO.POOLING.*\(--pooling\).*: "
            "slowfast, space where its MODEL.ARCH is 2d",
        ),
        (
            "--to nl_detectron --pooling slowfast",
            r"the weights do not show pairwise, subsample of .* \(--block pairwise=...\)",
        ),
        (
            f"--to nl_detectron --pooling paper {BLOCK}",
            r"MODEL.VIDEO.POOLING\) of these weights must be one of .*'slowfast', 'space'.*'paper'",
        ),
        (f"--to caffe2 --pooling slowfast {BLOCK}", "--write-config is for --to nl_detectron"),
        (f"--to nl_detectron --blocks-only {BLOCK}", "is not a whole network for video"),
        (f"--to nl_detectron --blocks-only --pooling space {BLOCK}", "--pooling: .* not a whole"),
    ],
)
def test_not_written(checkpoint, arguments, message):
    path = checkpoint[-1]
    with pytest.raises(SystemExit) as error:
        run(path, arguments)
    assert re.search(message, str(error.value))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.VIDEO.STEM_KERNEL", (5, 7, 7), None),
        ("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0], r"PIXEL_MEAN .* must be \[114.75.*, got \[0.0, "),
        ("MODEL.VIDEO.POOLING", "paper", r"must be one of \['slowfast', 'space'\], got 'paper'"),
        ("MODEL.VIDEO.STEM_KERNEL", (1, 7, 7), "has in another shape 1 key: backbone.stem.conv1.w"),
        ("MODEL.VIDEO.NUM_BLOCKS", (2, 1), "lacks 15 keys: backbone.res2.1.conv1.norm.bias, "),
        ("MODEL.NON_LOCAL.AFTER_BLOCKS.RES3", (), "no non-local block 'backbone.res3.non_local0'"),
    ],
)
def test_config_that_the_network_must_have(checkpoint, key, value, message):
    _, cfg, path = checkpoint
    cfg.merge_from_list([key, value, "MODEL.NON_LOCAL.AFTER_BLOCKS.RES2", (0,)])
    state = torch.load(path)["model_state"]
    config = ConfigModel(cfg)

    def check():
        options = config.options
        result = convert(state, "slowfast", "nl_detectron", options, pooling=config.pooling)
        config.add_missing_blocks(result)
        config.check_video(result, "slowfast")
        return result

    if message:
        with pytest.raises(ValueError, match=message):
            check()
    else:
        assert "backbone.res2.non_local0.g.weight" in check().added
