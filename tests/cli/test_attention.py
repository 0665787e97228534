"""attention and health, on a detector whose attention is known."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from nl_detectron_cli import attention, health, predict
from tests import planted
from tests.running import words

RED, BLUE = planted.rectangle(10, 42, 20, 20), planted.rectangle(230, 102, 20, 20)


@pytest.fixture
def files(nl_cfg, tmp_path):
    """A planted detector on disk, and a folder with a picture for it and a broken one."""
    cfg = planted.planted_cfg(nl_cfg)
    torch.save({"model": planted.planted_predictor(cfg).model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "images").mkdir()
    Image.fromarray(planted.picture(RED, BLUE)[:, :, ::-1]).save(tmp_path / "images" / "pair.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG")
    return tmp_path


COMMANDS = {"predict": predict, "attention": attention, "health": health}


@pytest.fixture
def command(files):
    """Runs a tool on an image of the folder, or on the folder."""

    def run(tool, image, *options):
        given = "--config-file", files / "config.yaml", "--weights", files / "model.pth"
        COMMANDS[tool].main(words(*given, "--input", files / "images" / image, *options))

    return run


class TestVisualizeAttention:
    X, Y = (RED[0] + RED[2]) // 2, (RED[1] + RED[3]) // 2

    def test_folder(self, files, command, capsys):
        out = files / "out"
        options = ["--block", "res4.*", "--query", f"{self.X},{self.Y}", "--query", "150,5"]
        command("attention", "", *options, "--output", out)
        stdout, stderr = capsys.readouterr()
        assert "1 images done, 1 skipped" in stdout
        assert "broken.png" in stderr
        stems = [f"pair.res4.non_local4.{query}" for query in (f"{self.X}_{self.Y}", "150_5")]
        expected = [f"{stem}.{end}" for stem in stems for end in ("heat.png", "arrows.png", "npz")]
        assert {path.name for path in out.iterdir()} == {*expected, "grid.png"}

        raw = np.load(out / f"{stems[0]}.npz")
        assert raw["query"].tolist() == [self.X + 0.5, self.Y + 0.5, 0]
        assert raw["weights"].shape == (1, 5, 9)
        assert raw["weights"].sum() == pytest.approx(1)
        x0, y0, x1, y1 = raw["boxes"][np.unravel_index(raw["weights"][0].argmax(), (5, 9))]
        assert x0 <= (BLUE[0] + BLUE[2]) / 2 < x1
        assert y0 <= (BLUE[1] + BLUE[3]) / 2 < y1
        with Image.open(out / f"{stems[0]}.arrows.png") as file:
            arrows = file.convert("RGB")
        assert arrows.width == 3.25 * 300
        # The rectangles show where the image is, and the arrow is on the line between them.
        pixels = np.asarray(arrows).astype(int)
        red = np.argwhere((pixels[..., 0] > 200) & (pixels[..., 1:].max(axis=2) < 60))
        blue = np.argwhere((pixels[..., 2] > 200) & (pixels[..., :2].max(axis=2) < 60))
        (top, left), (bottom, right) = red.min(axis=0), blue.max(axis=0) + 1
        scale = (right - left) / (BLUE[2] - RED[0])
        assert scale == pytest.approx((bottom - top) / (BLUE[3] - RED[1]), rel=0.02)
        head, tail = np.array([(x0 + x1) / 2, (y0 + y1) / 2]), np.array([self.X, self.Y]) + 0.5
        on_image = 0.9 * head + 0.1 * tail
        x, y = (on_image - RED[:2]) * scale + [left, top]
        r, g, b = pixels[round(y), round(x)]
        assert min(r, g) > b + 40  # yellow
        with Image.open(out / "grid.png") as grid, Image.open(out / f"{stems[0]}.heat.png") as heat:
            assert grid.size == (4 * heat.width, heat.height)  # one row of two pairs

    def test_grid_has_no_empty_place(self):
        columns = attention.grid_columns
        by_pairs = {pairs: columns(2 * pairs) for pairs in (1, 2, 3, 4, 5, 6, 9)}
        assert by_pairs == {1: 2, 2: 4, 3: 6, 4: 4, 5: 2, 6: 6, 9: 6}

    def test_joint_in_its_roi(self, files, command):
        options = ["--block", "keypoint_head.*", "--joint", "2", "--output", files / "out"]
        command("attention", "pair.png", *options, "--score-threshold", "0.4")
        stem = files / "out" / "pair.keypoint_head.non_local2.2"
        assert all(stem.with_suffix(end).exists() for end in (".2.heat.png", ".2.arrows.png"))
        raw = np.load(f"{stem}.npz")
        assert raw["weights"].shape == (1, 14, 14)
        x, y, _ = raw["query"]
        (x0, y0), (x1, y1) = raw["boxes"][0, 0, :2], raw["boxes"][-1, -1, 2:]
        assert 0 <= x0 < x < x1 <= planted.SIZE[1]
        assert 0 <= y0 < y < y1 <= planted.SIZE[0]

    def test_joint_of_an_unlikely_detection(self, files, command, capsys):
        """All logits are set to 0, so the class and the background have 0.5 each."""
        checkpoint = torch.load(files / "model.pth")
        for name, parameter in checkpoint["model"].items():
            if "box_predictor.cls_score" in name:
                parameter.zero_()
        torch.save(checkpoint, files / "model.pth")
        options = ["--joint", "2", "--output", files / "out", "--score-threshold", "0.6"]
        with pytest.raises(SystemExit, match="no image of .*pair.png could be"):
            command("attention", "pair.png", *options)
        message = (
            "skipped .*pair.png: no detection reaches --score-threshold 0.6; the highest is 0.50"
        )
        assert re.search(message, capsys.readouterr().err)
        assert list((files / "out").iterdir()) == []

    def test_pixel_where_a_model_without_keypoints_detects_nothing(self, files, command):
        model = torch.load(files / "model.pth")["model"]
        model = {name: value for name, value in model.items() if "keypoint_head" not in name}
        torch.save({"model": model}, files / "model.pth")
        options = ["MODEL.KEYPOINT_ON", "False", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"]
        command("attention", "pair.png", "--query", "9,5", "--output", files, *options)
        assert (files / "pair.res4.non_local4.9_5.npz").exists()

    def test_joint_by_a_name_that_is_stored_with_the_weights(self, files, command):
        names = ["tip", "left_wrist", "c", "d", "e"]
        checkpoint = torch.load(files / "model.pth")
        checkpoint["metadata"] = {"thing_classes": ["hand"], "keypoint_names": names}
        torch.save(checkpoint, files / "model.pth")
        options = ["--block", "res4.*", "--output", files / "out", "--joint"]
        command("attention", "pair.png", *options, "left_wrist")
        command("attention", "pair.png", *options, "1")
        by_name, by_index = (
            np.load(files / "out" / f"pair.res4.non_local4.{joint}.npz")["query"]
            for joint in ("left_wrist", "1")
        )
        assert by_name.tolist() == by_index.tolist()
        with pytest.raises(
            SystemExit, match="--joint must be .*tip, left_wrist, c, d, e.*, got 'nose'"
        ):
            command("attention", "pair.png", *options, "nose")

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            ("--query 173,5", 1, "--query 173,5 is outside the image, 173 x 101 pixels"),
            ("--query 5,5 --block res5.x", 1, "'res5.x'; it has backbone.bottom_up.res4."),
            ("--joint nose", 1, "--joint must be one of the model's joints (0 to 4), got 'nose'"),
            (
                *("--joint 0 MODEL.KEYPOINT_ON False", 1),
                "--joint must be one of the model's joints (none), got '0'",
            ),
            (
                *("--query 30,5 --block keypoint_head.* --score-threshold 1", 1),
                "--query 30,5 is in none of the 0 detections that reach --score-threshold",
            ),
            *((f"--query 5,5 {frame} 3", 1, "takes images") for frame in ("--frame", "--frames")),
            ("", 2, "give at least one --query or --joint"),
            ("--query 5,5 --frames 3,x", 2, "integers with commas, such as 0,16,32, got '3,x'"),
            ("--query 30", 2, "argument --query: must be X,Y, two non-negative integers"),
            ("--query -5,20", 2, "320,240, got '-5,20'"),
            ("--query 5,x", 2, "320,240, got '5,x'"),
            ("--query", 2, "argument --query: expected one argument"),
            ("--joint 0 --score-threshold 2", 2, "argument --score-threshold: must be from 0 to 1"),
        ],
    )
    def test_refusals(self, files, command, capsys, options, code, message):
        with pytest.raises(SystemExit) as stop:
            command("attention", "pair.png", "--output", files / "out", options)
        # a sentence, which Python prints, is exit code 1
        assert (stop.value.code == 2) == (code == 2)
        assert message in capsys.readouterr().err + str(stop.value)


@pytest.mark.parametrize("tool", COMMANDS)
def test_no_arguments(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        COMMANDS[tool].main([])
    assert stop.value.code == 2
    assert "the following arguments are required: --config-file" in capsys.readouterr().err


STOCK = (
    "MODEL.BACKBONE.NAME build_resnet_fpn_backbone "
    "MODEL.ROI_KEYPOINT_HEAD.NAME KRCNNConvDeconvUpsampleHead"
)


@pytest.mark.parametrize("tool", ["attention", "health"])
@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("broken.png", "", "no image of .*broken.png could be"),
        ("../empty", "", "empty contains no image"),
        ("pair.png", "MODEL.NON_LOCAL.PAIRWIZE gaussian", "did you mean MODEL.NON_LOCAL.PAIR"),
        ("pair.png", "MODEL.RESNETS.DEPTH 101", "weights .*model.pth: .* another depth"),
        ("pair.png", "MODEL.BACKBONE.NAME none", "the config does not build a model: .*none"),
        ("pair.png", f"--weights= {STOCK}", "the model has no non-local blocks; a config"),
    ],
)
def test_mistakes(files, command, tool, image, options, message):
    (files / "empty").mkdir()
    looking = ("--query 5,5 --output", files / "out") if tool == "attention" else ()
    with pytest.raises(SystemExit, match=message):
        command(tool, image, *looking, options)


def test_health_of_random_weights(command, capsys, caplog):
    command("health", "pair.png", "--weights= MODEL.KEYPOINT_ON False")
    assert "1 images done, 0 skipped" in capsys.readouterr().out
    assert "No weights are given: the model keeps its random initial values." in caplog.messages


def test_health(files, command, capsys):
    Image.new("RGB", (4000, 1)).save(files / "images" / "too_flat_to_be_resized.png")
    command("health", "")
    stdout, stderr = capsys.readouterr()
    assert "1 images done, 2 skipped" in stdout
    assert "broken.png" in stderr
    assert "too_flat_to_be_resized.png" in stderr
    table = [line.strip("| ").split(" | ") for line in stdout.splitlines() if "non_local" in line]
    assert [row[0] for row in table] == [
        "backbone.bottom_up.res4.non_local4",
        "roi_heads.keypoint_head.non_local2",
    ]
    for row in table:
        ratio, entropy, query_dependence = map(float, row[1:])
        assert ratio == 0  # its output convolution is zero
        assert 0 < entropy <= 1
        assert 0 <= query_dependence < 1
