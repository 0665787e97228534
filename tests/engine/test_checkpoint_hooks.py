"""Which checkpoints a training keeps."""

from __future__ import annotations

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator

from nl_detectron.engine.checkpoint_hooks import check_metric
from nl_detectron.engine.options import RunOptions
from tests.toy import ToyTrainer, make_toy


class Scores(DatasetEvaluator):
    """Gives the scores of a list, one in each evaluation."""

    left = []

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"toy": {"accuracy": self.left.pop(0), "error": 0.0}}


class ScoredTrainer(ToyTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return Scores()


@pytest.fixture
def train(cfg, tmp_path):
    """Train for some iterations, resuming if there is something; return the names of the files."""
    cfg = make_toy(cfg, tmp_path)
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = 1

    def train(iterations, scores, **options):
        cfg.SOLVER.MAX_ITER, Scores.left = iterations, list(scores)
        trainer = ScoredTrainer(cfg, RunOptions(**options))
        trainer.resume_or_load(resume=True)
        trainer.train()
        assert not Scores.left
        return sorted(path.stem for path in tmp_path.glob("*.pth"))

    return train


def periodic(*iterations):
    return [f"model_{i:07d}" for i in iterations]


def test_last(train, tmp_path):
    """Those before the resume count; the last one of all is not among them."""
    assert train(3, [0.0] * 3, keep_last=2) == [*periodic(1, 2), "model_final"]
    assert train(5, [0.0] * 2, keep_last=2) == [*periodic(3, 4), "model_final"]
    (tmp_path / "model_0000004.pth").write_bytes(b"damaged")
    (tmp_path / "model_final.pth").write_bytes(b"damaged")
    assert train(6, [0.0] * 2, keep_last=2) == [*periodic(4, 5), "model_final"]


def test_other_training_is_not_overwritten(cfg, train, tmp_path):
    train(2, [0.0] * 2)
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.pth"))]
    with pytest.raises(ValueError, match=r"already has checkpoints .*\(model_0000000\.pth and 2 m"):
        ScoredTrainer(make_toy(cfg, tmp_path)).resume_or_load(resume=False)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.pth"))] == before


def best(tmp_path):
    checkpoint = torch.load(tmp_path / "model_best.pth", weights_only=True)
    return checkpoint["iteration"], checkpoint["best"]["toy/accuracy"]


def test_best(train, tmp_path):
    """Not replaced by a worse one, also after resuming; nor deleted."""
    options = {"keep_best": "toy/accuracy", "keep_last": 1}
    scores = [float("nan"), 50.0, 75.0, 75.0, 25.0]
    assert train(5, scores, **options) == [*periodic(4), "model_best", "model_final"]
    assert best(tmp_path) == (2, 75.0)
    train(7, [70.0, 30.0], **options)
    assert best(tmp_path) == (2, 75.0)
    train(9, [80.0, 30.0], **options)
    assert best(tmp_path) == (7, 80.0)
    (tmp_path / "model_best.pth").write_bytes(b"damaged")
    train(11, [10.0, 20.0], **options)
    assert best(tmp_path) == (11, 20.0)


def test_metric_that_the_evaluation_does_not_give(train):
    with pytest.raises(SystemExit, match=r"such as toy/accuracy, toy/error; got toy/acuracy"):
        train(2, [50.0, 50.0], keep_best="toy/acuracy")


@pytest.mark.parametrize(
    ("metric", "test", "period", "refused"),
    [
        ("", (), 0, None),
        ("bbox/AP75", ("a",), 1, None),
        ("b/bbox/AP", ("a", "b"), 1, None),
        ("bbox/AP", (), 1, r"--keep-best bbox/AP needs evaluations .* DATASETS.TEST is \(\)"),
        ("bbox/AP", ("a",), 0, "TEST.EVAL_PERIOD 0"),
        ("box/AP", ("a",), 1, "such as bbox/AP, segm/AP; got box/AP"),
        ("bbox/AP", ("a", "b"), 1, "such as a/bbox/AP, a/segm/AP, b/bbox/AP, b/segm/AP; got bbox"),
    ],
)
def test_metric_is_checked_before(metric, test, period, refused, cfg):
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = test, period
    metrics = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
    if not refused:
        check_metric(metric, cfg, metrics)
        return
    with pytest.raises(ValueError, match=refused):
        check_metric(metric, cfg, metrics)
