"""The block against loops; what it is when new, what its state dict holds, which maps it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nl_detectron import NonLocalBlock, non_local, ops
from nl_detectron.norm import NORMS
from tests import oracles
from tests.test_gradients import C, make

# Sizes that are all different, so that no two axes can be exchanged unnoticed.
N = 2
MAPS = {1: (7,), 2: (5, 7), 3: (3, 5, 7)}
pairwises = pytest.mark.parametrize("pairwise", ops.PAIRWISE)
norms = pytest.mark.parametrize("norm", NORMS)
dims = pytest.mark.parametrize("dim", MAPS)

EMBEDDED = ["theta.weight", "theta.bias", "phi.weight", "phi.bias"]
OUTPUT = ["g.weight", "g.bias", "conv_out.weight", "conv_out.bias"]
KEYS = {
    "gaussian": OUTPUT,
    "embedded_gaussian": [*EMBEDDED, *OUTPUT],
    "dot_product": [*EMBEDDED, *OUTPUT],
    "concatenation": [*EMBEDDED, *OUTPUT, "concat_project.weight"],
}
BN_KEYS = [f"norm.{k}" for k in "weight bias running_mean running_var num_batches_tracked".split()]


def sample(dim, c=C):
    return torch.randn(N, c, *MAPS[dim]).double()


CASES = [
    (dim, axes, subsample, position)
    for dim in MAPS
    for axes in (non_local.AXES if dim == 3 else ("spacetime",))
    for subsample in ((1, 2) if axes != "time" else (1,))
    for position in non_local.SUBSAMPLE_POSITIONS
]


@pytest.mark.parametrize(("dim", "axes", "subsample", "position"), CASES)
@pairwises
def test_oracle(pairwise, dim, axes, subsample, position):
    options = {"pairwise": pairwise, "axes": axes}
    options.update(subsample=subsample, subsample_position=position)
    block, x = make(dim=dim, **options), sample(dim)
    assert_close(block(x), oracles.block(x, block.state_dict(), **options))


@pairwises
def test_oracle_of_the_scale(pairwise):
    block, x = make(pairwise=pairwise, scale=False), sample(2)
    assert_close(block(x), oracles.block(x, block.state_dict(), pairwise, scale=False))


@pytest.mark.parametrize(
    ("size", "stride"), [((7, 1), 2), ((1, 7), 2), ((1, 1), 2), ((2, 3), 2), ((5, 11), 3)]
)
@pytest.mark.parametrize("position", non_local.SUBSAMPLE_POSITIONS)
def test_stride_of_the_pooling_and_maps_as_narrow_as_it(size, stride, position):
    options = {"subsample": stride, "subsample_position": position}
    block, x = make(**options), torch.randn(N, C, *size).double()
    assert_close(block(x), oracles.block(x, block.state_dict(), block.pairwise, **options))


@pairwises
@dims
@norms
def test_new_block_is_the_identity_and_learns(norm, dim, pairwise):
    block = NonLocalBlock(C, dim=dim, pairwise=pairwise, norm=norm)
    x = torch.randn(3, 32, *MAPS[dim])
    for mode in (block.train(), block.eval()):
        assert torch.equal(mode(x), x)
    block.train()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    target, g = torch.randn_like(x), block.g.weight.clone()
    for _ in range(5):
        optimizer.zero_grad()
        (block(x) - target).square().mean().backward()
        optimizer.step()
    assert (block(x) - x).abs().max() > 1e-3
    assert not torch.equal(block.g.weight, g)  # what feeds the layer that started at zero


@pairwises
@dims
def test_state_dict_keys(dim, pairwise):
    assert sorted(make(dim=dim, pairwise=pairwise).state_dict()) == sorted(KEYS[pairwise])
    for norm, keys in {"BN": BN_KEYS, "SyncBN": BN_KEYS, "GN": BN_KEYS[:2]}.items():
        block = NonLocalBlock(C, dim=dim, pairwise=pairwise, norm=norm)
        assert sorted(block.state_dict()) == sorted(KEYS[pairwise] + keys)


@norms
def test_initial_values(norm):
    block = NonLocalBlock(256, pairwise="concatenation", norm=norm)
    # He's: sqrt(2 / fan-in). The sample's deviates from it by a part of 1 / sqrt(2 n).
    convs = [block.theta, block.phi, block.g]
    if norm:
        convs.append(block.conv_out)
        assert_close(block.norm.weight, torch.zeros(256))
        assert_close(block.norm.bias, torch.zeros(256))
    else:
        assert_close(block.conv_out.weight, torch.zeros(256, 128, 1, 1))
    for conv in convs:
        std = (2 / conv.in_channels) ** 0.5
        assert_close(conv.weight.std(), torch.tensor(std), rtol=0.02, atol=0)
        assert_close(conv.weight.mean(), torch.tensor(0.0), rtol=0, atol=0.02 * std)
        assert_close(conv.bias, torch.zeros_like(conv.bias))
    assert_close(block.conv_out.bias, torch.zeros(256))
    std = torch.tensor(2 / 256).sqrt()
    assert_close(block.concat_project.weight.std(), std, rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # theta, phi, g: 1024 x 512 + 512 each; conv_out: 512 x 1024 + 1024
        ({}, 3 * (1024 * 512 + 512) + 512 * 1024 + 1024),  # 2_099_712
        ({"norm": "BN"}, 2_101_760),
        ({"pairwise": "gaussian", "norm": "BN"}, 1_052_160),
        ({"pairwise": "concatenation"}, 2_099_712 + 2 * 512),
        # inner channels 256
        ({"reduction": 4}, 3 * (1024 * 256 + 256) + 256 * 1024 + 1024),
    ],
)
def test_number_of_parameters(options, parameters):
    with torch.device("meta"):
        block = NonLocalBlock(1024, **options)
    assert sum(p.numel() for p in block.parameters()) == parameters


def test_inner_channels_are_never_none():
    block, x = make(channels=3, reduction=4), sample(2, c=3)
    assert block.theta.weight.shape == (1, 3, 1, 1)
    assert_close(block(x), oracles.block(x, block.state_dict(), block.pairwise))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@dims
@norms
def test_empty_batch(norm, dim, training):
    block = NonLocalBlock(C, dim=dim, subsample=2, norm=norm).train(training)
    x = torch.randn(0, 32, *MAPS[dim], requires_grad=True)
    y = block(x)
    assert y.shape == x.shape
    y.sum().backward()
    for tensor in [*block.buffers(), *(p.grad for p in block.parameters())]:
        assert tensor.isfinite().all()


@pairwises
def test_3d_with_one_frame_is_2d(pairwise):
    block2d = make(pairwise=pairwise, subsample=2)
    weights = {k: v.unsqueeze(-1) if v.dim() > 1 else v for k, v in block2d.state_dict().items()}
    x = sample(2)
    for axes in ("spacetime", "space"):
        block3d = make(dim=3, pairwise=pairwise, subsample=2, axes=axes)
        block3d.load_state_dict(weights)
        assert_close(block3d(x.unsqueeze(2)).squeeze(2), block2d(x))


@pytest.mark.parametrize(("axes", "subsample"), [("spacetime", 2), ("time", 1)])
@pairwises
def test_groups_of_frames_are_clips_of_their_own(pairwise, axes, subsample):
    options = {"pairwise": pairwise, "axes": axes, "subsample": subsample}
    x = torch.randn(N, C, 6, 3, 5).double().requires_grad_()
    for group_frames in (1, 2, 6):  # one group of 6 is none
        block = make(dim=3, group_frames=group_frames, **options)
        clips = x.split(group_frames, dim=2)
        expected = torch.cat(
            [oracles.plain_block(clip, block.state_dict(), **options) for clip in clips], dim=2
        )
        assert_close(block(x), expected)
        dy = torch.randn_like(x)
        gradients = [torch.autograd.grad(y, x, dy)[0] for y in (block(x), expected)]
        assert_close(*gradients)
        rows = torch.cat([make_ungrouped(block).attention(clip) for clip in clips])
        got = block.attention(x)
        # A part's place among the samples: first the map's, then the group's.
        assert_close(
            got, rows.unflatten(0, (6 // group_frames, N, -1)).transpose(0, 1).flatten(0, 2)
        )
    with pytest.raises(ValueError, match="multiple of .*GROUP_FRAMES.* = 4, got 6"):
        make(dim=3, group_frames=4)(x)


def make_ungrouped(block):
    block = copy.deepcopy(block)
    block.group_frames = 0
    return block


@pairwises
@pytest.mark.parametrize("axes", ["space", "time"])
def test_attention_within_a_frame_or_a_place(axes, pairwise):
    block, x = make(dim=3, pairwise=pairwise, axes=axes), sample(3)
    attention, (t, h, w) = block.attention(x), MAPS[3]
    if axes == "space":  # the last frame of the second map
        attention, positions = attention[t + t - 1], x[1, :, t - 1]
    else:  # the second place of the second map
        attention, positions = attention[h * w + 1], x[1, :, :, 0, 1]
    rows = positions.flatten(1).T
    theta = phi = rows[None]
    if pairwise != "gaussian":
        theta, phi = (
            (rows @ conv.weight.flatten(1).T + conv.bias)[None] for conv in (block.theta, block.phi)
        )
    w_f = block.concat_project.weight.flatten() if pairwise == "concatenation" else None
    identity = torch.eye(len(rows), dtype=torch.float64)[None]
    assert_close(attention, oracles.operation(theta, phi, identity, pairwise, w_f=w_f)[0])


@dims
def test_norm_is_that_of_the_dimension(dim):
    block, x = make(dim=dim, norm="BN"), sample(dim)
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dim - 1](C).double()
    norm.load_state_dict(block.norm.state_dict())
    for training in (True, False):
        block.train(training), norm.train(training)
        expected = oracles.block(x, block.state_dict(), block.pairwise) - x
        assert_close(block(x), x + norm(expected))
        assert_close(block.norm.running_mean, norm.running_mean)
        assert_close(block.norm.running_var, norm.running_var)


@dims
@norms
def test_freeze(norm, dim):
    block, x = make(dim, norm), sample(dim)
    expected = oracles.plain_block(x, block.state_dict(), block.pairwise, norm=norm)
    block.freeze().train()
    buffers = copy.deepcopy(list(block.buffers()))
    assert_close(block(x), expected)
    assert not any(p.requires_grad for p in block.parameters())
    assert_close(list(block.buffers()), buffers)


@norms
@pairwises
def test_memory_layout_of_the_map_is_kept(pairwise, norm):
    block, x = make(2, norm, pairwise, subsample=2), sample(2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        block.to(memory_format=memory_format)
        for mode in (block.train(), block.eval()):
            y = mode(x.to(memory_format=memory_format))
            assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("factor", [1, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pairwises
def test_half_precision(pairwise, dtype, factor):
    block = NonLocalBlock(64, pairwise=pairwise, subsample=2)
    for conv in block.children():
        if hasattr(conv, "weight"):
            nn.init.normal_(conv.weight, std=0.01)  # y itself must not be beyond float16
    block.to(dtype)
    x = (factor * torch.randn(N, 64, 5, 7)).to(dtype)
    y = block(x)
    assert y.dtype == dtype
    weights = {k: v.double() for k, v in block.state_dict().items()}
    expected = oracles.block(x.double(), weights, pairwise, subsample=2)
    size = (expected - x).abs().max() + x.abs().max()
    if (pairwise, dtype, factor) == ("dot_product", torch.float16, 256):
        assert y.isinf().any()  # the response, before conv_out, is beyond float16
    else:
        assert_close(y.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * size.item())
    with torch.autocast("cpu", torch.bfloat16):
        y = block.float()(x.float())
    assert_close(
        y.double(), expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps * size.item()
    )


@pytest.mark.parametrize("scale", [True, False])
@pairwises
def test_attention(pairwise, scale):
    block, x = make(pairwise=pairwise, scale=scale, subsample=2), sample(2)
    attention = block.attention(x)
    assert attention.shape == (N, 5 * 7, 2 * 3)
    keys = oracles.max_pool(x, 2)
    theta, phi = x, keys
    if pairwise != "gaussian":
        theta = oracles.conv(x, block.theta.weight, block.theta.bias)
        phi = oracles.conv(keys, block.phi.weight, block.phi.bias)
    w_f = block.concat_project.weight.flatten() if pairwise == "concatenation" else None
    identity = torch.eye(6, dtype=torch.float64).expand(N, 6, 6)
    rows = [t.flatten(2).transpose(1, 2) for t in (theta, phi)]
    assert_close(attention, oracles.operation(*rows, identity, pairwise, scale, w_f))
    queries = torch.tensor([34, 0, 11])
    assert_close(block.attention(x, queries), attention[:, queries])


@pytest.mark.parametrize(
    ("dim", "subsample", "size", "window", "keys"),
    [
        (1, 2, (7,), [2], 3),
        (2, 3, (5, 2), [3, 2], 1),
        (3, 2, (7, 5, 1), [1, 2, 1], 14),
        (2, 1, (5, 7), [1, 1], 35),
    ],
)
def test_pool_window(dim, subsample, size, window, keys):
    block = make(dim=dim, subsample=subsample)
    assert block.pool_window(size) == window
    row = block.attention(torch.randn(1, C, *size).double(), torch.tensor([0]))
    assert row.shape == (1, 1, keys)


@pytest.mark.parametrize(
    ("pairwise", "large"),
    [
        ("gaussian", "blocked"),
        ("embedded_gaussian", "blocked"),
        ("dot_product", "linear"),
        ("concatenation", "sorted"),
    ],
)
def test_path_for(pairwise, large):
    block = make(pairwise=pairwise)
    small_map, large_map = torch.randn(1, C, 1, 2).double(), torch.randn(1, C, 23, 23).double()
    assert (block.path_for(small_map), block.path_for(large_map)) == ("naive", large)
    with torch.no_grad():
        assert block.path_for(large_map) == large
    block.path = "naive"
    assert block.path_for(large_map) == "naive"
    block.path = "texbook"
    for function in (block, block.path_for):
        with pytest.raises(ValueError, match="path must be one of .* got 'texbook'"):
            function(small_map)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "pairwise=embedded_gaussian, scale=True, path=blocked, subsample=1"),
        (
            {"pairwise": "gaussian", "subsample": 2},
            "pairwise=gaussian, path=blocked, subsample=2, subsample_position=before_conv",
        ),
        (
            {"pairwise": "gaussian", "dim": 3, "axes": "time", "activation_checkpoint": True},
            "pairwise=gaussian, path=blocked, subsample=1, axes=time, activation_checkpoint=True",
        ),
        (
            {"pairwise": "gaussian", "dim": 3, "group_frames": 4},
            "pairwise=gaussian, path=blocked, subsample=1, axes=spacetime, group_frames=4",
        ),
    ],
    ids=str,
)
def test_print(options, text):
    block = NonLocalBlock(C, **options)
    chosen = text.replace("path=blocked", "path chosen by size")
    for path, expected in ((None, chosen), ("blocked", text)):
        block.path = path
        assert str(block).splitlines()[1].strip() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 4}, r"dim .*key DIM\) must be one of \(1, 2, 3\), got 4"),
        ({"pairwise": "softmax"}, "pairwise .*PAIRWISE.*'embedded_gaussian'.*got 'softmax'"),
        ({"subsample_position": "mid"}, "SUBSAMPLE_POSITION.*'before_conv', 'after_conv'.*'mid'"),
        ({"dim": 3, "axes": "both"}, "axes .*key AXES.*'spacetime', 'space', 'time'.*got 'both'"),
        ({"axes": "space"}, r"axes 'space': dim \(config key DIM\) must be 3, got 2"),
        ({"dim": 3, "axes": "time", "subsample": 2}, "'time'.*key SUBSAMPLE.* must be 1, got 2"),
        ({"group_frames": 4}, r"group_frames 4: dim \(config key DIM\) must be 3, got 2"),
        (
            {"dim": 3, "axes": "space", "group_frames": 4},
            "'space'.*GROUP_FRAMES.* must be 0, got 4",
        ),
        ({"dim": 3, "group_frames": -1}, "group_frames .*GROUP_FRAMES.* integer >= 0, got -1"),
        ({"norm": "FrozenBN"}, r"norm 'FrozenBN'.*use one of \('', 'BN', 'SyncBN', 'GN'\)"),
        ({"norm": "LN"}, r"norm .*key NORM.*\('', 'BN', 'SyncBN', 'GN'\), got 'LN'"),
        ({"norm": "GN"}, "norm 'GN' has 32 groups: in_channels .*got 48"),
        ({"reduction": 0}, "reduction .*key REDUCTION.*must be an integer >= 1, got 0"),
        ({"reduction": 2.0}, "reduction .*must be an integer >= 1, got 2.0"),
        ({"subsample": 0}, "subsample .*key SUBSAMPLE.*must be an integer >= 1, got 0"),
        ({"subsample": "2"}, "subsample .*must be an integer >= 1, got '2'"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(48, **options)
