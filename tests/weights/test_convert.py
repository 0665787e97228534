"""Blocks between dialects: same function on the other side, same bits on the way back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from nl_detectron import NonLocalBlock
from nl_detectron.ops import PAIRWISE
from nl_detectron.weights import convert
from tests import oracles

# What other libraries call theta, phi, g, W_z and the norm; {p} is ".0" in a subsampled block.
LAYOUTS = {
    "mmcv": "theta.conv phi{p}.conv g{p}.conv conv_out.conv conv_out.bn",
    "alexhex7": "theta phi{p} g{p} W.0 W.1",
    "pytorchvideo": "conv_theta conv_phi conv_g conv_out norm",
    "slowfast": "conv_theta conv_phi conv_g conv_out bn",
    "timm": "t p g z norm",
    "caffe2": "theta phi g out bn",
}
W_F = {"mmcv": "concat_project.conv.weight", "alexhex7": "concat_project.0.weight"}
NORM = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
STATISTICS = [f"conv_out.bn.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")]
C, D = 12, 3  # timm's theta is then rescaled by 2, which loses no bit


class Peer:
    """The block of another library as its source code has it: its keys, and what it computes."""

    def __init__(self, dialect, pairwise, dim, pooled, normed, state=None):
        self.dialect, self.pairwise, self.pooled, self.normed = dialect, pairwise, pooled, normed
        names = LAYOUTS[dialect].format(p=".0" if pooled else "").split()
        self.theta, self.phi, self.g, self.out, self.norm = names
        if dialect == "alexhex7" and not normed:
            self.out = "W"
        self.state = self.random_state(dim) if state is None else state

    def key(self, name, parameter):
        if self.dialect != "caffe2":
            return f"{name}.{parameter}"
        short = NORM[parameter] if name == self.norm else parameter[0]
        return f"{name}_{short}"

    def random_state(self, dim):
        state = {}
        convs = {self.theta: (D, C), self.phi: (D, C), self.g: (D, C), self.out: (C, D)}
        for name, shape in convs.items():
            if self.pairwise == "gaussian" and name in (self.theta, self.phi):
                continue
            state[self.key(name, "weight")] = torch.randn(*shape, *[1] * dim)
            if not (self.dialect == "mmcv" and name == self.out and self.normed):
                state[self.key(name, "bias")] = torch.randn(shape[0])
        if self.pairwise == "concatenation":
            state[W_F[self.dialect]] = torch.randn(1, 2 * D, 1, 1)
        if self.normed:
            for name in NORM:
                state[self.key(self.norm, name)] = torch.rand(C) + 0.5
            if self.dialect != "caffe2":
                state[self.key(self.norm, "num_batches_tracked")] = torch.tensor(7)
        return state

    def conv(self, name, x):
        bias = self.state.get(self.key(name, "bias"), torch.zeros(()))
        return oracles.conv(x, self.state[self.key(name, "weight")], bias)

    def __call__(self, x):
        pool = 2 if self.pooled else 1
        if self.pairwise == "gaussian":
            theta, phi, g = (
                x,
                oracles.max_pool(x, pool),
                oracles.max_pool(self.conv(self.g, x), pool),
            )
        else:
            theta = self.conv(self.theta, x)
            if self.dialect in ("mmcv", "alexhex7"):
                phi, g = (oracles.max_pool(self.conv(n, x), pool) for n in (self.phi, self.g))
            else:
                phi, g = (self.conv(n, oracles.max_pool(x, pool)) for n in (self.phi, self.g))
        if self.dialect == "timm":
            theta = theta * C**-0.5
        w_f = self.state[W_F[self.dialect]].flatten() if self.pairwise == "concatenation" else None
        rows = [t.flatten(2).transpose(1, 2) for t in (theta, phi, g)]
        scale = self.dialect not in ("timm", "alexhex7")
        y = oracles.operation(*rows, self.pairwise, scale, w_f)
        y = self.conv(self.out, y.transpose(1, 2).reshape(x.shape[0], D, *x.shape[2:]))
        if self.normed:
            s, b, mean, var = (
                self.state[self.key(self.norm, name)].view(-1, *[1] * (x.dim() - 2))
                for name in NORM
            )
            y = (y - mean) / (var + 1e-5).sqrt() * s + b
        return x + y


def cases():
    yes_no = (False, True)
    for dialect, pairwise in itertools.product(W_F, PAIRWISE):
        for dim, pooled, normed in itertools.product((1, 2, 3), yes_no, yes_no):
            if dim == 2 or pairwise == "concatenation":
                yield dialect, pairwise, dim, pooled, normed
    for pairwise, pooled in itertools.product(("embedded_gaussian", "dot_product"), yes_no):
        for dialect, normed in (
            ("pytorchvideo", False),
            ("pytorchvideo", True),
            ("slowfast", True),
        ):
            yield dialect, pairwise, 3, pooled, normed
        for dim, normed in itertools.product((2, 3), yes_no):
            yield "caffe2", pairwise, dim, pooled, normed
    yield "timm", "embedded_gaussian", 2, False, True


CASES = list(cases())


def random_map(dim):
    return torch.randn(1, C, *(2, 5, 4)[3 - dim :])


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(state, options, x):
    """Our block with these weights, all of which it must have."""
    block = NonLocalBlock(x.shape[1], **{"dim": 2, **options})
    block.load_state_dict(state)
    return block.eval()(x)


def randomized(block):
    for name, value in block.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
    return block.eval()


def told(**options):
    return lambda block: options


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
class TestBlock:
    def test_computes_the_same_in_ours(self, case):
        dialect, pairwise, dim, pooled, normed = case
        peer = Peer(*case)
        options = {"pairwise": pairwise, "subsample": 1 + pooled}
        result = convert(peer.state, dialect, "nl_detectron", told(**options))
        block = result.blocks[""]
        assert (block.options["norm"] == "BN") == normed
        x = random_map(dim)
        assert_close(run(result.state, block.options, x), peer(x))

    def test_same_bits_after_the_way_back(self, case):
        dialect, _, _, pooled, _ = case
        state = Peer(*case).state
        ours = convert(state, dialect, "nl_detectron")
        back = convert(ours.state, "nl_detectron", dialect, told(subsample=1 + pooled))
        assert back.state.keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(back.state[key], value), key
        assert set(ours.mapped) == set(state)

    def test_computes_the_same_from_ours(self, case):
        dialect, pairwise, dim, pooled, normed = case
        options = {
            "subsample": 1 + pooled,
            "subsample_position": "after_conv" if dialect in W_F else "before_conv",
            "pairwise": pairwise,
            "scale": True,
        }
        options |= {"dim": dim, "norm": "BN" if normed else "", "reduction": 4}
        block = randomized(NonLocalBlock(C, **options))
        result = convert(block.state_dict(), "nl_detectron", dialect, told(**options))
        assert result.state.keys() == Peer(*case).state.keys()
        x = random_map(dim)
        peer = Peer(*case, state=result.state)
        assert_close(peer(x), block(x))


@pytest.mark.parametrize(
    ("dialect", "theirs", "ours"),
    [
        ("mmcv", "backbone.layer3.4.non_local_block.theta.conv.bias", "res4.non_local4.theta.bias"),
        ("slowfast", "s3.pathway0_nonlocal1.conv_out.weight", "res3.non_local1.conv_out.weight"),
        ("caffe2", "nonlocal_conv4_13_bn_riv", "res4.non_local13.norm.running_var"),
        ("timm", "nl.z.bias", "nl.conv_out.bias"),
        ("alexhex7", "module.nl_1.W.1.running_mean", "nl_1.norm.running_mean"),
        ("pytorchvideo", "blocks.3.norm.bias", "blocks.3.norm.bias"),
    ],
)
def test_places(dialect, theirs, ours):
    dim = 2 if dialect in ("mmcv", "timm", "alexhex7") else 3
    state = Peer(dialect, "embedded_gaussian", dim, dialect == "alexhex7", True).state
    suffix = max((key for key in state if theirs.endswith(key)), key=len)
    prefix = theirs.removesuffix(suffix)
    result = convert({prefix + key: value for key, value in state.items()}, dialect, "nl_detectron")
    assert result.mapped[theirs] == ours


def test_place_in_a_detector():
    """The way out loses the name of the detector's backbone; a block elsewhere keeps its name."""
    for name, place in (
        ("backbone.bottom_up.res4.non_local4", "backbone.layer3.4.non_local_block"),
        ("backbone.res2.non_local0", "backbone.layer1.0.non_local_block"),
        ("roi_heads.keypoint_head.non_local2", "roi_heads.keypoint_head.non_local2"),
    ):
        state = {f"{name}.{key}": v for key, v in NonLocalBlock(C).state_dict().items()}
        result = convert(state, "nl_detectron", "mmcv", told(subsample=1))
        assert result.mapped[f"{name}.g.bias"] == f"{place}.g.conv.bias"


def test_name_that_only_ends_like_a_block():
    state = {f"big{key}": v for key, v in Peer("timm", *CASES[-1][1:]).state.items()}
    with pytest.raises(ValueError, match="13 keys: bigt.weight, bigt.bias"):
        convert(state, "timm", "nl_detectron")


def test_from_one_library_to_another():
    """The names of video-nonlocal-net are those that SlowFast's own converter reads."""
    state = Peer("caffe2", "embedded_gaussian", 3, True, True).state
    state = {f"nonlocal_conv3_1_{key}": value for key, value in state.items()}
    result = convert(state, "caffe2", "slowfast")
    assert result.mapped["nonlocal_conv3_1_theta_w"] == "s3.pathway0_nonlocal1.conv_theta.weight"
    x = random_map(3)
    place = "s3.pathway0_nonlocal1."
    moved = {key.removeprefix(place): value for key, value in result.state.items()}
    case = "embedded_gaussian", 3, True, True
    bare = {key.removeprefix("nonlocal_conv3_1_"): value for key, value in state.items()}
    assert_close(Peer("slowfast", *case, state=moved)(x), Peer("caffe2", *case, state=bare)(x))


def test_timm_to_one_unit_in_the_last_place():
    """C / D = 8, as in timm by default: theta is multiplied by a number that is not exact."""
    torch.set_default_dtype(torch.float32)
    shapes = {"t": (4, 32), "p": (4, 32), "g": (4, 32), "z": (32, 4)}
    state = {f"{n}.weight": torch.randn(*s, 1, 1) for n, s in shapes.items()}
    state |= {f"{n}.bias": torch.randn(s[0]) for n, s in shapes.items()}
    state |= {f"norm.{n}": torch.rand(32) for n in NORM}
    ours = convert(state, "timm", "nl_detectron")
    back = convert(ours.state, "nl_detectron", "timm", told(pairwise="embedded_gaussian"))
    for key, value in state.items():
        if key.startswith("t."):
            assert_close(back.state[key], value, rtol=2**-23, atol=0)
        else:
            assert torch.equal(back.state[key], value)


def test_same_bits_through_an_added_norm():
    """What is added on the way out, an identity, is folded away on the way back."""
    torch.set_default_dtype(torch.float32)
    state = randomized(NonLocalBlock(C, reduction=4)).state_dict()
    theirs = convert(state, "nl_detectron", "slowfast", told(scale=True, subsample=1))
    assert len(theirs.added) == 4
    back = convert(theirs.state, "slowfast", "nl_detectron", told(norm=""), dim=2)
    assert back.state.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back.state[key], value), key


class TestChanges:
    """What may change without changing the function."""

    @pytest.mark.parametrize("pairwise", PAIRWISE)
    def test_norm_is_folded(self, pairwise):
        peer = Peer("mmcv", pairwise, 2, True, True)
        options = {"pairwise": pairwise, "norm": ""}
        result = convert(peer.state, "mmcv", "nl_detectron", told(**options))
        assert "norm.weight" not in result.state
        assert result.dropped["conv_out.bn.running_var"] == "folded into conv_out"
        x = random_map(2)
        assert_close(run(result.state, result.blocks[""].options, x), peer(x))

    def test_norm_that_only_scales_is_folded(self):
        """video-nonlocal-net after its own folding: scale and bias, no statistics."""
        whole = Peer("caffe2", "embedded_gaussian", 3, True, True)
        affine = {k: v for k, v in whole.state.items() if k not in ("bn_rm", "bn_riv")}
        whole.state |= {"bn_rm": torch.zeros(C), "bn_riv": torch.ones(C) - 1e-5}
        options = {"pairwise": "embedded_gaussian", "subsample": 2}
        result = convert(affine, "caffe2", "nl_detectron", told(**options))
        x = random_map(3)
        assert_close(run(result.state, result.blocks[""].options, x), whole(x))

    @pytest.mark.parametrize("dialect", ["timm", "slowfast"])
    def test_norm_is_added_where_the_target_has_one(self, dialect):
        block = randomized(NonLocalBlock(C, reduction=4, dim=2 if dialect == "timm" else 3))
        options = {"pairwise": "embedded_gaussian", "subsample": 1, "scale": True}
        result = convert(block.state_dict(), "nl_detectron", dialect, told(**options))
        assert len(result.added) == 4
        x = random_map(block.dim)
        peer = Peer(dialect, "embedded_gaussian", block.dim, False, True, state=result.state)
        assert_close(peer(x), block(x))

    def test_scale_is_moved_into_theta(self):
        block = randomized(NonLocalBlock(C, reduction=4, scale=False, dim=3))
        options = {"pairwise": "embedded_gaussian", "subsample": 1, "scale": False}
        result = convert(block.state_dict(), "nl_detectron", "pytorchvideo", told(**options))
        x = random_map(3)
        peer = Peer("pytorchvideo", "embedded_gaussian", 3, False, False, state=result.state)
        assert_close(peer(x), block(x))

    @pytest.mark.parametrize("pairwise", set(PAIRWISE) - {"embedded_gaussian"})
    def test_scale_of_other_forms_is_not(self, pairwise):
        state = NonLocalBlock(C, pairwise=pairwise).state_dict()
        options = {"pairwise": pairwise, "subsample": 1, "scale": True}
        result = convert(state, "nl_detectron", "alexhex7", told(**options))
        for old, new in result.mapped.items():
            assert torch.equal(result.state[new].flatten(), state[old].flatten())

    def test_video_block_on_a_single_frame(self):
        peer = Peer("slowfast", "embedded_gaussian", 3, True, True)
        options = {"pairwise": "embedded_gaussian", "subsample": 2}
        result = convert(peer.state, "slowfast", "nl_detectron", told(**options), dim=2)
        x = random_map(2)
        frame = peer(x.unsqueeze(2)).squeeze(2)
        assert_close(run(result.state, result.blocks[""].options, x), frame)

    def test_missing_biases_are_zero(self):
        peer = Peer("caffe2", "dot_product", 3, False, False)
        peer.state = {k: v for k, v in peer.state.items() if not k.endswith("_b")}
        options = {"pairwise": "dot_product", "subsample": 1}
        result = convert(peer.state, "caffe2", "nl_detectron", told(**options))
        assert set(result.added) == {f"{n}.bias" for n in ("theta", "phi", "g", "conv_out")}
        x = random_map(3)
        assert_close(run(result.state, result.blocks[""].options, x), peer(x))

    def test_what_nobody_told_is_reported(self):
        state = NonLocalBlock(C, dim=3).state_dict()
        result = convert(state, "nl_detectron", "pytorchvideo")
        assert result.blocks[""].assumed == {
            "subsample_position": "before_conv",
            "scale": True,
            "axes": "spacetime",
        }
        flat = convert(NonLocalBlock(C).state_dict(), "nl_detectron", "pytorchvideo")
        assert "axes" not in flat.blocks[""].assumed
        known = told(subsample=1, pairwise="dot_product", axes="spacetime")
        assert convert(state, "nl_detectron", "pytorchvideo", known).blocks[""].assumed == {}


class TestRefusals:
    """An error names the block, the option and the values, or every key."""

    @pytest.mark.parametrize(
        ("made_with", "target", "options", "message"),
        [
            ({}, "mmcv", {}, "subsample must be 1 or 2, got None"),
            ({}, "mmcv", {"subsample": 3}, "got 3"),
            (
                {},
                "mmcv",
                {"subsample": 2, "subsample_position": "before_conv"},
                "subsample_position is 'before_conv'; with 'after_conv'",
            ),
            ({}, "timm", {"subsample": 2}, "subsample is 2; with 1"),
            ({}, "timm", {"pairwise": "dot_product"}, "pairwise must be one of"),
            (
                {"pairwise": "gaussian"},
                "slowfast",
                {},
                "pairwise must be one of .*, got 'gaussian'",
            ),
            ({"pairwise": "concatenation"}, "caffe2", {}, "got 'concatenation'"),
            ({"pairwise": "concatenation"}, "caffe2", {"pairwise": "gaussian"}, "is 'concatenati"),
            ({"in_channels": 32, "norm": "GN"}, "slowfast", {}, "norm is 'GN'; with 'BN'"),
            ({"in_channels": 32, "norm": "GN"}, "pytorchvideo", {}, "norm is 'GN'; with 'BN'"),
            ({"dim": 3}, "pytorchvideo", {"axes": "time"}, "axes is 'time'; with 'spacetime'"),
            ({}, "mmcv", {"pairwise": "gaussian"}, "by its weights, pairwise is one of"),
            ({}, "pytorchvideo", {"scale": False}, "give pairwise, or add --block"),
            ({}, "pytorchvideo", {"reduction": 4}, "reduction is 2; with 4"),
            ({}, "pytorchvideo", {"subsampel": 2}, "got 'subsampel'"),
            ({}, "mmdet", {}, "dialect must be one of"),
            ({}, "torchvision", {}, "Nothing is left of 8 keys: nl.theta.weight"),
        ],
    )
    def test_of_ours(self, made_with, target, options, message):
        block = NonLocalBlock(**{"in_channels": C, **made_with})
        state = {f"nl.{key}": value for key, value in block.state_dict().items()}
        with pytest.raises(ValueError, match=message) as error:
            convert(state, "nl_detectron", target, told(**options))
        assert "'nl'" in str(error.value) or target in ("mmdet", "torchvision")

    @pytest.mark.parametrize(
        ("dialect", "change", "message"),
        [
            ("mmcv", {"phi.conv.weight": None}, "one of theta and phi is missing"),
            ("mmcv", {"phi.conv.alpha": torch.ones(1)}, "no such block has .*phi.conv.alpha"),
            ("mmcv", {"theta.conv.weight": torch.ones(D, C, 3, 3)}, "theta.weight of shape"),
            ("mmcv", {"g.conv.weight": torch.ones(8, C, 1, 1)}, "no block of ours maps 12 to 8"),
            ("mmcv", {"g.conv.weight": torch.ones(24, C, 1, 1)}, "no block of ours maps 12 to 24"),
            ("mmcv", dict.fromkeys(STATISTICS), "not batch norm"),
            ("mmcv", {"conv_out.bn.weight": "text"}, "the norm has only bias, num_batches"),
            ("mmcv", {"conv_out.bn.running_var": None}, "the norm has only bias, num_batches"),
            (
                "pytorchvideo",
                {"conv_theta.weight": None, "conv_phi.weight": None},
                "keys of 'gaussian'",
            ),
        ],
    )
    def test_of_theirs(self, dialect, change, message):
        state = Peer(dialect, "embedded_gaussian", 2, False, True).state | change
        state = {key: value for key, value in state.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            convert(state, dialect, "nl_detectron", dim=3)
