"""The data of the experiment with videos that run forward or in reverse."""

from __future__ import annotations

import re

import forward_or_reversed
import numpy as np
import pytest
from video_classification.data import VideoReader, write_video


@pytest.fixture
def files(tmp_path, coded_video):
    """Two videos whose pixels tell the number of their frame, and a list of their groups."""
    for name in ("a.mp4", "b.mp4"):
        coded_video(40, name=name)
    groups = tmp_path / "groups.csv"
    groups.write_text("a.mp4,ann\nb.mp4,bob\n")
    return tmp_path, groups


def test_each_group_is_tested_once_on_both_versions_of_its_videos(files):
    folder, csv = files
    groups = forward_or_reversed.read_groups(csv, folder)
    forward_or_reversed.write_data_sets(groups, folder / "data")
    numbers = [5 + 4 * i for i in range(8)]  # 5 to 33, as far from the start as from the end
    for tested, split, video in [("ann", "test", "a"), ("ann", "train", "b"), ("bob", "test", "b")]:
        for name, expected in (("forward", numbers), ("reversed", numbers[::-1])):
            (file,) = (folder / "data" / f"{tested}_{split}" / name).iterdir()
            assert file.stem == video
            assert (VideoReader(file).read(range(8))[:, 0, 0, 0]).tolist() == expected


@pytest.mark.parametrize("text", ["a.mp4,ann\n", "a.mp4,ann\nlost.mp4,bob\n", "a.mp4\n"])
def test_wrong_groups(text, files):
    folder, csv = files
    csv.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(csv))):
        forward_or_reversed.read_groups(csv, folder)


def test_short_video(files):
    folder, csv = files
    write_video(folder / "b.mp4", [np.zeros((48, 64, 3), np.uint8)] * 28, 10)
    groups = forward_or_reversed.read_groups(csv, folder)
    with pytest.raises(ValueError, match=r"b\.mp4 has 28 frames, fewer than 29"):
        forward_or_reversed.write_data_sets(groups, folder / "data")
