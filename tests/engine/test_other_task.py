"""The engine serves a task that is not detection: a tiny classifier with a block."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from detectron2 import engine
from torch import nn

from nl_detectron.config import STOCK_BUILDERS, without_blocks
from nl_detectron.engine.ablation import PairedTrainer, score_table, train_and_evaluate
from nl_detectron.engine.launch import launch
from nl_detectron.engine.trainer import setup_run
from nl_detectron_cli.arguments import training_parser
from tests.running import ROOT
from tests.toy import ToyTrainer, make_toy


class PairedToyTrainer(PairedTrainer, ToyTrainer):
    """The classifier with its block, or without."""


@pytest.fixture
def toy_cfg(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(STOCK_BUILDERS, "toy_non_local", "toy")
    return make_toy(cfg, tmp_path)


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


def test_random_seed_is_kept(toy_cfg):
    """The one that the first run drew; another one only if it is asked for."""
    seeds = []
    for toy_cfg.SEED, toy_cfg.SOLVER.MAX_ITER in ((-1, 2), (-1, 4), (7, 6)):
        trainer = ToyTrainer(toy_cfg)
        trainer.resume_or_load()
        trainer.train()
        seeds.append(trainer.seed)
        losses = trainer.storage.history("total_loss").values()
        assert [iteration for _, iteration in losses] == list(range(toy_cfg.SOLVER.MAX_ITER))
    assert seeds == [seeds[0], seeds[0], 7]
    again = ToyTrainer(toy_cfg)
    again.resume_or_load()
    again.train()
    assert again.iter == again.storage.iter == 6  # nothing was left to do
    assert ToyTrainer(toy_cfg.merge_from_list(["SEED", -1]) or toy_cfg).seed != seeds[0]


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
