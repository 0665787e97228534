"""Outputs: a symbolic link does not lead what is written out of its folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from PIL import Image

from nl_detectron.engine.coco.results import ResultsFile
from nl_detectron.engine.frames import Images, Video
from nl_detectron.safety.folders import check_output_file, check_output_folder
from nl_detectron.weights import DIALECTS, save


@pytest.fixture
def outside(tmp_path):
    """A file that nobody may change."""
    path = tmp_path / "outside.txt"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


def test_files(tmp_path, outside):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "plain").write_text("")
    (folder / "within").symlink_to(folder / "plain")
    (folder / "relative").symlink_to("plain")
    for name in ("new", "plain", "within", "relative"):
        check_output_file(folder / name)
    check_output_file("/dev/null")
    check_output_file("/dev/stdout")
    (folder / "out").symlink_to(outside)
    (folder / "chain").symlink_to(folder / "out")
    (folder / "dangling").symlink_to(tmp_path / "lost")
    (folder / "up").symlink_to("../outside.txt")
    for name in ("out", "chain", "dangling", "up"):
        with pytest.raises(ValueError, match=f"{name} is a symbolic link to .*(outside.txt|lost)"):
            check_output_file(folder / name)
    (tmp_path / "linked").symlink_to(folder)  # the user's choice
    check_output_file(tmp_path / "linked" / "plain")


def test_folders(tmp_path, outside):
    folder = tmp_path / "out"
    check_output_folder(folder)
    (folder / "inference" / "deep").mkdir(parents=True)
    (folder / "loop").symlink_to("loop")
    (folder / "data").symlink_to(tmp_path)  # a folder, which nothing is written to
    (folder / "data_too").symlink_to(folder / "inference")
    check_output_folder(folder, ["inference"])
    for link in ("log.txt", "inference/results.json", "inference/deep/x.json"):
        (folder / link).symlink_to(outside)
        with pytest.raises(ValueError, match=f"{link} is a symbolic link"):
            check_output_folder(folder, ["inference"])
        (folder / link).unlink()
    with pytest.raises(ValueError, match="data is a symbolic link"):
        check_output_folder(folder, ["data"])


def test_frames(tmp_path, outside):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "in" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").symlink_to(outside)
    with pytest.raises(ValueError, match="a.png is a symbolic link"):
        Images(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "a.png").unlink()
    (tmp_path / "out" / "x.mp4").symlink_to(outside)
    with pytest.raises(ValueError, match="x.mp4 is a symbolic link"):
        Video(str(tmp_path / "in" / "a.png"), tmp_path / "out" / "x.mp4")


def test_results(tmp_path, outside):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.json").symlink_to(outside)
    with pytest.raises(ValueError, match="x.json is a symbolic link"):
        ResultsFile(tmp_path / "out" / "x.json", Metadata())


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_weights(suffix, tmp_path, outside):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"x{suffix}").symlink_to(outside)
    with pytest.raises(ValueError, match=f"x{suffix} is a symbolic link"):
        save({"x": torch.ones(1)}, tmp_path / "out" / f"x{suffix}", DIALECTS["nl_detectron"])
