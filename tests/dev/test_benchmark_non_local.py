"""The benchmark's reference, check and count."""

import importlib
from math import prod

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nl_detectron.ops import PAIRWISE
from tests import oracles
from tests.running import ROOT

SHAPES = {"map": (2, 6, (5, 7), 2), "clip": (2, 4, (3, 2, 5), 2), "whole map": (1, 6, (3, 5), 1)}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "dev")
    return importlib.import_module("benchmark_non_local")


@pytest.fixture
def make_case(script, monkeypatch):
    """Makes cases of shapes for which loops are fast."""
    monkeypatch.setattr(script, "SHAPES", {k: script.Shape(*v) for k, v in SHAPES.items()})
    monkeypatch.setattr(script, "CHECKED_QUERIES", 4)

    def make(shape, pairwise, position="before_conv", backward=True, dtype="float32", last=False):
        return script.Case(shape, pairwise, position, backward, "cpu", dtype, last)

    return make


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("position", ["before_conv", "after_conv"])
@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(script, make_case, shape, pairwise, position, last):
    case = make_case(shape, pairwise, position, last=last)
    queries = torch.tensor([0, 7, prod(SHAPES[shape][2]) - 1])
    z, dz, gradient = script.reference(case, queries)
    weights = {k: v.double() for k, v in script.new_block(case).state_dict().items()}
    x = script.new_input(case).double().requires_grad_()
    options = {"subsample": SHAPES[shape][3], "subsample_position": position}
    expected = oracles.block(x.detach(), weights, pairwise, **options).flatten(2)
    assert_close(z, expected[:, :, queries])
    plain = oracles.plain_block(x, weights, pairwise, **options).flatten(2)
    plain[:, :, queries].backward(dz.double())
    assert_close(gradient, x.grad.flatten(2))


class Changed(nn.Module):
    """A block whose output, and optionally only the gradient of it, is 1 % larger."""

    def __init__(self, block, output):
        super().__init__()
        self.block, self.output = block, output

    def forward(self, x):
        y = self.block(x)
        return y * 1.01 if self.output else y + 0.01 * (y - y.detach())


@pytest.mark.parametrize("last", [False, True])
def test_only_exact_blocks_are_timed(script, make_case, last, monkeypatch):
    case = make_case("map", "embedded_gaussian", last=last)
    x = script.new_input(case)
    assert x.is_contiguous(memory_format=torch.channels_last) == last
    right = script.build_block(case, "naive")
    blocks = {"right": right, "output": Changed(right, True), "gradient": Changed(right, False)}
    assert script.exact(case, blocks, x) == ["right"]
    monkeypatch.setattr(script, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(script, "build_block", lambda _, name: blocks[name])
    times = script.time_rounds(case, list(blocks), 0)
    counts = {name: len(found) for name, found in times.items()}
    assert counts == {"right": 5, "product": 5}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_paths_are_exact_in_every_dtype(script, make_case, pairwise, dtype):
    case = make_case("map", pairwise, dtype=dtype)
    blocks = {name: script.build_block(case, name) for name in script.ops.PATHS[pairwise]}
    found = script.exact(case, blocks, script.new_input(case))
    assert found == list(blocks)


@pytest.mark.parametrize(
    ("shape", "pairwise", "backward", "expected"),
    [
        # theta, phi, g and the output have 4200 x 1024 x 512 each; pairs 2 x 4200 x 4200 x 512
        ("res4", "embedded_gaussian", False, 8_808_038_400 + 18_063_360_000),
        # 4200 keys, times 3: g; pairs of 512 and 256 numbers each; the output
        ("res3-pooled", "gaussian", True, 3 * (550_502_400 + 54_190_080_000 + 2_202_009_600)),
    ],
)
def test_multiplications(script, shape, pairwise, backward, expected):
    case = script.Case(shape, pairwise, "before_conv", backward, "cpu", "float32", False)
    assert script.chosen_path(case)[1] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mmcv_concatenation_is_tried_where_it_fits(script, dtype, monkeypatch):
    # 25 x 512 x 196 x 196 numbers, three times
    needed = 3 * 25 * 512 * 196**2 * torch.finfo(getattr(torch, dtype)).bits // 8
    case = script.Case("roi25", "concatenation", "before_conv", False, "cpu", dtype, False)
    for memory, expected in ((needed, False), (needed + 1, True)):
        monkeypatch.setattr(script, "MEMORY", memory)
        assert script.fits(case, "mmcv") == expected
        assert script.fits(case, "naive")
    assert not script.fits(case._replace(backward=True), "mmcv")
