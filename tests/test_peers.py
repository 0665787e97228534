"""The blocks and ResNets of other libraries themselves, with the same weights, on the same input.

`make peers` installs them, in the versions of constraints.txt, and runs this.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from torch.testing import assert_close

from nl_detectron import NonLocalBlock
from nl_detectron.ops import PAIRWISE
from nl_detectron.weights import convert

pytestmark = pytest.mark.slow

C = 32
SIZES = {1: (11,), 2: (9, 7), 3: (3, 6, 5)}
YES_NO = (False, True)


def peer(module):
    return pytest.importorskip(module, reason="make peers installs it", exc_type=ImportError)


def randomized(module):
    """The module with weights of a size that it may have after training, and uneven norms."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.uniform_(-0.3, 0.3)
            if name.endswith("running_var"):
                value.add_(1)
    return module.eval()


def assert_same(theirs, dialect, x, **options):
    """Theirs, ours with their weights, and theirs with ours after the way back: all the same."""
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    result = convert(state, dialect, "nl_detectron", lambda name: options)
    ours = NonLocalBlock(x.shape[1], **{"dim": x.dim() - 2, **result.blocks[""].options}).eval()
    ours.load_state_dict(result.state)
    expected = theirs(x)
    assert (expected - x).abs().max() > 0.1
    assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)

    randomized(ours)
    known = {"pairwise": ours.pairwise, "scale": ours.scale, "subsample": ours.subsample}
    known |= {"subsample_position": ours.subsample_position, "axes": ours.axes}
    back = convert(ours.state_dict(), "nl_detectron", dialect, lambda name: known)
    theirs.load_state_dict(back.state)
    assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_mmcv(pairwise, dim):
    module = peer("mmcv.cnn.bricks.non_local")
    for sub_sample, norm, use_scale in itertools.product(YES_NO, (None, {"type": "BN"}), YES_NO):
        if norm and dim != 2:
            norm = {"type": f"BN{dim}d"}
        cls = getattr(module, f"NonLocal{dim}d")
        theirs = cls(C, sub_sample=sub_sample, norm_cfg=norm, mode=pairwise, use_scale=use_scale)
        x = torch.randn(2, C, *SIZES[dim])
        assert_same(randomized(theirs), "mmcv", x, pairwise=pairwise, scale=use_scale)


@pytest.mark.parametrize(
    ("pairwise", "instantiation"),
    [("embedded_gaussian", "softmax"), ("dot_product", "dot_product")],
)
def test_pytorchvideo(pairwise, instantiation):
    module = peer("pytorchvideo.layers.nonlocal_net")
    for pool, norm in itertools.product((1, 2), (None, torch.nn.BatchNorm3d)):
        theirs = module.create_nonlocal(
            dim_in=C,
            dim_inner=C // 2,
            pool_size=(1, pool, pool),
            instantiation=instantiation,
            norm=norm,
        )
        x = torch.randn(2, C, *SIZES[3])
        assert_same(randomized(theirs), "pytorchvideo", x, pairwise=pairwise, subsample=pool)


@pytest.mark.parametrize("ratio", [1 / 8, 1 / 4, 1 / 2])
def test_timm_block(ratio):
    module = peer("timm.layers.non_local_attn")
    theirs = randomized(module.NonLocalAttn(8 * C, rd_ratio=ratio))
    assert_same(theirs, "timm", torch.randn(2, 8 * C, *SIZES[2]))


@pytest.mark.parametrize("depth", [18, 50])
def test_timm_resnet(depth):
    theirs = peer("timm").create_model(f"resnet{depth}", num_classes=7).eval()
    for name, value in theirs.state_dict().items():
        if "running" in name:
            value.copy_(torch.rand_like(value) + 0.5)
    options = {"stride_in_1x1": False} if depth > 34 else {}
    stages = ResNet.make_default_stages(depth, norm="BN", **options)
    ours = ResNet(BasicStem(norm="BN"), stages, 7).eval()
    state = theirs.state_dict()
    result = convert(state, "timm", "detectron2")
    ours.load_state_dict(result.state)
    x = torch.rand(2, 3, 64, 96)
    assert_close(ours(x)["linear"], theirs(x), rtol=1e-5, atol=1e-5)
    back = convert(result.state, "detectron2", "timm").state
    assert all(torch.equal(back[key], value) for key, value in state.items())
