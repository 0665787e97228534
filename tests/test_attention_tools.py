"""visualize_attention and block_health, on a detector whose attention is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests import planted
from tests.running import load_tool

RED, BLUE = planted.rectangle(10, 42, 20, 20), planted.rectangle(230, 102, 20, 20)


@pytest.fixture
def files(small_cfg, tmp_path):
    """A planted detector on disk, and a folder with a picture for it and a broken one."""
    cfg = planted.planted_cfg(small_cfg)
    torch.save({"model": planted.planted_predictor(cfg).model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "images").mkdir()
    Image.fromarray(planted.picture(RED, BLUE)[:, :, ::-1]).save(tmp_path / "images" / "pair.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG")
    return tmp_path


@pytest.fixture
def command(files, monkeypatch):
    """Runs a tool on an image of the folder, or on the folder."""

    def run(tool, image, *options):
        arguments = ["--config-file", files / "config.yaml", "--weights", files / "model.pth"]
        arguments += ["--input", files / "images" / image, *options]
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        load_tool(tool).main()

    return run


class TestVisualizeAttention:
    X, Y = (RED[0] + RED[2]) // 2, (RED[1] + RED[3]) // 2

    def test_folder(self, files, command, capsys):
        out = files / "out"
        options = ["--block", "res4.*", "--query", f"{self.X},{self.Y}", "--query", "150,5"]
        command("visualize_attention", "", *options, "--output", out)
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
        with Image.open(out / f"{stems[0]}.arrows.png") as arrows:
            assert arrows.size == (1200, 700)
            # On the way to the blue rectangle, most of it is grey.
            scale = arrows.width / planted.SIZE[1]
            head = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
            pixel = (0.9 * head + 0.1 * np.array([self.X + 0.5, self.Y + 0.5])) * scale
            red, green, blue = arrows.convert("RGB").getpixel(tuple(pixel.round().astype(int)))
            assert red > 200 > 100 > blue
            corner = (np.array(BLUE[2:]) - 1.5) * scale  # of the blue rectangle, behind the head
            red, green, blue = arrows.convert("RGB").getpixel(tuple(corner.round().astype(int)))
            assert blue > 200 > 100 > red

    def test_joint_in_its_roi(self, files, command):
        options = ["--block", "keypoint_head.*", "--joint", "2", "--output", files / "out"]
        command("visualize_attention", "pair.png", *options)
        stem = files / "out" / "pair.keypoint_head.non_local2.2"
        assert all(stem.with_suffix(end).exists() for end in (".2.heat.png", ".2.arrows.png"))
        raw = np.load(f"{stem}.npz")
        assert raw["weights"].shape == (1, 14, 14)
        x, y, _ = raw["query"]
        (x0, y0), (x1, y1) = raw["boxes"][0, 0, :2], raw["boxes"][-1, -1, 2:]
        assert 0 <= x0 < x < x1 <= planted.SIZE[1]
        assert 0 <= y0 < y < y1 <= planted.SIZE[0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--query", "173,5"], "query 173,5 is outside the image of 173 x 101"),
            (["--query", "5,5", "--block", "res5.x"], "'res5.x'; it has backbone.bottom_up.res4."),
            (
                ["--joint", "nose", "--block", "res4.*"],
                "no joint 'nose'; the model has 0, 1, 2, 3, 4",
            ),
            ([], "give at least one --query or --joint"),
        ],
    )
    def test_refusals(self, files, command, capsys, options, message):
        with pytest.raises(SystemExit) as stop:
            command("visualize_attention", "pair.png", *options, "--output", files / "out")
        assert stop.value.code not in (None, 0)
        assert message in capsys.readouterr().err + str(stop.value)


@pytest.mark.parametrize("tool", ["visualize_attention", "block_health"])
@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("broken.png", [], "nothing could be done with .*broken.png"),
        ("../empty", [], "empty holds no image"),
        ("pair.png", ["MODEL.NON_LOCAL.PAIRWIZE", "gaussian"], "did you mean MODEL.NON_LOCAL.PAIR"),
        ("pair.png", ["MODEL.RESNETS.DEPTH", "101"], "weights .*model.pth: .* of another depth"),
        ("pair.png", ["MODEL.BACKBONE.NAME", "none"], "no model can be built: .*'none'"),
    ],
)
def test_mistakes(files, command, tool, image, options, message):
    (files / "empty").mkdir()
    looking = ["--query", "5,5", "--output", files / "out"]
    with pytest.raises(SystemExit, match=message):
        command(tool, image, *(looking if tool == "visualize_attention" else []), *options)


def test_block_health_of_random_weights(command, capsys):
    command("block_health", "pair.png", "--weights", "", "MODEL.KEYPOINT_ON", "False")
    assert "1 images done, 0 skipped" in capsys.readouterr().out


def test_block_health(command, capsys):
    command("block_health", "")
    stdout, stderr = capsys.readouterr()
    assert "1 images done, 1 skipped" in stdout
    assert "broken.png" in stderr
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
