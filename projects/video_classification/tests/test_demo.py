"""The demo: what is in its clips, which networks can see it, and what is made of the results."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from video_classification.data import VideoReader
from video_classification.demo import networks, report
from video_classification.demo.clips import CLASSES, FRAMES, HEIGHT, WIDTH, make_clip
from video_classification.demo.dataset import register_dataset, write_dataset
from video_classification.demo.networks import NETWORKS, network_config, visibility
from video_classification.demo.training import Result, Run, cross_entropy

# By its path, as another project has a demo.py, too
SPEC = importlib.util.spec_from_file_location("video_demo", Path(__file__).parents[1] / "demo.py")
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)

RELATIONS = [task for task in CLASSES if task != "order"]


def colored(clip):
    """Where a clip is not gray."""
    return np.ptp(clip.astype(int), axis=-1) > 60


def squares(clip):
    """First frame, row and column of the squares of a clip; each must be 2 x 8 x 8 and solid."""
    found, rest = [], clip.astype(int)
    while (there := np.argwhere(colored(rest))).size:
        t, y, x = there[0]  # of the earliest ones, the highest, whose first row is not shared
        box = rest[t : t + 2, y : y + 8, x : x + 8]
        assert box.shape == (2, 8, 8, 3)
        assert (box == box[0, 0, 0]).all()
        found.append((t, y, x, "red" if box[0, 0, 0, 0] > box[0, 0, 0, 1] else "green"))
        box[:] = 0
    return found


@pytest.mark.parametrize("task", RELATIONS)
def test_groups_differ_in_colors_alone(task):
    left_first = set()
    for first in range(0, 60, 4):
        group = [make_clip(task, "test", 0, first + i) for i in range(4)]
        found = [squares(clip) for clip, _ in group]
        assert all(len(pair) == 2 for pair in found)
        assert len({tuple(square[:3] for square in pair) for pair in found}) == 1
        assert len({tuple(square[3] for square in pair) for pair in found}) == 4
        for (_, label), ((*_, a), (*_, b)) in zip(group, found):
            assert CLASSES[task][label] == ("same" if a == b else "different")
        gray = ~colored(group[0][0])
        assert all((clip[gray] == group[0][0][gray]).all() for clip, _ in group)
        (t0, y0, x0, _), (t1, y1, x1, _) = found[0]
        frames, columns = abs(t1 - t0) - 2, abs(x1 - x0) - 8  # between the squares
        if task in ("near", "space"):
            assert frames == -2
        else:
            assert frames >= 9
        if task == "near":
            assert (y0, columns) == (y1, 0)
        elif task == "time":
            assert max(abs(y1 - y0), abs(x1 - x0)) <= 3
        else:
            assert columns >= 21
        left_first.add(x0 < x1)
    assert task != "spacetime" or left_first == {True, False}


def test_order():
    for first in range(0, 40, 2):
        clip, label = make_clip("order", "test", 0, first)
        other, other_label = make_clip("order", "test", 0, first + 1)
        assert {label, other_label} == {0, 1}
        assert (other == clip[::-1]).all()
        there = colored(clip)
        assert (there.sum((1, 2)) == 64).all()
        steps = {
            step
            for before, after in zip(there[:-1], there[1:])
            for step in range(-5, 6)
            if (np.roll(before, step, axis=1) == after).all()
        }
        assert len(steps) == 1
        assert abs(step := steps.pop()) in (2, 3)
        assert CLASSES["order"][label] == ("left" if step < 0 else "right")


def test_splits_share_nothing():
    train, test = (
        {make_clip("order", split, 0, index)[0].tobytes() for index in range(20)}
        for split in ("train", "test")
    )
    assert len(train) == len(test) == 20
    assert not train & test


def test_videos_are_what_was_drawn(tmp_path):
    folder = tmp_path / "spacetime_test"
    (tmp_path / "spacetime_test.partial" / "same").mkdir(parents=True)  # of a killed run
    (tmp_path / "spacetime_test.partial" / "same" / "9.mp4").touch()
    write_dataset(folder, "spacetime", "test", seed=3, size=8)
    records = DatasetCatalog.get(register_dataset(folder))
    assert sorted(record["label"] for record in records) == [0] * 4 + [1] * 4
    for record in records:
        index = int(record["file_name"][-10:-4])
        frames, label = make_clip("spacetime", "test", 3, index)
        assert label == record["label"]
        video = VideoReader(record["file_name"])
        assert (video.read(range(video.num_frames)) == frames).all()
    before = [(file, file.stat().st_mtime_ns) for file in sorted(folder.rglob("*"))]
    write_dataset(folder, "spacetime", "test", seed=3, size=8)
    assert before == [(file, file.stat().st_mtime_ns) for file in sorted(folder.rglob("*"))]


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="task must be one of .*'far'"):
        write_dataset(tmp_path / "x", "far", "test", seed=0, size=4)
    with pytest.raises(ValueError, match="split must be one of .*'val'"):
        write_dataset(tmp_path / "x", "near", "val", seed=0, size=4)
    with pytest.raises(ValueError, match="size must be a multiple of 4, got 6"):
        write_dataset(tmp_path / "x", "near", "test", seed=0, size=6)


# Two squares that nothing sees together add up in the logits, whatever the weights; and without
# convolutions over time, shifts or temporal strides, the mean over frames forgets their order.
SEES = {
    "C2D": "near",
    "I3D": "order near",
    "TSM": "order near",
    "NL-space": "near space",
    "NL-time": "near time",
    "NL-spacetime": "near space time spacetime",
    "NL in groups": "near space",  # of 7 frames, so that blocks do not see all of them
    "NL-I3D": "order near space time spacetime",
}


@pytest.mark.parametrize("name", SEES)
def test_what_a_network_can_see(name, randomize, monkeypatch):
    groups = (*NETWORKS["NL-spacetime"], "MODEL.NON_LOCAL.GROUP_FRAMES", 7)
    monkeypatch.setitem(NETWORKS, "NL in groups", groups)
    model = randomize(build_model(network_config(name))).double().eval()
    for task, share in visibility(model, CLASSES).items():
        assert (share > 1e-5) if task in SEES[name].split() else (share < 1e-11), (task, share)


def test_random_networks_have_no_idle_block():
    assert visibility(networks.random_network("NL-I3D"), ["spacetime"])["spacetime"] > 1e-5


@pytest.mark.parametrize(("name", "frames"), [("C2D", 1), ("I3D", 9), ("TSM", 7)])
def test_reach(name, frames):
    """What a position of the last map depends on, by its gradient."""
    model = build_model(network_config(name)).eval()
    for parameter in model.backbone.parameters():
        if parameter.dim() > 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.0)  # no ReLU stops a gradient
    clip = torch.rand(1, 3, 21, 64, 64).requires_grad_()
    model.backbone(clip)["res4"][0, :, 10, 4, 4].sum().backward()
    reach = clip.grad[0].abs().amax(0).nonzero()
    assert (reach.amax(0) - reach.amin(0) + 1).tolist() == [frames, 21, 21]


def test_cross_entropy():
    def video(label, **scores):
        return {"label": label, "top5": [{"class": k, "score": v} for k, v in scores.items()]}

    videos = [video("left", left=0.5, right=0.5), video("right", left=0.75, right=0.25)]
    assert cross_entropy(videos) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_tables():
    sees = {"C2D": {"order": 1e-15, "space": 2e-15}, "I3D": {"order": 0.03, "space": 4e-15}}
    assert report.visibility_table(sees).splitlines()[2:] == [
        "| C2D | no 1e-15 | no 2e-15 |",
        "| I3D | **yes** 3e-02 | no 4e-15 |",
    ]
    results = {
        Run("order", "C2D", 0): Result(50.0, 0.70, 1, 1),
        Run("order", "C2D", 1): Result(50.0, 0.80, 1, 1),
        Run("order", "C2D", 0, 3.0): Result(50.0, 0.71, 1, 1),
        Run("order", "I3D", 0): Result(99.0, 0.01, 1, 1),
        Run("space", "C2D", 0): Result(75.0, 0.70, 1, 1),
    }
    assert report.results_table(results, sees).splitlines()[2:] == [
        "| order | C2D | no | 50 | 50.0 (50.0 to 50.0) | ≥ 0.693 | 0.750 (0.700 to 0.800) "
        "| 50.0, 0.710 |",
        "| order | I3D | yes |  | 99.0 (99.0 to 99.0) |  | 0.010 (0.010 to 0.010) |  |",
        "| space | C2D | no | 25 to 75 | 75.0 (75.0 to 75.0) | ≥ 0.693 | 0.700 (0.700 to 0.700) "
        "|  |",
    ]
    assert report.impossible(results, sees) == []
    wrong = {
        Run("order", "C2D", 2): Result(49.0, 0.70, 1, 1),
        Run("space", "I3D", 2): Result(75.5, 0.70, 1, 1),
        Run("space", "I3D", 3): Result(24.5, 0.70, 1, 1),
        Run("space", "C2D", 3): Result(50.0, 0.69, 1, 1),
    }
    assert report.impossible(results | wrong, sees) == list(wrong)


@pytest.fixture
def restored():
    """Undoes what the demo sets for its process."""
    threads, root = torch.get_num_threads(), logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    root.setLevel(level)
    root.handlers[:] = handlers


def test_demo(tmp_path, capsys, restored):
    """Three trainings; then all but one are there already, and that one leads to the same."""
    command = ["--tasks", "order", "--networks", "C2D", "NL-I3D", "--seeds", "1"]
    command += ["--budget", "0.01", "--videos", "16", "--output", str(tmp_path)]
    demo.main([*command, "--jobs", "1"])
    out = capsys.readouterr().out
    assert "| C2D | no " in out
    assert "| order | C2D | no | 50 | 50.0 (50.0 to 50.0) | ≥ 0.693 |" in out
    assert "[3/3] order, C2D, seed 0, 0.03x: accuracy 50.0" in out
    assert (tmp_path / "video.png").stat().st_size > 10_000

    files = sorted(tmp_path.rglob("result.json"))
    assert len(files) == 3
    kept = [file.stat().st_mtime_ns for file in files[:2]]
    before = json.loads(files[2].read_text())
    files[2].unlink()
    demo.main([*command, "--jobs", "2"])
    assert [file.stat().st_mtime_ns for file in files[:2]] == kept
    after = json.loads(files[2].read_text())
    assert after["cross_entropy"] == pytest.approx(before["cross_entropy"], abs=1e-6)
    assert capsys.readouterr().out.count("[") == 3


def test_names():
    """The script has them again, as it must not import the package to parse its arguments."""
    assert demo.TASKS == tuple(CLASSES) == tuple(report.TITLES)
    assert demo.NETWORKS == tuple(NETWORKS)
    size = network_config("C2D").INPUT
    assert (size.CLIP.NUM_FRAMES, size.MIN_SIZE_TEST) == (FRAMES, min(HEIGHT, WIDTH))
