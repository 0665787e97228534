"""C2D and I3D against stock 2-D networks, plain convolutions, and sizes worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import nn
from torch.testing import assert_close
from video_classification.models import POOLINGS, inflate, make_resnet3d
from video_classification.models.layers import Conv3d
from video_classification.models.resnet3d import NUM_BLOCKS

TINY = {"stem_channels": 4, "res2_channels": 6, "width": 2}


def make_stock(num_blocks, in_channels=3):
    """detectron2's ResNet for images, as TINY."""
    stages, channels = [], 4
    for i, number in enumerate(num_blocks):
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                number,
                in_channels=channels,
                out_channels=(channels := 6 * 2**i),
                bottleneck_channels=2 * 2**i,
                stride_per_block=[1 if i == 0 or j else 2 for j in range(number)],
            )
        )
    return ResNet(BasicStem(in_channels, 4), stages)


@pytest.mark.parametrize(("layout", "size"), [("paper", 56), ("released_32x2", 55)])
def test_sizes_of_all_stages(layout, size):
    """Table 1 of the paper; and those of the released code."""
    names = ["stem", "res2", "res3", "res4", "res5"]
    with torch.device("meta"):
        network = make_resnet3d(pooling=layout, out_features=names)
        sizes = {k: tuple(x.shape[1:]) for k, x in network(torch.empty(1, 3, 32, 224, 224)).items()}
    assert sizes == {
        "stem": (64, 8, size, size),
        "res2": (256, 8, size, size),
        "res3": (512, 4, 28, 28),
        "res4": (1024, 4, 14, 14),
        "res5": (2048, 4, 7, 7),
    }
    assert [shape.stride for shape in network.output_shape().values()] == [4, 4, 8, 16, 32]


# Frame j after pool1, and after pool2, comes from these frames of the clip: by hand, from kernel,
# stride and padding, where conv1 sees one frame at a time.
FOOTPRINTS = {
    "paper": (
        lambda j: {4 * j - 2, 4 * j, 4 * j + 2},
        lambda j: set(range(8 * j - 6, 8 * j + 7, 2)),
    ),
    "released_32x2": (lambda j: {4 * j, 4 * j + 2}, lambda j: {8 * j + k for k in (0, 2, 4, 6)}),
    "released_8x8": (lambda j: {j}, lambda j: {2 * j, 2 * j + 1}),
    "slowfast": (lambda j: {j}, lambda j: {2 * j, 2 * j + 1}),
    "mmaction2": (lambda j: {4 * j}, lambda j: {8 * j, 8 * j + 4}),
    "space": (lambda j: {j}, lambda j: {j}),
    "tsm_temporal_pool": (lambda j: {j}, lambda j: {2 * j - 1, 2 * j, 2 * j + 1}),
    "none": (lambda j: {j}, lambda j: {j}),
}
# pool1 of 37 x 45 pixels, of which conv1 makes 19 x 23
POOLED = dict.fromkeys(("paper", "slowfast", "mmaction2", "space", "tsm_temporal_pool"), (10, 12))
POOLED |= {"released_32x2": (9, 11), "released_8x8": (9, 11), "none": (19, 23)}


@pytest.mark.parametrize("layout", FOOTPRINTS)
def test_poolings(layout, randomize):
    assert list(FOOTPRINTS) == list(POOLINGS)
    network = randomize(make_resnet3d(num_blocks=(1, 1), pooling=layout, **TINY)).eval()
    assert network(torch.randn(1, 3, network.min_frames, 37, 45))["res3"].shape[2] == 1
    if network.min_frames > 1:
        message = f"T >= {network.min_frames} for this MODEL.VIDEO.POOLING"
        with pytest.raises(ValueError, match=message):
            network(torch.randn(1, 3, network.min_frames - 1, 37, 45))

    frames, clip = 17, torch.randn(1, 3, 17, 37, 45)
    calls = network.stem, lambda x: network.pool2(network.res2(network.stem(x)))
    for call, footprint in zip(calls, FOOTPRINTS[layout]):
        before = call(clip)
        assert before.shape[3:] == POOLED[layout]
        found = [set() for _ in range(before.shape[2])]
        for t in range(frames):
            changed = clip.clone()
            changed[:, :, t] += 3 * torch.randn(3, 37, 45)
            for j in (call(changed) != before).any(4).any(3).any(1)[0].nonzero().flatten():
                found[j].add(t)
        expected = [{t for t in footprint(j) if 0 <= t < frames} for j in range(len(found))]
        assert found == expected


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize(("style", "name"), [("", ""), ("3x1x1", "conv1"), ("3x3x3", "conv2")])
def test_where_convolutions_see_several_frames(depth, style, name):
    with torch.device("meta"):
        network = make_resnet3d(num_blocks=NUM_BLOCKS[depth], inflate=style, stem_kernel=(5, 7, 7))
    kernels = {n: m.kernel_size for n, m in network.named_modules() if isinstance(m, nn.Conv3d)}
    blocks = {"res2": (0, 1, 2), "res3": (0, 2), "res5": (1,)}
    blocks["res4"] = range(0, 6 if depth == 50 else 23, 2)
    places = {f"{stage}.{i}.{name}" for stage in blocks for i in blocks[stage]} if style else set()
    assert kernels.pop("stem.conv1") == (5, 7, 7)
    assert {n for n, kernel in kernels.items() if kernel[0] == 3} == places
    for n, (t, *space) in kernels.items():
        assert t in (1, 3)
        assert space == [3, 3] if n.endswith("conv2") else [1, 1]


@pytest.mark.parametrize("frames", [1, 9])
def test_c2d_is_the_network_for_images_on_a_static_video(frames, randomize):
    stock = randomize(make_stock(NUM_BLOCKS[50])).double().eval()
    c2d = make_resnet3d(pooling="paper", **TINY).double().eval()
    c2d.load_state_dict(inflate(stock.state_dict(), c2d.state_dict()))
    image = torch.randn(2, 3, 37, 45).double()
    video = image[:, :, None].expand(-1, -1, frames, -1, -1)
    expected = stock(image)["res5"][:, :, None]
    assert_close(c2d(video)["res5"], expected.expand(-1, -1, (frames + 7) // 8, -1, -1))


@pytest.mark.parametrize("style", ["3x1x1", "3x3x3"])
def test_inflated_i3d_is_the_network_for_images_within_a_static_video(style, randomize):
    """Away from the ends: with conv1 and ten kernels over time, a unit sees 137 frames."""
    stock = randomize(make_stock(NUM_BLOCKS[50])).double().eval()
    i3d = make_resnet3d(pooling="paper", inflate=style, stem_kernel=(5, 7, 7), **TINY)
    i3d = i3d.double().eval()
    i3d.load_state_dict(inflate(stock.state_dict(), i3d.state_dict()))
    image = torch.randn(1, 3, 32, 32).double()
    got = i3d(image[:, :, None].expand(-1, -1, 264, -1, -1))["res5"]
    expected = stock(image)["res5"][:, :, None]
    assert got.shape[2] == 33
    # Unit j sees frames 8 j - 68 to 8 j + 68 of the 264.
    assert_close(got[:, :, 9:24], expected.expand(-1, -1, 15, -1, -1))
    for end in (got[:, :, :1], got[:, :, -1:]):
        assert (end - expected).abs().max() > 1e-3 * expected.abs().max()


FRAMES = 5  # as many as channels: a constant for each channel could be taken for one of a frame


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size", [(FRAMES, 3, 4), (1, 3, 4), (FRAMES, 1, 1)])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "frozen", "GN", ""])
def test_convolution_and_norm(norm, size, layout, randomize):
    """Forward and all gradients as of plain functions, in training and in evaluation."""
    channels = 32 if norm == "GN" else FRAMES
    conv = Conv3d(3, channels, (3, 1, 3), norm={"frozen": "BN"}.get(norm, norm))
    randomize(conv).double().to(memory_format=layout)
    if norm == "frozen":
        conv.norm = FrozenBatchNorm2d.convert_frozen_batchnorm(conv.norm)
    x = torch.randn(2, 3, *size).double().to(memory_format=layout).requires_grad_()
    dy = torch.randn(2, channels, *size).double()
    leaves = {
        k: v.detach().clone().requires_grad_(v.is_floating_point())
        for k, v in conv.state_dict().items()
    }
    weight, bias = leaves.get("norm.weight"), leaves.get("norm.bias")
    for training in (False, True):
        y = conv.train(training)(x)
        plain = F.conv3d(x.contiguous(), leaves["weight"].contiguous(), padding=(1, 0, 1))
        if norm == "GN":
            plain = F.group_norm(plain, 32, weight, bias)
        elif norm:
            axes = (0, 2, 3, 4)
            mean, var = leaves["norm.running_mean"], leaves["norm.running_var"]
            if norm == "BN" and training:
                mean, var = plain.mean(axes), plain.var(axes, correction=0)
            shape = (-1, 1, 1, 1)
            plain = (plain - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
            plain = plain * weight.view(shape) + bias.view(shape)
        assert_close(y, plain, check_stride=False)
        names = [name for name, _ in conv.named_parameters()]
        assert ("norm.weight" in names) == (norm in ("BN", "GN"))  # constants are none
        got = torch.autograd.grad(y, [x, *conv.parameters()], dy)
        expected = torch.autograd.grad(plain, [x, *(leaves[name] for name in names)], dy)
        assert_close(got, expected, check_stride=False)
    if norm == "BN":
        plain = F.conv3d(x, leaves["weight"], padding=(1, 0, 1)).transpose(0, 1).flatten(1)
        mean = 0.9 * leaves["norm.running_mean"] + 0.1 * plain.mean(1)
        var = 0.9 * leaves["norm.running_var"] + 0.1 * plain.var(1)
        assert_close((conv.norm.running_mean, conv.norm.running_var), (mean, var))
    elif "rozen" in norm:
        assert_close(conv.norm.running_mean, leaves["norm.running_mean"])


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", ""])
def test_frozen_stages(norm, randomize):
    widths = {"stem_channels": 32, "res2_channels": 32, "width": 32}
    network = make_resnet3d(num_blocks=(1, 1, 1), freeze_at=2, norm=norm, pooling="none", **widths)
    randomize(network)
    free = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert free == {"res3", "res4"}
    frozen = {k: v.clone() for k, v in network.state_dict().items() if k[:4] in ("stem", "res2")}
    network.train()(torch.randn(2, 3, 3, 17, 17))["res4"].sum().backward()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in frozen.items())


def test_groups_strides_and_widths():
    network = make_resnet3d(
        num_blocks=(1, 2), num_groups=2, width=8, res2_channels=12, stride_in_1x1=True, norm="",
        in_channels=5, stem_channels=10, stem_kernel=(3, 5, 5), pooling="none",
    )  # fmt: skip
    conv1, conv2, conv3 = (getattr(network.res3[0], f"conv{i}") for i in (1, 2, 3))
    assert [conv.stride for conv in (conv1, conv2, conv3)] == [(1, 2, 2), (1, 1, 1), (1, 1, 1)]
    assert conv2.weight.shape == (16, 8, 1, 3, 3)
    assert network.stem.conv1.weight.shape == (10, 5, 3, 5, 5)
    assert network(torch.randn(1, 5, 2, 16, 16))["res3"].shape == (1, 24, 2, 4, 4)


def test_initial_values():
    """MSRA's; and residual branches that add nothing."""
    network = make_resnet3d(num_blocks=(2, 1), pooling="none").eval()
    conv = network.res3[0].conv2
    assert_close(conv.weight.std().item(), (2 / (128 * 9)) ** 0.5, rtol=0.02, atol=0)
    x = torch.randn(1, 256, 2, 3, 3).relu()
    assert torch.equal(network.res2[1](x), x)
    network = make_resnet3d(num_blocks=(2, 1), pooling="none", zero_init_residual=False).eval()
    assert not torch.equal(network.res2[1](x), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inflate": "3x3"}, r"MODEL.VIDEO.INFLATE\) must be one of .*'3x1x1'.*got '3x3'"),
        ({"pooling": "released"}, "MODEL.VIDEO.POOLING.*'released_32x2'.*got 'released'"),
        ({"num_blocks": (1,) * 5}, "MODEL.VIDEO.NUM_BLOCKS.* 1 to 4 numbers"),
        ({"num_blocks": (1, 0)}, "MODEL.VIDEO.NUM_BLOCKS.*>= 1"),
        ({"stem_kernel": (2, 7, 7)}, r"MODEL.VIDEO.STEM_KERNEL.*odd.*\(2, 7, 7\)"),
        ({"stem_kernel": (7, 7)}, "MODEL.VIDEO.STEM_KERNEL.*three"),
        ({"norm": "naiveSyncBN"}, "MODEL.RESNETS.NORM.*'FrozenBN'.*got 'naiveSyncBN'"),
        ({"shift_every": 0}, "MODEL.VIDEO.SHIFT.EVERY.*>= 1, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_resnet3d(**options)


def test_image_instead_of_a_clip():
    with pytest.raises(ValueError, match=r"clips must be \(N, C, T, H, W\).*got \(1, 3, 32, 32\)"):
        make_resnet3d(num_blocks=(1,), **TINY)(torch.randn(1, 3, 32, 32))
