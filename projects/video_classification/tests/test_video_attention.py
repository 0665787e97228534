"""attention and health on models of videos: which frames they see, and where they look."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from detectron2.config import defaults
from PIL import Image
from video_classification.data import write_video
from video_classification.env import setup_environment
from video_classification.models import POOLINGS
from video_classification.models.layers import Conv3d
from video_classification.predictor import VideoPredictor, clip_around

from nl_detectron.analysis.attention import record_attention
from nl_detectron.analysis.health import block_health
from nl_detectron.non_local import find_blocks
from nl_detectron_cli import attention, health

SIZE = (96, 125)  # of the frames; resized to 64 x 83, as 125 * 64 / 96 = 83.3
BLUE_AT, RED_AT = 17, 21  # frames
# Row and column of squares of 16 x 16, where the strided shortcuts see them: multiples of 16 pixels
# after the resizing
RED, BLUE = (24, 48), (72, 72)


@pytest.fixture
def cfg(video_cfg):
    """A C2D with one block, of whose keys each stands for 2 frames, and 32 x 32 pixels."""
    video_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet3d_backbone"
    video_cfg.MODEL.VIDEO.POOLING, video_cfg.MODEL.VIDEO.NUM_BLOCKS = "released_8x8", (1, 1, 2, 1)
    video_cfg.INPUT.MIN_SIZE_TEST, video_cfg.TEST.VIEWS.CROP_SIZE = 64, 64
    video_cfg.INPUT.CLIP.NUM_FRAMES, video_cfg.INPUT.CLIP.STRIDE = 8, 2
    return video_cfg


@torch.no_grad()
def plant(model):
    """Red looks at blue; colors pass through the network, each in a channel of its own."""
    for module in model.backbone.modules():
        if isinstance(module, Conv3d):
            module.weight.zero_()
    stem = model.backbone.stem.conv1.weight
    stem[[0, 1], [0, 2], 0, 3, 3] = 1  # red minus blue, and blue minus red
    stem[[0, 1], [2, 0], 0, 3, 3] = -1
    for stage in ("res2", "res3", "res4"):
        getattr(model.backbone, stage)[0].shortcut.weight[[0, 1], [0, 1]] = 1
    (block,) = find_blocks(model).values()
    block.theta.weight.zero_()[0, 0] = 10
    block.phi.weight.zero_()[0, 1] = 10
    return model


@pytest.fixture
def files(cfg, tmp_path, monkeypatch):
    """A planted model, and a folder with a video of 40 frames and a broken one.

    The commands know the config's keys, as in a process with DETECTRON2_ENV_MODULE.
    """
    monkeypatch.setattr(defaults, "_C", defaults._C.clone())
    setup_environment()
    state = plant(VideoPredictor(cfg, "").model).state_dict()
    torch.save({"model": state}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    frames = np.full((40, *SIZE, 3), 90, dtype=np.uint8)
    for t, (y, x), color in ((RED_AT, RED, (255, 0, 0)), (BLUE_AT, BLUE, (0, 0, 255))):
        frames[t, y : y + 16, x : x + 16] = color
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", frames, 10, crf=0)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"\0" * 99)
    return tmp_path


@pytest.fixture
def command(files):
    def run(tool, name, *options):
        given = f"--config-file {files}/config.yaml --weights {files}/model.pth --input {files}"
        tool.main([*f"{given}/{name}".split(), *map(str, options)])

    return run


@pytest.mark.parametrize(
    ("frame", "num_frames", "clip", "index"),
    [
        (50, 100, [30, 40, 50, 60], 2),
        (5, 100, [5, 15, 25, 35], 0),
        (95, 100, [65, 75, 85, 95], 3),
        (69, 80, [49, 59, 69, 79], 2),
        (70, 80, [40, 50, 60, 70], 3),
        (14, 25, [4, 14, 24, 9], 1),  # shorter than the clip: it is repeated
        (0, 1, [0, 0, 0, 0], 0),
    ],
)
def test_clip_around_a_frame(frame, num_frames, clip, index):
    assert clip_around(frame, num_frames, 4, 10) == (clip, index)


# By hand, from the strides of conv1, pool1 and pool2: those of res2 and of later stages
STRIDES = {
    "paper": (4, 8),
    "released_32x2": (4, 8),
    "released_8x8": (1, 2),
    "slowfast": (1, 2),
    "mmaction2": (4, 8),
    "space": (1, 1),
    "tsm_temporal_pool": (1, 2),
    "none": (1, 1),
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_frames_that_a_key_stands_for(pooling, cfg, randomize):
    """Of a C2D: another frame in the clip changes what the block sees in its position."""
    cfg.MODEL.VIDEO.POOLING = pooling
    cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES2 = (0,)
    predictor = VideoPredictor(cfg, "")
    model, length = randomize(predictor.model), 24
    torch.nn.init.zeros_(model.backbone.res2.non_local0.norm.weight)  # it would mix the frames
    clips = 40 * torch.randn(1, 3, length, 32, 32).repeat(length + 1, 1, 1, 1, 1)
    for t in range(length):
        clips[t, :, t] = 40 * torch.randn(3, 32, 32)
    with torch.no_grad(), record_attention(model) as recordings:
        model(clips)
    for (name, recording), stride in zip(sorted(recordings.items()), STRIDES[pooling]):
        assert predictor.frame_stride(name) == stride
        maps = recording.last_input
        changed = (maps[:-1] != maps[-1]).any(1).any(-1).any(-1)  # frame, position
        assert changed.any(0).all()
        for t in range(length):
            positions = changed[t].nonzero().flatten().tolist()
            if "paper" in pooling or "tsm" in pooling:  # these overlap
                assert t // stride in positions or not positions
            else:
                assert positions in ([], [t // stride])


def test_attention_of_a_planted_pair(files, command, capsys):
    query = f"{RED[1] + 8},{RED[0] + 8}"
    options = "--query", query, "--frame", RED_AT, "--output", files / "out"
    command(attention, "videos", *options)
    stdout, stderr = capsys.readouterr()
    assert "1 videos done, 1 skipped" in stdout
    assert re.search("skipped .*broken.mp4: ", stderr)
    stem = f"a.res4.non_local0.56_32_{RED_AT}"
    assert {f.name for f in (files / "out").iterdir()} == {
        f"{stem}.{end}" for end in ("heat.png", "arrows.png", "npz")
    }
    raw = np.load(files / "out" / f"{stem}.npz")
    assert raw["frames"].tolist() == [13, 15, 17, 19, 21, 23, 25, 27]
    assert raw["positions"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert raw["query"].tolist() == [56.5, 32.5, 2]
    assert raw["weights"].sum() == pytest.approx(1)
    t, row, column = np.unravel_index(raw["weights"].argmax(), raw["weights"].shape)
    assert BLUE_AT in raw["frames"][raw["positions"] == t]
    x0, y0, x1, y1 = raw["boxes"][row, column]
    assert x0 <= BLUE[1] + 8 < x1
    assert y0 <= BLUE[0] + 8 < y1
    x, y = raw["boxes"][row, column].reshape(2, 2).mean(0)
    assert f"most to ({x:.0f}, {y:.0f}) around frame 17" in stderr + stdout
    # Two frames to draw: less wide than four of the same height would be
    sizes = []
    for frames in ("13,17", "13"):
        command(attention, "videos/a.mp4", *options, "--frames", frames)
        with Image.open(files / "out" / f"{stem}.heat.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0] == 6.75 * 300
    assert sizes[0][1] < sizes[1][1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("videos/a.mp4", "--query 125,5", "--query 125,5 is outside the frames, 125 x 96 pixels"),
        ("videos/a.mp4", "--query 5,5 --frame 40", "--frame must be from 0 to 39 .*, got 40"),
        ("videos/a.mp4", "--query 5,5 --frames 3", "--frames 3 is not in the clip, .* 12, 14, 16"),
        ("videos/a.mp4", "--query 5,5 --frames 12,14", "--frames 14 and 12 are the same position"),
        ("videos/none.mp4", "--query 5,5", "skipped .*none.mp4: .*No such file"),
        ("videos/a.png", "--query 5,5", r"needs a video \(.avi .* or a folder .* got .*a.png"),
        (".", "--query 5,5", r"contains no video \(.avi"),
        ("videos", "--joint 0", "--joint must be one of the model's joints .none."),
        ("videos", "--query 5,5 MODEL.VIDEO.HEAD.NUM_CLASSES 4", "head.linear.* number of classes"),
        ("videos", "--query 5,5 MODEL.VIDEO.NUM_BLOCKS (1,1,3,1)", "lacks .* another depth"),
        ("videos", "--query 5,5 INPUT.CLIP.NUM_FRAMES 1", "clips must be .* T >= 2"),
    ],
)
def test_mistakes(files, command, capsys, name, options, message):
    with pytest.raises(SystemExit) as stop:
        command(attention, name, "--output", files / "out", *options.split())
    assert re.search(message, capsys.readouterr().err + str(stop.value))


def test_health(files, command, cfg, capsys):
    """Of the clip in the middle: frames 20 - 8, 20 - 6, ..., 20 + 6."""
    for name in ("a", "b"):
        frames = np.random.default_rng(ord(name)).integers(0, 256, (40, 64, 80, 3), dtype=np.uint8)
        write_video(files / "videos" / f"{name}.mp4", frames, 10, crf=0)
    model = VideoPredictor(cfg, str(files / "model.pth")).model
    (block,) = find_blocks(model).values()
    torch.nn.init.normal_(block.conv_out.weight)
    torch.nn.init.ones_(block.norm.weight)
    torch.save({"model": model.state_dict()}, files / "model.pth")
    expected, seen = [], []
    with block.register_forward_hook(lambda _, x, z: seen.append((x[0], z))), torch.no_grad():
        for name in ("a", "b"):
            frames = np.random.default_rng(ord(name)).integers(0, 256, (40, 64, 80, 3), np.uint8)
            model(torch.from_numpy(frames[12:28:2]).permute(3, 0, 1, 2)[None])
            expected.append(block_health(block, *seen.pop()))
    command(health, "videos")
    stdout, stderr = capsys.readouterr()
    assert "2 videos done, 1 skipped" in stdout
    assert "broken.mp4" in stderr
    numbers = " | ".join(f"{number:.3f}" for number in np.mean(expected, axis=0))
    assert f"| backbone.res4.non_local0 | {numbers} |" in stdout
    assert "| 0.000" not in stdout
