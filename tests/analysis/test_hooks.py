"""What looks at a model leaves its hooks as they were, also where the model fails."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.analysis import detector_cost
from nl_detectron.analysis.attention import record_attention
from nl_detectron.analysis.detector_cost import Workload, block_rows
from nl_detectron.analysis.health import BlockHealthHook, watch_health


def hooks(model):
    """All hooks of a model, by module and kind."""
    return {
        (name, kind): dict(value)
        for name, module in model.named_modules()
        for kind, value in vars(module).items()
        if "hooks" in kind and value
    }


class Model(nn.Module):
    """Two blocks, the second with somebody else's hook; it fails between them, if told to."""

    def __init__(self, error=None):
        super().__init__()
        self.first, self.second = NonLocalBlock(6), NonLocalBlock(6)
        self.second.register_forward_hook(lambda *_: None)
        self.error, self.seen = error, 0

    def forward(self, x):
        self.seen = len(hooks(self))
        x = self.first(x)
        if self.error:
            raise self.error
        return {"loss": self.second(x).sum()}


def run_in(context):
    def run(model, x):
        with context(model):
            model(x)

    return run


def train(model, x):
    trainer = SimpleTrainer(model, [x] * 2, torch.optim.SGD(model.parameters(), 0.1))
    trainer.register_hooks([BlockHealthHook(1, model)])
    trainer.train(0, 2)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "look", [run_in(record_attention), run_in(lambda model: watch_health(model, print)), train]
)
def test_hooks_are_taken_off(look, error):
    model = Model(error)
    before = hooks(model)
    assert len(before) == 1
    with pytest.raises(error) if error else nullcontext():
        look(model, torch.rand(1, 6, 5, 7))
    assert model.seen > 1
    assert hooks(model) == before


def test_cost(nl_cfg, monkeypatch):
    model = detector_cost.build_meta_model(nl_cfg)
    before = hooks(model)
    monkeypatch.setattr(detector_cost, "build_meta_model", lambda cfg: model)
    rows = list(block_rows(nl_cfg, Workload((64, 96), 3, 2), batch_size=1))
    assert any("non_local4" in row for row in rows)
    assert hooks(model) == before
