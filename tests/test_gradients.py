"""Output and every gradient of the block against plain autograd on contiguous tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nl_detectron import NonLocalBlock, non_local, ops, paths
from nl_detectron.norm import NORMS
from tests import oracles

C = 32  # GN has 32 groups
# (axes, size); axes of length 1 are where memory layouts become ambiguous
MAPS = {
    1: [("spacetime", (5,)), ("spacetime", (1,))],
    2: [("spacetime", (3, 5)), ("spacetime", (1, 5)), ("spacetime", (5, 1))],
    3: [(axes, (2, 3, 5)) for axes in non_local.AXES] + [("spacetime", (1, 3, 5))],
}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
FORMS = [(pairwise, path) for pairwise, names in ops.PATHS.items() for path in names]
forms = pytest.mark.parametrize(("pairwise", "path"), FORMS)
norms = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let few queries need more than one block, the last one smaller."""
    monkeypatch.setattr(paths, "BLOCK_PAIRS", 2 * 5)


def in_memory(t, layout):
    """The same tensor with its axes in another order in memory."""
    if layout == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "reversed":
        return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])
    return t.contiguous()


LAYOUTS = [
    (x, dy)
    for x in ("contiguous", "channels_last", "reversed")
    for dy in ("contiguous", "channels_last", "reversed")
    if (x, dy) != ("reversed", "reversed")
]


def make(dim=2, norm="", pairwise="embedded_gaussian", channels=C, **options):
    """A float64 block as after training: nothing is zero, and affinities are moderate."""
    block = NonLocalBlock(channels, dim=dim, norm=norm, pairwise=pairwise, **options).double()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=1 if "norm" in name else channels**-0.5)
    for buffer in block.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    return block


def expect(block, x, dy, **options):
    """Output of the oracle, and its gradients of x and of all parameters by their names."""
    leaves = {
        name: t.detach().clone().requires_grad_(t.is_floating_point())
        for name, t in block.state_dict().items()
    }
    x = x.clone().requires_grad_()
    y = oracles.plain_block(x, leaves, training=block.training, **options)
    names = [name for name, _ in block.named_parameters()]
    gradients = torch.autograd.grad(y, [x, *(leaves[name] for name in names)], dy)
    return y, dict(zip(["x", *names], gradients))


def run(block, x, dy, compiled=None):
    """The same of the block, or of a program made of it."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    y = (block if compiled is None else compiled)(x)
    y.backward(dy)
    return y, {"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


def compare(got, expected, *case):
    """Within 1e-9; of gradients, 1e-9 of the largest: some are zero by theory."""
    (y, gradients), (expected_y, expected_gradients) = got, expected
    assert_close(y, expected_y, rtol=0, atol=1e-9, msg=lambda m: f"{case}, y: {m}")
    largest = max(g.abs().max().item() for g in expected_gradients.values())
    for (name, gradient), (expected_name, truth) in zip(
        gradients.items(), expected_gradients.items()
    ):
        assert name == expected_name
        error = (gradient - truth).abs().max()
        assert error <= 1e-9 * largest, f"{case}: gradient of {name} is off by {error}"


@pytest.mark.parametrize("dim", MAPS)
@norms
@forms
def test_every_gradient(pairwise, path, norm, dim):
    for axes, size in MAPS[dim]:
        subsamplings = [(1, "before_conv")]
        if axes != "time":
            subsamplings += [(2, position) for position in non_local.SUBSAMPLE_POSITIONS]
        for subsample, position in subsamplings:
            options = {"subsample": subsample, "subsample_position": position, "axes": axes}
            block = make(dim, norm, pairwise, **options)
            block.path = path
            options.update(pairwise=pairwise, norm=norm)
            for batch in (1, 2):
                x, dy = torch.randn(2, batch, C, *size).double()
                for training in (True, False):
                    if norm and batch * x[0, 0].numel() == 1:
                        continue  # refused: one value has no variance
                    expected = expect(block.train(training), x, dy, **options)
                    for layouts in LAYOUTS:
                        got = run(block, *map(in_memory, (x, dy), layouts))
                        compare(got, expected, size, options, batch, training, layouts)


@pytest.mark.parametrize("dim", CHANNELS_LAST)
@norms
@forms
def test_every_gradient_with_weights_in_channels_last(pairwise, path, norm, dim):
    block = make(dim, norm, pairwise)
    block.path = path
    block.to(memory_format=CHANNELS_LAST[dim])
    x, dy = torch.randn(2, 2, C, *MAPS[dim][0][1]).double()
    expected = expect(block, x, dy, pairwise=pairwise, norm=norm)
    compare(run(block, in_memory(x, "channels_last"), dy), expected)


@pytest.mark.parametrize(("pairwise", "path"), FORMS)
def test_every_gradient_by_convolution(pairwise, path, monkeypatch):
    """Products that large float32 maps have; here in float64."""
    monkeypatch.setattr(paths, "CONVOLVED_DTYPES", (torch.float64,))
    monkeypatch.setattr(paths, "MIN_CONVOLVED_PAIRS", 1)
    for dim, maps in MAPS.items():
        for axes, size in maps:
            block = make(dim, "", pairwise, axes=axes)
            block.path = path
            for batch in (1, 2):
                x, dy = torch.randn(2, batch, C, *size).double()
                expected = expect(block, x, dy, pairwise=pairwise, axes=axes)
                for layouts in LAYOUTS:
                    got = run(block, *map(in_memory, (x, dy), layouts))
                    compare(got, expected, size, axes, batch, layouts)


@norms
@pytest.mark.parametrize("pairwise", ops.PAIRWISE)
def test_every_gradient_with_activation_checkpoint(pairwise, norm):
    block = make(2, norm, pairwise, subsample=2, activation_checkpoint=True)
    buffers = {name: b.clone() for name, b in block.named_buffers()}
    x, dy = torch.randn(2, 2, C, 5, 7).double()
    expected = expect(block, x, dy, pairwise=pairwise, subsample=2, norm=norm)
    compare(run(block, x, dy), expected)
    if "BN" in norm:  # updated once, though the block is computed twice
        assert block.norm.num_batches_tracked == buffers["norm.num_batches_tracked"] + 1
