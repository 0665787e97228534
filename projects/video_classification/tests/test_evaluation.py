"""Scores of a test: counted by hand, and what the files say."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from PIL import Image
from video_classification.confusion import draw_confusion
from video_classification.evaluation import VideoEvaluator
from video_classification.metrics import average_precision, confusion_matrix, top_classes
from video_classification.views import combine_views

CLASSES = ["a", "b", "c", "d", "e", "f"]
# Scores of a view by rank
RANKED = [0.5, 0.2, 0.12, 0.09, 0.06, 0.03]
# label, and the rank that each of four views gives it; all other classes keep their order
VIDEOS = {
    "one.mp4": (0, (0, 1, 0, 0)),
    "two.mp4": (2, (5, 5, 0, 4)),
    "three.mp4": (5, (2, 0, 0, 0)),
}


def view(label, rank, classes=6):
    order = [k for k in range(classes) if k != label]
    order.insert(rank, label)
    return [RANKED[order.index(k)] for k in range(classes)]


@pytest.fixture
def evaluator(video_cfg, tmp_path):
    video_cfg.OUTPUT_DIR = str(tmp_path)
    video_cfg.TEST.MAX_UNREADABLE = 0.25

    def evaluator(classes=CLASSES, **options):
        MetadataCatalog.pop("test_evaluation", None)
        MetadataCatalog.get("test_evaluation").classes = classes
        video_cfg.TEST.VIEWS.COMBINE = options.get("combine", "mean")
        video_cfg.MODEL.VIDEO.HEAD.MULTI_LABEL = options.get("multi_label", False)
        return VideoEvaluator(video_cfg, "test_evaluation")

    return evaluator


def inputs(name, label):
    return {"file_name": name, "label": label, "frames": torch.tensor([[3, 5], [8, 10]])}


def process(evaluator, videos):
    for name, (label, scores) in videos.items():
        evaluator.process([inputs(name, label)], [{"scores": torch.tensor(scores)}])


def ranked(videos=VIDEOS, classes=6):
    return {
        name: (label, [view(label, rank, classes) for rank in ranks])
        for name, (label, ranks) in videos.items()
    }


def test_accuracy(evaluator, tmp_path, caplog):
    """Of two.mp4, the sums over views are 1.70 for a, 0.72 for b, 0.62 for its class, 0.45 for d.

    Best ranks are right in 3, 1 and 3 of 4 views, ranks below five in 4, 2 and 4 of them.
    """
    tested = evaluator()
    process(tested, {"forgotten.mp4": (0, [RANKED])})
    tested.reset()
    process(tested, ranked())
    error = {"file_name": "broken.mp4", "label": 4, "error": "broken.mp4: 40 of 89 frames"}
    tested.process([error], [{"error": error["error"]}])
    with caplog.at_level(logging.INFO):
        scores = tested.evaluate()["video"]
    thirds = {"top1": 2, "top5": 3, "clip1_top1": 1, "clip1_top5": 2}
    expected = {name: 100 * number / 3 for name, number in thirds.items()}
    expected |= {"clip_top1": 700 / 12, "clip_top5": 1000 / 12}
    assert scores == pytest.approx(expected)
    assert "top1 66.67, top5 100.00" in caplog.text
    assert "3 of 4 videos scored" in caplog.text
    assert "broken.mp4: 40 of 89 frames" in caplog.text
    assert "| c | 1 | 0.0 |" in caplog.text

    folder = tmp_path / "inference" / "test_evaluation"
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == scores
    assert results["videos"] == {"total": 4, "scored": 3}
    (unreadable,) = results["unreadable"]
    assert unreadable == {"file_name": "broken.mp4", "error": "broken.mp4: 40 of 89 frames"}
    assert [(row["videos"], row["top1"]) for row in results["classes"]] == [
        (1, 100.0),
        (0, None),
        (1, 0.0),
        (0, None),
        (0, None),
        (1, 100.0),
    ]
    two = results["predictions"][1]
    assert (two["file_name"], two["label"], two["starts"]) == ("two.mp4", "c", [3, 8])
    assert [row["class"] for row in two["top5"]] == ["a", "b", "c", "d", "e"]
    assert [row["score"] for row in two["top5"][:4]] == pytest.approx([0.425, 0.18, 0.155, 0.1125])
    protocol = {"frames": 32, "stride": 2, "clips": 10, "starts": "released", "crops": 3}
    protocol |= {"crop_size": 256, "short_side": 256, "window": 7, "scores": "softmax"}
    assert protocol.items() <= results["protocol"].items()
    assert Image.open(folder / "confusion.png").width > 500


def test_few_classes(evaluator):
    """Any answer is among the best five of five."""
    tested = evaluator(CLASSES[:5])
    process(tested, ranked({"one.mp4": (0, (0, 1))}, classes=5))
    assert tested.evaluate() == {"video": {"top1": 100, "clip_top1": 50, "clip1_top1": 100}}


def test_mean_average_precision(evaluator, tmp_path, caplog):
    """By max over two views: b finds its videos first and third, 1/1 and 2/3; c second, 1/2.

    By mean, b would find them second and third.
    """
    videos = {
        "one.mp4": ((1,), [[0.1, 0.9, 0.2], [0.1, 0.1, 0.1]]),
        "two.mp4": ((), [[0.2, 0.7, 0.3], [0.1, 0.6, 0.8]]),
        "three.mp4": ((1, 2), [[0.3, 0.2, 0.7], [0.1, 0.3, 0.6]]),
    }
    for combine, of_b in (("max", (1 + 2 / 3) / 2), ("mean", (1 / 2 + 2 / 3) / 2)):
        tested = evaluator(["a", "b", "c"], multi_label=True, combine=combine)
        process(tested, videos)
        of_c = {"max": 1 / 2, "mean": 1}[combine]
        assert tested.evaluate() == {"video": {"mAP": pytest.approx(100 * (of_b + of_c) / 2)}}
    assert "1 of 3 classes have no videos" in caplog.text
    results = (tmp_path / "inference" / "test_evaluation" / "results.json").read_text()
    rows = [(row["class"], row["videos"], row["AP"]) for row in json.loads(results)["classes"]]
    assert rows == [("a", 0, None), ("b", 2, pytest.approx(100 * of_b)), ("c", 1, 100.0)]


def evaluate_in_process(rank, store, tested):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    comm._LOCAL_PROCESS_GROUP = dist.group.WORLD
    share = InferenceSampler(len(VIDEOS))  # as detectron2's loader divides them
    videos = list(ranked().items())
    process(tested, dict(videos[i] for i in share))
    if rank == 1:
        error = {"file_name": "broken.mp4", "label": 4, "error": "broken.mp4: no frames"}
        tested.process([error], [{"error": error["error"]}])
    assert (tested.evaluate() is None) == (rank == 1)
    comm.synchronize()
    dist.destroy_process_group()


def test_two_processes(evaluator, tmp_path):
    """Every video counts once, and the file is that of one process."""
    tested, one = evaluator(), evaluator()
    store, file = tmp_path / "store", tmp_path / "inference" / "test_evaluation" / "results.json"
    # Forked, as new processes would import PyTorch for seconds.
    mp.start_processes(evaluate_in_process, (store, tested), 2, start_method="fork")
    two = json.loads(file.read_text())
    process(one, ranked())
    error = {"file_name": "broken.mp4", "label": 4, "error": "broken.mp4: no frames"}
    one.process([error], [{"error": error["error"]}])
    one.evaluate()
    assert json.loads(file.read_text()) == two
    assert two["videos"] == {"total": 4, "scored": 3}


@pytest.mark.parametrize(("broken", "refused"), [(1, False), (2, True)])
def test_too_many_unreadable(broken, refused, evaluator):
    """A quarter is allowed."""
    tested = evaluator()
    process(tested, ranked())
    for number in range(broken):
        error = {"file_name": f"{number}.mp4", "error": f"{number}.mp4: no frames"}
        tested.process([error], [{"error": error["error"]}])
    if not refused:
        assert tested.evaluate()
        return
    with pytest.raises(ValueError, match=r"2 of 5 .*MAX_UNREADABLE allows, 0\.25: .*1\.mp4: no"):
        tested.evaluate()
    tested._videos.clear()
    with pytest.raises(ValueError, match=r"no video of test_evaluation can be read: 0\.mp4"):
        tested.evaluate()


def test_wrong_scores(evaluator):
    with pytest.raises(ValueError, match=r"one\.mp4: the model's scores are not finite"):
        process(evaluator(), {"one.mp4": (0, [[float("nan")] * 6])})
    with pytest.raises(ValueError, match=r"VIEWS\.COMBINE\) must be one of \('mean', 'max'\), got"):
        combine_views(torch.zeros(1, 6), "sum")


def test_average_precision():
    """The example in scikit-learn's documentation; then, every positive in turn, with equal scores.

    Those share the last rank of theirs.
    """
    scores, positive = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert average_precision(scores, positive) == pytest.approx(0.8333333)
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = rng.integers(0, 9, 17) / 9, rng.random(17) < 0.4
        positive[3] = True
        precisions = [positive[scores >= s].mean() for s in scores[positive]]
        assert average_precision(scores, positive) == pytest.approx(np.mean(precisions))
    assert average_precision(np.zeros(10), np.arange(10) < 3) == pytest.approx(0.3)


def test_best_classes_and_confusion():
    assert top_classes(np.array([[1, 3, 3, 2.0]]), 3).tolist() == [[1, 2, 3]]
    matrix = confusion_matrix([0, 0, 0, 2], [1, 1, 0, 2], 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_picture(tmp_path):
    """Rows are classes: in the picture, the upper right is dark and the lower left is not."""
    draw_confusion(tmp_path / "c.png", np.array([[0, 3], [1, 7]]), ["left", "right"], "title")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("L"), float)
    rows, columns = (np.flatnonzero((pixels < 30).sum(axis) > 400) for axis in (1, 0))
    (top, bottom), (left, right) = (rows[0], rows[-1]), (columns[0], columns[-1])
    width = right - left

    def cell(y, x):  # beside the number
        return pixels[top + int(y * (bottom - top)), left + int(x * width)]

    assert cell(0.1, 0.9) < cell(0.9, 0.9) < cell(0.9, 0.1) < cell(0.1, 0.1)
