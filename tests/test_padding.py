"""Masked padding: the response to each image of a batch is that to the image alone."""

from __future__ import annotations

import copy
import io
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.layers import CNNBlockBase
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import BasicStem
from detectron2.structures import ImageList
from torch import nn
from torch.testing import assert_close
from torchvision import models

from nl_detectron import NonLocalResNet, insert_non_local_blocks, non_local, ops
from nl_detectron.analysis.attention import record_attention
from nl_detectron.analysis.health import watch_health
from nl_detectron.non_local import find_blocks
from nl_detectron.padding import forget_sizes, image_sizes, remember_sizes
from tests import oracles
from tests.test_gradients import C, compare, forms, make, small_blocks

__all__ = ["small_blocks"]

pairwises = pytest.mark.parametrize("pairwise", ops.PAIRWISE)
SUBSAMPLINGS = [
    (1, "before_conv"),
    *((s, p) for p in non_local.SUBSAMPLE_POSITIONS for s in (2, 3)),
]


def images_of(*sizes, channels=3, **kwargs):
    """Random images of sizes, and their batch as detectron2 pads it."""
    images = [torch.randn(channels, *size, **kwargs) for size in sizes]
    return images, ImageList.from_tensors(images, size_divisibility=4).tensor


class TestImageSizes:
    def test_of_padded_images(self):
        sizes = [(13, 7), (5, 19), (1, 1), (16, 20)]
        assert image_sizes(images_of(*sizes)[1]).tolist() == [list(size) for size in sizes]

    @pytest.mark.parametrize("value", [-1.0, 1e-45, math.nan, math.inf])
    def test_one_pixel_that_is_not_zero(self, value):
        image = torch.zeros(1, 3, 8, 12)
        image[0, 2, 4, 6] = value
        assert image_sizes(image).tolist() == [[5, 7]]

    def test_zeros(self):
        """Within an image they are pixels, at its end padding; an image is never empty."""
        images = torch.randn(2, 3, 8, 12)
        images[0, :, 3] = images[0, :, :, 5] = images[0, :, 6:] = -0.0
        images[1] = 0
        assert image_sizes(images).tolist() == [[6, 12], [1, 1]]


def respond(block, x, sizes):
    """The block's output while a backbone runs on images that fill so much of its maps."""
    block.image_stride = 4
    images = torch.zeros(len(x), 3, *(4 * s for s in x.shape[2:]))
    for image, (rows, columns) in zip(images, sizes):
        image[:, : 4 * rows - 3, : 4 * columns - 1] = 1  # cells at the border hold few pixels
    remember_sizes(nn.Identity(), (images,))
    try:
        return block(x)
    finally:
        forget_sizes(nn.Identity())


@forms
def test_without_padding_nothing_changes(pairwise, path):
    block, x = make(2, pairwise=pairwise, subsample=2), torch.randn(2, C, 5, 7).double()
    block.path = path
    assert torch.equal(respond(block, x, [(5, 7), (5, 7)]), block(x))
    padded = respond(block, x, [(5, 7), (5, 4)])  # one of two
    assert not torch.equal(padded, block(x))
    assert_close(padded[:1], block(x)[:1])


def alone(x, sizes):
    return [x[n : n + 1, :, :rows, :columns] for n, (rows, columns) in enumerate(sizes)]


# Images narrower than the stride of the pooling, of a length it does not divide, and of all the map
SIZES = [(4, 5), (5, 7), (1, 4), (3, 1), (1, 1), (2, 7)]


@pytest.mark.parametrize(("subsample", "position"), SUBSAMPLINGS)
@forms
def test_response_and_every_gradient_are_those_of_the_image_alone(
    pairwise, path, subsample, position
):
    options = {"pairwise": pairwise, "subsample": subsample, "subsample_position": position}
    for checkpoint in (False, True):
        block = make(2, **options, activation_checkpoint=checkpoint)
        block.path = path
        x, dy = torch.randn(2, len(SIZES), C, 5, 7).double()
        for n, (rows, columns) in enumerate(SIZES):
            for t, padding in ((x, 1e3), (dy, 0.0)):
                t[n, :, rows:] = t[n, :, :, columns:] = padding

        leaves = {k: t.detach().clone().requires_grad_() for k, t in block.state_dict().items()}
        whole = x.clone().requires_grad_()
        expected = [oracles.plain_block(m, leaves, **options) for m in alone(whole, SIZES)]
        names, parameters = zip(*block.named_parameters())
        gradients = torch.autograd.grad(
            expected, [whole, *(leaves[name] for name in names)], alone(dy, SIZES)
        )

        x.requires_grad_()
        z = respond(block, x, SIZES)
        got = torch.autograd.grad(z, [x, *parameters], dy)
        flat = [torch.cat([m.flatten() for m in maps]) for maps in (alone(z, SIZES), expected)]
        compare(
            (flat[0], dict(zip(("x", *names), got))),
            (flat[1], dict(zip(("x", *names), gradients))),
            options,
        )


@forms
def test_pixels_in_the_padding_never_matter(pairwise, path):
    block, sizes = make(2, "", pairwise, subsample=2).eval(), [(4, 5), (1, 3)]
    block.path = path
    x = torch.randn(2, C, 5, 7).double()
    expected = alone(respond(block, x, sizes), sizes)
    for value in (math.nan, math.inf):
        for n, (rows, columns) in enumerate(sizes):
            x[n, :, rows:] = x[n, :, :, columns:] = value
        for got, truth in zip(alone(respond(block, x, sizes), sizes), expected):
            assert_close(got, truth)


class Convolution(CNNBlockBase):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__(in_channels, out_channels, stride)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)

    def forward(self, x):
        return self.conv(x).relu()


class Network(nn.Sequential):
    """Two strided layers, the second with a block after it."""

    def __init__(self, **options):
        super().__init__()
        self.stem, self.stage = Convolution(3, 8, 2), nn.Sequential(Convolution(8, 6, 2))
        insert_non_local_blocks(self, {"stage": [0]}, mask_padding=True, **options)
        for parameter in self.stage.non_local0.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.double()

    def expect(self, batch, sizes, **options):
        """What comes out for each image, without its padding."""
        with torch.no_grad():
            maps = alone(self.stage[0](self.stem(batch)), in_map(sizes, 4))
            weights = self.stage.non_local0.state_dict()
            return [oracles.plain_block(m, weights, **options) for m in maps]


def in_map(sizes, stride):
    return [tuple(math.ceil(s / stride) for s in size) for size in sizes]


OPTIONS = {"pairwise": "embedded_gaussian", "subsample": 2}
BATCHES = [[(24, 17), (9, 30), (2, 31)], [(41, 13)], [(37, 3), (29, 52)]]


def check(program, network, pairwise, sizes):
    batch = images_of(*sizes, dtype=torch.float64)[1]
    got = alone(program(batch), in_map(sizes, 4))
    for z, expected in zip(got, network.expect(batch, sizes, pairwise=pairwise, subsample=2)):
        assert_close(z, expected)


def exported(network, example):
    sizes = {0: torch.export.Dim("n", max=9)}
    sizes |= {i: 4 * torch.export.Dim(f"s{i}", min=3, max=99) for i in (2, 3)}
    return torch.export.export(network, (example,), dynamic_shapes={"input": sizes}).module()


def traced(network, example):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, example), file)
    file.seek(0)
    return torch.jit.load(file)


def compiled(network, example):
    torch.compiler.reset()
    return torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")


FAST = [("embedded_gaussian", exported), *((pairwise, traced) for pairwise in ops.PAIRWISE)]
PROGRAMS = [
    pytest.param(
        *case, marks=() if case in FAST else pytest.mark.slow, id=f"{case[1].__name__}-{case[0]}"
    )
    for case in itertools.product(ops.PAIRWISE, (exported, traced, compiled))
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("pairwise", "make_program"), PROGRAMS)
def test_one_program_for_all_sizes(pairwise, make_program):
    network = Network(pairwise=pairwise, subsample=2).eval()
    program = make_program(network, images_of(*BATCHES[0], dtype=torch.float64)[1])
    for batch in BATCHES:
        check(program, network, pairwise, batch)


def test_copies_and_threads():
    """A copy of a network masks by itself; networks run side by side know their own batch."""
    network = Network(**OPTIONS).eval()
    copied = copy.deepcopy(network)
    nn.init.zeros_(network.stem.conv.weight)
    for model in (network, copied):
        check(model, model, "embedded_gaussian", BATCHES[0])
    with ThreadPoolExecutor(4) as threads:
        for done in [
            threads.submit(check, copied, copied, "embedded_gaussian", BATCHES[i % 3])
            for i in range(60)
        ]:
            done.result()


def test_sizes_do_not_outlive_the_pass():
    """Not even one that fails; a block by itself knows of no padding."""
    network = Network(**OPTIONS).eval()
    block = network.stage.non_local0
    network(images_of(*BATCHES[0], dtype=torch.float64)[1])
    assert block.sizes_in_map() is None
    with pytest.raises(RuntimeError):
        network(torch.randn(1, 2, 8, 8).double())
    assert block.sizes_in_map() is None


@pytest.mark.parametrize("builder", ["resnet", "resnet_fpn", "retinanet_resnet_fpn", "lazy"])
def test_backbones(small_cfg, builder):
    """Whatever builds it, all blocks of a backbone mask, in training as in inference."""
    cfg = small_cfg
    # A softmax of features as large as these has one key, in the padding or not.
    pairwise = cfg.MODEL.NON_LOCAL.PAIRWISE = "dot_product"
    cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES3 = (0,)
    if builder == "lazy":
        stages = NonLocalResNet.make_default_stages(18, norm="GN")
        block_options = {"subsample": 2, "pairwise": pairwise}
        options = {"block_options": block_options, "mask_padding": True}
        after = {"res3": [0], "res4": [-2]}
        backbone = NonLocalResNet(BasicStem(norm="GN"), stages, after_blocks=after, **options)
    else:
        cfg.MODEL.BACKBONE.NAME = f"build_non_local_{builder}_backbone"
        if builder.startswith("retinanet"):
            cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        backbone = build_backbone(cfg)
    sizes = [(75, 130), (97, 61), (33, 16)]
    batch = ImageList.from_tensors([torch.randn(3, *size) for size in sizes], 32)
    passes = {}
    for name, block in find_blocks(backbone).items():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=block.in_channels**-0.5)
        block.register_forward_hook(
            lambda block, args, z, name=name: passes.update({name: (block, args[0], z)})
        )
    for training in (True, False):
        passes.clear()
        with torch.no_grad():
            backbone.train(training)(batch.tensor)
        assert len(passes) == 2
        for name, (block, x, z) in passes.items():
            valid = in_map(sizes, 8 if "res3" in name else 16)
            for got, image in zip(alone(z, valid), alone(x, valid)):
                expected = oracles.plain_block(image, block.state_dict(), pairwise, subsample=2)
                assert (got - expected).norm() <= 1e-5 * (expected - image).norm()


def test_attention_and_health_are_those_of_the_images_alone():
    network = Network(**OPTIONS).eval()
    sizes = [(24, 17), (9, 30), (2, 31)]
    batch = images_of(*sizes, dtype=torch.float64)[1]
    seen = []
    with record_attention(network) as recordings, torch.no_grad():
        with watch_health(network, lambda name, health: seen.append(health)):
            network(batch)
    recording = recordings["stage.non_local0"]
    weights = network.stage.non_local0.state_dict()
    entropies, distances, ratios = [], [], []
    for n, image in enumerate(alone(recording.last_input, in_map(sizes, 4))):
        theta, phi = (
            oracles.conv(m, weights[f"{name}.weight"], weights[f"{name}.bias"])
            for name, m in (("theta", image), ("phi", oracles.max_pool(image, 2)))
        )
        rows, keys = (m.flatten(2).transpose(1, 2) for m in (theta, phi))
        count = keys.shape[1]
        one = torch.eye(count, dtype=torch.float64)[None]
        matrix = oracles.operation(rows, keys, one, "embedded_gaussian")[0]
        for query in ((0, 0), (image.shape[2] - 1, image.shape[3] - 1)):
            got = recording.attention(query, n)
            rows_n, columns_n = phi.shape[2:]
            index = query[0] * image.shape[3] + query[1]
            assert_close(got[:rows_n, :columns_n].flatten(), matrix[index])
            assert_close(got.sum(), torch.tensor(1.0).double())  # nothing beyond
        entropies.append(-(matrix * matrix.log()).sum(1).mean() / math.log(count))
        q = len(matrix)
        distances.append(torch.cdist(matrix, matrix, p=1).sum() / 2 / (q * (q - 1)))
        z = oracles.plain_block(image, weights, **OPTIONS)
        ratios.append((z - image).norm() / image.norm())
    (health,) = seen
    for got, expected in zip(health, (ratios, entropies, distances)):
        assert got == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_networks_whose_padding_is_not_known():
    with pytest.raises(ValueError, match=r"MASK_PADDING\) must be False .*ResNet with 'conv1'"):
        insert_non_local_blocks(models.resnet18(), {"layer3": [0]}, mask_padding=True)
    with pytest.raises(ValueError, match=r"MASK_PADDING\) must be False .* got True for dim 3"):
        insert_non_local_blocks(models.video.r3d_18(), {"layer3": [0]}, dim=3, mask_padding=True)
