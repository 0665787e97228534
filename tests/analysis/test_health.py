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

UNIFORM = torch.full((2, 5, 7), 1 / 7)
IDENTITY = torch.eye(7).expand(2, 7, 7)


class TestNumbers:
    def test_uniform_attention(self):
        assert entropy(UNIFORM) == pytest.approx(1)
        assert query_dependence(UNIFORM) == pytest.approx(0)

    def test_identity_attention(self):
        assert entropy(IDENTITY) == 0
        assert query_dependence(IDENTITY) == pytest.approx(1)

    def test_all_look_at_one_place(self):
        attention = torch.zeros(2, 5, 7)
        attention[0, :, 3] = attention[1, :, 4] = 1  # samples are not compared with each other
        assert entropy(attention) == 0
        assert query_dependence(attention) == 0

    def test_half_and_half(self):
        """Two of four keys; they share one. A third row shares none with the first."""
        attention = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]])
        assert entropy(attention) == pytest.approx(math.log(2) / math.log(4))
        assert query_dependence(attention) == pytest.approx((0.5 + 0.5 + 1) / 3)

    def test_rows_that_are_no_distributions(self):
        """Only sizes count, not sums and signs; a row of zeros does not count at all."""
        attention = torch.tensor([[[-3.0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 9, 9]]])
        assert entropy(attention) == pytest.approx(0.5)
        assert query_dependence(attention) == pytest.approx(1)

    def test_where_there_is_nothing_to_measure(self):
        assert math.isnan(entropy(torch.ones(2, 5, 1)))
        assert math.isnan(query_dependence(torch.ones(2, 1, 5)))


class TestBlock:
    def test_new_block(self):
        x = torch.randn(2, 6, 5, 7)
        block = NonLocalBlock(6)
        assert block_health(block, x, block(x)).residual_ratio == 0

    def test_residual_ratio(self):
        """A constant residual: |W_z y| is that constant, times the root of the number of values."""
        block, x = NonLocalBlock(6), torch.randn(2, 6, 5, 7)
        nn.init.constant_(block.conv_out.bias, 0.3)
        expected = 0.3 * math.sqrt(x.numel()) / x.square().sum().sqrt().item()
        assert block_health(block, x, block(x)).residual_ratio == pytest.approx(expected)

    @pytest.mark.parametrize("pairwise", ["embedded_gaussian", "concatenation"])
    def test_blind_block(self, pairwise):
        block, x = NonLocalBlock(6, pairwise=pairwise), torch.randn(2, 6, 5, 7)
        for parameter in block.phi.parameters():
            nn.init.zeros_(parameter)
        nn.init.ones_(block.theta.bias)
        if pairwise == "concatenation":
            nn.init.ones_(block.concat_project.weight)
        health = block_health(block, x, x)
        assert health.entropy == pytest.approx(1)
        assert health.query_dependence == pytest.approx(0, abs=1e-6)

    def test_block_that_looks_at_itself(self):
        """Every position has a channel of its own."""
        x = 9 * torch.eye(35).view(1, 35, 5, 7)
        health = block_health(NonLocalBlock(35, pairwise="gaussian"), x, x)
        assert health.entropy == pytest.approx(0, abs=1e-6)
        assert health.query_dependence == pytest.approx(1)

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


class TestWatch:
    def test_every_call_by_name(self):
        """Each adds a constant to its input: to the second, the first's output."""
        model = nn.Sequential(NonLocalBlock(6), NonLocalBlock(6, pairwise="dot_product"))
        x, seen = torch.randn(2, 6, 5, 7), []
        for block in model:
            nn.init.constant_(block.conv_out.bias, 0.3)
        with watch_health(model, lambda *report: seen.append(report)):
            y = model(x)
            model(x[:0])
        assert_close(y, x + 0.6)
        model(x)
        norm = 0.3 * math.sqrt(x.numel())
        assert [(name, health.residual_ratio) for name, health in seen] == [
            ("0", pytest.approx(norm / x.norm().item())),
            ("1", pytest.approx(norm / (x + 0.3).norm().item())),
        ]

    def test_no_such_block(self):
        with pytest.raises(ValueError, match="no non-local block '7'; it has 0"):
            with watch_health(nn.Sequential(NonLocalBlock(6)), print, "7"):
                pass


class Toy(nn.Module):
    """A model of detectron2's kind: it returns losses. It breaks where it is told to."""

    def __init__(self):
        super().__init__()
        self.block = NonLocalBlock(6)
        self.breaks = False

    def forward(self, x):
        y = self.block(x)
        if self.breaks:
            raise FloatingPointError
        return {"loss": (y - 1).square().mean()}


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
            assert all(0 <= value < 1 for value, _ in history)
        ratio = [
            value for value, _ in trainer.storage.history("non_local/block/residual_ratio").values()
        ]
        assert ratio[0] == 0 < ratio[1] < ratio[2]  # the block starts as the identity, and learns

    def test_changes_nothing(self):
        torch.manual_seed(1)
        watched = self.trainer(period=1)
        watched.train(0, 3)
        torch.manual_seed(1)
        other = self.trainer(period=None)
        other.train(0, 3)
        assert torch.equal(watched.model.block.conv_out.weight, other.model.block.conv_out.weight)

    def test_leaves_no_hook_on_the_blocks(self):
        trainer = self.trainer(period=1)
        trainer.train(0, 2)
        assert not trainer.model.block._forward_hooks
        trainer.model.breaks = True
        with pytest.raises(FloatingPointError):
            trainer.train(0, 2)
        assert not trainer.model.block._forward_hooks

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="period must be at least 1, got 0"):
            BlockHealthHook(0, Toy())
        with pytest.raises(ValueError, match="no non-local blocks"):
            BlockHealthHook(1, nn.Conv2d(1, 1, 1))
