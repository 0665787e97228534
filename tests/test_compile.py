"""Blocks and the keypoint head compiled, exported and traced: one program for all sizes."""

from __future__ import annotations

import io

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torch.testing import assert_close

from nl_detectron import NonLocalBlock, NonLocalKeypointHead, non_local, ops, paths
from tests import oracles
from tests.test_gradients import C, compare, expect, make, run

pairwises = pytest.mark.parametrize("pairwise", ops.PAIRWISE)
positions = pytest.mark.parametrize("position", non_local.SUBSAMPLE_POSITIONS)
tracer_warnings = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
# Batch and map: small ones, where all pairs are multiplied out, and large ones, where they are not
SHAPES = [(2, C, 7, 5), (3, C, 23, 31), (1, C, 2, 300)]


def check(got, expected):
    # float64, also where sizes are traced as float32
    largest = expected.abs().max().item() if len(expected) else 1.0
    assert_close(got, expected, rtol=0, atol=1e-12 * max(largest, 1.0))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("pairwise", "norm"), [*zip(ops.PAIRWISE, ["BN", "GN", "", "BN"])])
def test_compiled(pairwise, norm, backend):
    torch.compiler.reset()
    block = make(2, norm, pairwise, subsample=2)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for shape in SHAPES:
        x, dy = torch.randn(2, *shape).double()
        expected = expect(block, x, dy, subsample=2, pairwise=pairwise, norm=norm)
        compare(run(block, x, dy, compiled), expected, shape)


@positions
@pairwises
def test_exported(pairwise, position):
    options = {"pairwise": pairwise, "subsample": 2, "subsample_position": position}
    block = make(2, "BN", **options).eval()
    sizes = {0: torch.export.Dim("n", max=99)}
    sizes |= {axis: torch.export.Dim(f"s{axis}", min=4, max=999) for axis in (2, 3)}
    x = torch.randn(2, C, 7, 5).double()
    exported = torch.export.export(block, (x,), dynamic_shapes={"x": sizes}).module()
    for shape in [(1, C, 7, 5), (2, C, 23, 31), (3, C, 5, 300)]:
        x = torch.randn(shape).double()
        expected = oracles.plain_block(x, block.state_dict(), norm="BN", **options)
        check(exported(x), expected)


@tracer_warnings
@pytest.mark.parametrize("traced_at", [(1, 7, 5), (2, 40, 60), (3, 23, 31)], ids=str)
@positions
@pairwises
def test_traced(pairwise, position, traced_at):
    options = {"pairwise": pairwise, "subsample": 2, "subsample_position": position}
    c = 22  # D = 11, whose root has no end in float32
    block = make(2, "BN", channels=c, **options).eval()
    n, *size = traced_at
    traced = torch.jit.trace(block, torch.randn(n, c, *size).double())
    for n, *size in [
        (1, 7, 5),
        (2, 23, 31),
        (3, 2, 300),
        (2, 1, 5),
        (1, 5, 1),
        (2, 1, 1),
        (0, 7, 5),
    ]:
        x = torch.randn(n, c, *size).double()
        expected = oracles.plain_block(x, block.state_dict(), norm="BN", **options)
        check(traced(x), expected)


@tracer_warnings
@pytest.mark.parametrize("path", ["naive", "blocked", "fused"])
def test_traced_with_a_path_of_choice(path, monkeypatch):
    monkeypatch.setattr(paths, "BLOCK_PAIRS", 100)  # more than one block
    block = make(2, "", "embedded_gaussian").eval()
    block.path = path
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(block, torch.randn(1, C, 7, 5).double()), file)
    file.seek(0)
    traced = torch.jit.load(file)  # without Python, which a trace may only call back in its process
    x = torch.randn(3, C, 41, 67).double()
    check(traced(x), oracles.plain_block(x, block.state_dict(), "embedded_gaussian"))


@tracer_warnings
@pytest.mark.parametrize("dim", [1, 3])
@pairwises
def test_traced_in_other_dimensions(pairwise, dim):
    for axes in non_local.AXES if dim == 3 else ("spacetime",):
        options = {"pairwise": pairwise, "axes": axes}
        for group_frames in (0, 2) if dim == 3 and axes != "space" else (0,):
            block = make(dim, "", **options, group_frames=group_frames).eval()
            traced = torch.jit.trace(block, torch.randn(1, C, *(2, 5, 3)[:dim]).double())
            x = torch.randn(3, C, *(4, 2, 7)[:dim]).double()
            clips = x.split(group_frames, dim=2) if group_frames else [x]
            plain = [oracles.plain_block(clip, block.state_dict(), **options) for clip in clips]
            check(traced(x), torch.cat(plain, dim=2))


@tracer_warnings
@pairwises
def test_keypoint_head_traced_at_other_numbers_of_rois(pairwise):
    options = {"pairwise": pairwise, "subsample": 2}
    shape = ShapeSpec(channels=6, height=14, width=14)
    head = NonLocalKeypointHead(
        shape, num_keypoints=5, conv_dims=[32] * 8, block_options=options
    ).double()
    for module in head.modules():
        if isinstance(module, NonLocalBlock):
            nn.init.normal_(module.conv_out.weight, std=0.2)
    traced = torch.jit.trace_module(head.eval(), {"layers": torch.randn(2, 6, 14, 14).double()})
    for rois in (1, 3, 7, 0):
        x = torch.randn(rois, 6, 14, 14).double()
        got = traced.layers(x)
        for module in head.children():
            if isinstance(module, NonLocalBlock):
                x = oracles.plain_block(x, module.state_dict(), **options)
            else:
                x = module(x)
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        check(got, x)
