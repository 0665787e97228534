"""Health: values known in closed form, and what a training run logs of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn
from torch.testing import assert_close

from nl_detectron import NonLocalBlock, ops
from nl_detectron.analysis.health import (
    MAX_QUERIES,
    MAX_SAMPLES,
    BlockHealthHook,
    block_health,
    entropy,
    query_dependence,
    watch_health,
)
from tests import oracles

ONE_PLACE = torch.zeros(2, 5, 7)
ONE_PLACE[0, :, 3] = ONE_PLACE[1, :, 4] = 1  # samples are not compared with each other


@pytest.mark.parametrize(
    ("attention", "expected_entropy", "expected_dependence"),
    [
        (torch.full((2, 5, 7), 1 / 7), 1, 0),
        (torch.eye(7).expand(2, 7, 7), 0, 1),
        (ONE_PLACE, 0, 0),
        # two of four keys each: the first two rows share one, the first and the third none
        ([[[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]], 1 / 2, (0.5 + 0.5 + 1) / 3),
        # no distributions: neither sums nor signs count, nor does a row of zeros
        ([[[-3.0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 9, 9]]], 1 / 2, 1),
        (torch.ones(2, 5, 1), math.nan, 0),
        (torch.ones(2, 1, 5), 1, math.nan),
    ],
)
def test_numbers(attention, expected_entropy, expected_dependence):
    attention = torch.as_tensor(attention)
    assert entropy(attention) == pytest.approx(expected_entropy, abs=1e-6, nan_ok=True)
    assert query_dependence(attention) == pytest.approx(expected_dependence, abs=1e-6, nan_ok=True)


class TestBlock:
    @pytest.mark.parametrize("axes", ["spacetime", "space", "time"])
    @pytest.mark.parametrize("pairwise", ops.PAIRWISE)
    def test_clips(self, pairwise, axes):
        """Against loops: entropy of each row, distance of any two rows over the same keys."""
        block = NonLocalBlock(6, dim=3, axes=axes, pairwise=pairwise).double()
        x = torch.randn(2, 6, 3, 2, 5, dtype=torch.float64)
        theta = phi = x
        if pairwise != "gaussian":
            theta, phi = (oracles.conv(x, c.weight, c.bias) for c in (block.theta, block.phi))
        groups = {  # what sees each other: all, a frame, or a place
            "spacetime": [(slice(None),) * 3],
            "space": [(t, slice(None), slice(None)) for t in range(3)],
            "time": [(slice(None), i, j) for i, j in np.ndindex(2, 5)],
        }[axes]
        entropies, distances = [], []
        for n, place in itertools.product(range(2), groups):
            rows = [m[(n, slice(None), *place)].flatten(1).T[None] for m in (theta, phi)]
            keys = rows[0].shape[1]
            w_f = block.concat_project.weight.flatten() if pairwise == "concatenation" else None
            identity = torch.eye(keys, dtype=torch.float64)[None]
            (a,) = oracles.operation(*rows, identity, pairwise, w_f=w_f)
            seen = [row.abs() / row.abs().sum() for row in a if row.any()]
            entropies += [-sum(p * p.log() for p in row if p > 0) / math.log(keys) for row in seen]
            distances += [(p - q).abs().sum() / 2 for p, q in itertools.permutations(seen, 2)]
        health = block_health(block, x, x)
        assert health.entropy == pytest.approx(torch.tensor(entropies).mean().item())
        assert health.query_dependence == pytest.approx(torch.tensor(distances).mean().item())

    def test_cost_is_bounded(self, monkeypatch):
        shapes = []
        original = NonLocalBlock.attention

        def attention(block, x, queries):
            shapes.append((len(x), len(queries)))
            return original(block, x, queries)

        monkeypatch.setattr(NonLocalBlock, "attention", attention)
        x = torch.randn(MAX_SAMPLES + 3, 6, 9, 11)
        block_health(NonLocalBlock(6), x, x)
        assert shapes == [(MAX_SAMPLES, MAX_QUERIES)]

    def test_draws_no_random_number(self):
        block, x = NonLocalBlock(6), torch.randn(2, 6, 9, 11)
        state = torch.get_rng_state()
        first = block_health(block, x, x)
        assert torch.equal(torch.get_rng_state(), state)
        assert block_health(block, x, x) == first


def test_watching_reports_every_call_by_name():
    """Each adds a constant to its input: to the second, the first's output."""
    model = nn.Sequential(NonLocalBlock(6), NonLocalBlock(6, pairwise="dot_product"))
    x, seen = torch.randn(2, 6, 5, 7), []
    for block in model:
        nn.init.constant_(block.conv_out.bias, 0.3)
    with watch_health(model, lambda *report: seen.append(report)):
        y = model(x)
        model(x[:0])
    assert_close(y, x + 0.6)
    norm = 0.3 * math.sqrt(x.numel())
    assert [(name, health.residual_ratio) for name, health in seen] == [
        ("0", pytest.approx(norm / x.norm().item())),
        ("1", pytest.approx(norm / (x + 0.3).norm().item())),
    ]
    with pytest.raises(ValueError, match="no non-local block '7'; it has 0"):
        with watch_health(model, print, "7"):
            pass


class Toy(nn.Module):
    """A model of detectron2's kind: it returns losses."""

    def __init__(self):
        super().__init__()
        self.block = NonLocalBlock(6)

    def forward(self, x):
        return {"loss": (self.block(x) - 1).square().mean()}


class TestHook:
    def trainer(self, period):
        model, batches = Toy(), [torch.randn(2, 6, 5, 7)] * 9
        trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), 0.1))
        trainer.register_hooks([BlockHealthHook(period, model)] if period else [])
        return trainer

    def test_logs_every_period(self):
        trainer = self.trainer(period=2)
        trainer.train(0, 5)
        for name in ("residual_ratio", "entropy", "query_dependence"):
            history = trainer.storage.history(f"non_local/block/{name}").values()
            assert [iteration for _, iteration in history] == [0, 2, 4]
            values = [value for value, _ in history]
            assert all(0 <= value < 1 for value in values)
            if name == "residual_ratio":  # the block starts as the identity, and learns
                assert values[0] == 0 < values[1] < values[2]

    def test_changes_nothing(self):
        weights = []
        for period in (1, None):
            torch.manual_seed(1)
            trainer = self.trainer(period)
            trainer.train(0, 3)
            weights.append(trainer.model.block.conv_out.weight)
        assert torch.equal(*weights)

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="period must be at least 1, got 0"):
            BlockHealthHook(0, Toy())
        with pytest.raises(ValueError, match="no non-local blocks"):
            BlockHealthHook(1, nn.Conv2d(1, 1, 1))
