"""The engine serves a task that is not detection: a tiny classifier with a block."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from detectron2 import engine
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.config import STOCK_BUILDERS, without_blocks
from nl_detectron.engine.ablation import PairedTrainer, score_table, train_and_evaluate
from nl_detectron.engine.launch import launch
from nl_detectron.engine.trainer import StrictTrainer, setup_run
from nl_detectron_cli.arguments import training_parser
from tests.running import ROOT

IMAGES = torch.randn(8, 3, 5, 7, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES.mean((1, 2, 3)) > 0).long()


@META_ARCH_REGISTRY.register()
class ToyClassifier(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("conv", nn.Conv2d(3, 6, 3))
        if cfg.MODEL.BACKBONE.NAME == "toy_non_local":
            self.backbone.add_module("non_local0", NonLocalBlock(6))
        self.head = nn.Linear(6, 2)

    def forward(self, batch):
        images, labels = batch
        logits = self.head(self.backbone(images).mean((2, 3)))
        return {"loss_cls": F.cross_entropy(logits, labels)} if self.training else logits


class Accuracy(DatasetEvaluator):
    def reset(self):
        self.right = []

    def process(self, inputs, outputs):
        self.right += (outputs.argmax(1) == inputs[1]).tolist()

    def evaluate(self):
        return {"toy": {"accuracy": 100 * sum(self.right) / len(self.right)}}


class ToyTrainer(StrictTrainer):
    metrics = {"toy/accuracy": "accuracy"}

    @classmethod
    def backbone_prefix(cls, model):
        return "backbone."

    @classmethod
    def build_train_loader(cls, cfg):
        while True:
            chosen = torch.randint(len(IMAGES), (4,))
            yield IMAGES[chosen], LABELS[chosen]

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return list(zip(IMAGES.split(4), LABELS.split(4)))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return Accuracy()


class PairedToyTrainer(PairedTrainer, ToyTrainer):
    """The classifier with its block, or without."""


@pytest.fixture
def toy_cfg(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(STOCK_BUILDERS, "toy_non_local", "toy")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "ToyClassifier", "toy_non_local"
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.SEED = "", str(tmp_path), 3
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy",), ("toy",)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 3, (), 0
    return cfg


def test_with_and_without_blocks(toy_cfg):
    stock_cfg = without_blocks(toy_cfg)
    stock_cfg.OUTPUT_DIR += "/stock"
    runs = [train_and_evaluate(c, PairedToyTrainer) for c in (stock_cfg, toy_cfg)]
    (first, *later), (same, *others) = (run.losses["total_loss"] for run in runs)
    assert first == same
    assert len(later) == len(others) == 2
    assert later != others
    for run in runs:
        assert run.scores.keys() == {"toy/accuracy"}
    table = score_table({"without": runs[0].scores, "with": runs[1].scores}, ToyTrainer.metrics)
    assert table.split()[:3] == ["accuracy", "without", f"{runs[0].scores['toy/accuracy']:.1f}"]


def test_weights_of_the_backbone_alone(toy_cfg, tmp_path):
    toy_cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    state = {f"backbone.conv.{name}": x for name, x in nn.Conv2d(3, 6, 3).state_dict().items()}
    torch.save({"model": state}, toy_cfg.MODEL.WEIGHTS)
    model = ToyTrainer.dry_run(toy_cfg, resume=False)
    assert torch.equal(model.backbone.conv.weight, state["backbone.conv.weight"])
    del state["backbone.conv.weight"]
    torch.save({"model": state}, toy_cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match=r"lacks .*backbone\.conv\.weight"):
        ToyTrainer.dry_run(toy_cfg, resume=False)


def test_launched_and_resumed(toy_cfg):
    args = training_parser("").parse_args(["--config-file", "Base-RCNN-FPN.yaml", "--resume"])
    trainers, stock = [], engine.defaults.create_ddp_model

    def train(args):
        setup_run(toy_cfg, args)
        trainers.append(ToyTrainer(toy_cfg))
        trainers[-1].resume_or_load(resume=args.resume)
        trainers[-1].train()

    for toy_cfg.SOLVER.MAX_ITER in (2, 5):
        launch(train, args, lambda args: toy_cfg, lambda args, cfg: ToyTrainer.dry_run(cfg, True))
    assert [(trainer.start_iter, trainer.iter) for trainer in trainers] == [(0, 2), (2, 5)]
    assert engine.defaults.create_ddp_model is stock  # which the trainer replaces for a moment


def test_imports():
    """Nothing that knows COCO; and no warning is raised, or hidden from others."""
    code = """if True:
        import sys, warnings
        before = list(warnings.filters)
        import nl_detectron
        from nl_detectron.engine import ablation, checkpoint, launch, predictor, trainer
        assert warnings.filters == before
        assert not [name for name in sys.modules if name.startswith("nl_detectron.engine.coco")]
    """
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
