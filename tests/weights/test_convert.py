"""Blocks between dialects: same output on the other side, same bits on the way back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from nl_detectron import NonLocalBlock
from nl_detectron.ops import PAIRWISE
from nl_detectron.weights import convert
from tests import oracles

# Modules theta, phi, g, W_z and norm of other libraries; {p} is ".0" with subsampling, {n} with a
# norm.
LAYOUTS = {
    "mmcv": "theta.conv phi{p}.conv g{p}.conv conv_out.conv conv_out.bn",
    "alexhex7": "theta phi{p} g{p} W{n} W.1",
    "pytorchvideo": "conv_theta conv_phi conv_g conv_out norm",
    "tsm": "theta phi{p} g{p} W{n} W.1",
    "slowfast": "conv_theta conv_phi conv_g conv_out bn",
    "timm": "t p g z norm",
    "caffe2": "theta phi g out bn",
}
W_F = {"mmcv": "concat_project.conv.weight", "alexhex7": "concat_project.0.weight"}
NORM = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}  # in Caffe2
AFTER_CONV = (*W_F, "tsm")  # is the pooling
STATISTICS = [f"conv_out.bn.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")]
C, D = 12, 3  # timm's theta is then rescaled by 2, which loses no bit
YES_NO = (False, True)


class Peer:
    """The block of another library as its source code has it: its keys, and what it computes."""

    def __init__(self, dialect, pairwise, dim, pooled, normed, channels=(C, D)):
        self.dialect, self.pairwise, self.pooled, self.normed = dialect, pairwise, pooled, normed
        modules = LAYOUTS[dialect].format(p=".0" * pooled, n=".0" * normed).split()
        self.modules = dict(zip(("theta", "phi", "g", "conv_out", "norm"), modules))
        self.state = {}
        c, d = channels
        shapes = {"theta": (d, c), "phi": (d, c), "g": (d, c), "conv_out": (c, d)}
        for name in list(shapes)[2 * (pairwise == "gaussian") :]:
            self.state[self.key(name, "weight")] = torch.randn(*shapes[name], *[1] * dim)
            if not (dialect == "mmcv" and name == "conv_out" and normed):
                self.state[self.key(name, "bias")] = torch.randn(shapes[name][0])
        if pairwise == "concatenation":
            self.state[W_F[dialect]] = torch.randn(1, 2 * d, 1, 1)
        if normed:
            self.state |= {self.key("norm", name): torch.rand(c) + 0.5 for name in NORM}
            if dialect != "caffe2":
                self.state[self.key("norm", "num_batches_tracked")] = torch.tensor(7)

    def key(self, name, parameter):
        if self.dialect != "caffe2":
            return f"{self.modules[name]}.{parameter}"
        return f"{self.modules[name]}_{NORM[parameter] if name == 'norm' else parameter[0]}"

    def __call__(self, x):
        weights = {f"{name}.bias": torch.zeros(1) for name in self.modules}
        for name, parameter in itertools.product(self.modules, NORM):
            if self.key(name, parameter) in self.state:
                weights[f"{name}.{parameter}"] = self.state[self.key(name, parameter)]
        if self.pairwise == "concatenation":
            weights["concat_project.weight"] = self.state[W_F[self.dialect]]
        if self.dialect == "timm":
            weights |= {f"theta.{n}": weights[f"theta.{n}"] * C**-0.5 for n in ("weight", "bias")}
        return oracles.plain_block(
            x,
            weights,
            self.pairwise,
            scale=self.dialect not in ("timm", "alexhex7", "tsm"),
            subsample=1 + self.pooled,
            subsample_position="after_conv" if self.dialect in AFTER_CONV else "before_conv",
            norm="BN" if self.normed else "",
        )


def cases():
    for dialect, pairwise in itertools.product(W_F, PAIRWISE):
        for dim, pooled, normed in itertools.product((1, 2, 3), YES_NO, YES_NO):
            if dim == 2 or pairwise == "concatenation":
                yield dialect, pairwise, dim, pooled, normed
    for pairwise, pooled in itertools.product(("embedded_gaussian", "dot_product"), YES_NO):
        for normed in YES_NO:
            yield "pytorchvideo", pairwise, 3, pooled, normed
        yield "slowfast", pairwise, 3, pooled, True
        for dim, normed in itertools.product((2, 3), YES_NO):
            yield "caffe2", pairwise, dim, pooled, normed
    yield "timm", "embedded_gaussian", 2, False, True
    yield "tsm", "embedded_gaussian", 3, True, True


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_map(dim):
    return torch.randn(1, C, *(2, 5, 4)[3 - dim :])


def random_block(**options):
    block = NonLocalBlock(C, **{"reduction": 4, **options})
    for name, value in block.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
    return block.eval()


def given(**options):
    return lambda block: options


def in_ours(peer, x, dim=None, **options):
    """The conversion of a peer's weights, and the output of our block, which needs all of them."""
    result = convert(peer.state, peer.dialect, "nl_detectron", given(**options), dim)
    block = NonLocalBlock(C, **result.blocks[""].options)
    block.load_state_dict(result.state)
    return result, block.eval()(x)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: "-".join(map(str, case)))
class TestBlock:
    def test_computes_the_same_in_ours(self, case):
        _, pairwise, dim, pooled, _ = case
        peer, x = Peer(*case), random_map(dim)
        _, z = in_ours(peer, x, pairwise=pairwise, subsample=1 + pooled)
        assert_close(z, peer(x))

    def test_same_bits_after_the_way_back(self, case):
        dialect, _, _, pooled, _ = case
        state = Peer(*case).state
        ours = convert(state, dialect, "nl_detectron")
        back = convert(ours.state, "nl_detectron", dialect, given(subsample=1 + pooled))
        assert_close(back.state, state, rtol=0, atol=0)
        assert set(ours.mapped) == set(state)

    def test_computes_the_same_from_ours(self, case):
        dialect, pairwise, dim, pooled, normed = case
        options = {
            "subsample": 1 + pooled,
            "subsample_position": "after_conv" if dialect in AFTER_CONV else "before_conv",
            "pairwise": pairwise,
            "scale": True,
            "dim": dim,
            "norm": "BN" if normed else "",
            "reduction": 4,
        }
        block, peer, x = random_block(**options), Peer(*case), random_map(dim)
        result = convert(block.state_dict(), "nl_detectron", dialect, given(**options))
        assert result.state.keys() == peer.state.keys()
        peer.state = result.state
        assert_close(peer(x), block(x))


class TestNames:
    @pytest.mark.parametrize(
        ("dialect", "prefix", "ours"),
        [
            ("mmcv", "backbone.layer3.4.non_local_block.", "res4.non_local4"),
            ("slowfast", "s3.pathway0_nonlocal1.", "res3.non_local1"),
            ("caffe2", "nonlocal_conv4_13_", "res4.non_local13"),
            ("timm", "nl.", "nl"),
            ("alexhex7", "module.nl_1.", "nl_1"),
            ("pytorchvideo", "blocks.3.", "blocks.3"),
        ],
    )
    def test_of_a_block_in_a_network(self, dialect, prefix, ours):
        peer = Peer(dialect, "embedded_gaussian", 2 if dialect == "timm" else 3, False, True)
        state = {prefix + key: value for key, value in peer.state.items()}
        mapped = convert(state, dialect, "nl_detectron").mapped
        for name, parameter in (("theta", "weight"), ("g", "bias"), ("norm", "running_var")):
            assert mapped[prefix + peer.key(name, parameter)] == f"{ours}.{name}.{parameter}"

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ("backbone.bottom_up.res4.non_local4", "backbone.layer3.4.non_local_block"),
            ("backbone.res2.non_local0", "backbone.layer1.0.non_local_block"),
            ("roi_heads.keypoint_head.non_local2", "roi_heads.keypoint_head.non_local2"),
        ],
    )
    def test_of_a_block_in_a_detector(self, ours, theirs):
        """The prefix of the detector's backbone goes; a block elsewhere keeps its name."""
        state = {f"{ours}.{key}": v for key, v in NonLocalBlock(C).state_dict().items()}
        mapped = convert(state, "nl_detectron", "mmcv", given(subsample=1)).mapped
        assert mapped[f"{ours}.g.bias"] == f"{theirs}.g.conv.bias"

    def test_that_only_end_like_a_block(self):
        peer = Peer("timm", "embedded_gaussian", 2, False, True)
        state = {f"big{key}": value for key, value in peer.state.items()}
        with pytest.raises(ValueError, match="13 keys: bigt.weight, bigt.bias"):
            convert(state, "timm", "nl_detectron")


class TestChanges:
    """What may change without changing the output."""

    def test_from_one_library_to_another(self):
        """The names of video-nonlocal-net are those that SlowFast's own converter reads."""
        case = "embedded_gaussian", 3, True, True
        caffe2, slowfast, x = Peer("caffe2", *case), Peer("slowfast", *case), random_map(3)
        state = {f"nonlocal_conv3_1_{key}": value for key, value in caffe2.state.items()}
        result = convert(state, "caffe2", "slowfast")
        prefix = "s3.pathway0_nonlocal1."
        assert result.mapped["nonlocal_conv3_1_theta_w"] == f"{prefix}conv_theta.weight"
        slowfast.state = {key.removeprefix(prefix): v for key, v in result.state.items()}
        assert_close(slowfast(x), caffe2(x))

    def test_theta_for_timm_to_one_unit_in_the_last_place(self):
        """C / D = 8, as in timm by default: theta is multiplied by a number that is not exact."""
        torch.set_default_dtype(torch.float32)
        state = Peer("timm", "embedded_gaussian", 2, False, True, channels=(32, 4)).state
        ours = convert(state, "timm", "nl_detectron").state
        back = convert(ours, "nl_detectron", "timm", given(pairwise="embedded_gaussian")).state
        for key, value in state.items():
            assert_close(back[key], value, rtol=2**-23 if key.startswith("t.") else 0, atol=0)

    def test_same_bits_through_an_added_norm(self):
        """What is added on the way out, an identity, is folded away on the way back."""
        torch.set_default_dtype(torch.float32)
        state = random_block().state_dict()
        theirs = convert(state, "nl_detectron", "slowfast", given(scale=True, subsample=1))
        assert len(theirs.added) == 4
        back = convert(theirs.state, "slowfast", "nl_detectron", given(norm=""), dim=2)
        assert_close(back.state, dict(state), rtol=0, atol=0)

    @pytest.mark.parametrize("pairwise", PAIRWISE)
    def test_norm_is_folded(self, pairwise):
        peer, x = Peer("mmcv", pairwise, 2, True, True), random_map(2)
        result, z = in_ours(peer, x, pairwise=pairwise, norm="")
        assert "norm.weight" not in result.state
        assert result.dropped["conv_out.bn.running_var"] == "folded into conv_out"
        assert_close(z, peer(x))

    def test_norm_that_only_scales_is_folded(self):
        """video-nonlocal-net after its own folding: scale and bias, no statistics."""
        peer, x = Peer("caffe2", "embedded_gaussian", 3, True, True), random_map(3)
        peer.state |= {"bn_rm": torch.zeros(C), "bn_riv": torch.ones(C) - 1e-5}
        expected = peer(x)
        del peer.state["bn_rm"], peer.state["bn_riv"]
        assert_close(in_ours(peer, x, pairwise="embedded_gaussian", subsample=2)[1], expected)

    @pytest.mark.parametrize(
        ("dialect", "normed", "scale"),
        [("timm", True, True), ("slowfast", True, True), ("pytorchvideo", False, False)],
        ids=["norm is added", "norm is added in 3-D", "scale goes into theta"],
    )
    def test_what_the_target_needs(self, dialect, normed, scale):
        dim = 2 if dialect == "timm" else 3
        block, x = random_block(dim=dim, scale=scale), random_map(dim)
        known = given(pairwise="embedded_gaussian", subsample=1, scale=scale)
        result = convert(block.state_dict(), "nl_detectron", dialect, known)
        assert len(result.added) == 4 * normed
        peer = Peer(dialect, "embedded_gaussian", dim, False, normed)
        peer.state = result.state
        assert_close(peer(x), block(x))

    @pytest.mark.parametrize("pairwise", PAIRWISE)
    def test_scale_goes_into_theta_only_where_it_matters(self, pairwise):
        peer, x = Peer("alexhex7", pairwise, 2, False, False), random_map(2)
        assert_close(in_ours(peer, x, scale=True, pairwise=pairwise)[1], peer(x))

    def test_video_block_on_a_single_frame(self):
        peer, x = Peer("slowfast", "embedded_gaussian", 3, True, True), random_map(2)
        _, z = in_ours(peer, x, dim=2, pairwise="embedded_gaussian", subsample=2)
        assert_close(z, peer(x.unsqueeze(2)).squeeze(2))

    def test_missing_biases_are_zero(self):
        peer, x = Peer("caffe2", "dot_product", 3, False, False), random_map(3)
        peer.state = {k: v for k, v in peer.state.items() if not k.endswith("_b")}
        result, z = in_ours(peer, x, pairwise="dot_product", subsample=1)
        assert set(result.added) == {f"{n}.bias" for n in ("theta", "phi", "g", "conv_out")}
        assert_close(z, peer(x))

    def test_what_is_assumed(self):
        def assumed(dim, **options):
            state = NonLocalBlock(C, dim=dim).state_dict()
            result = convert(state, "nl_detectron", "pytorchvideo", given(**options))
            return result.blocks[""].assumed

        assert assumed(3) == {
            "subsample_position": "before_conv",
            "scale": True,
            "axes": "spacetime",
            "group_frames": 0,
        }
        assert not {"axes", "group_frames"} & set(assumed(2))
        known = {"pairwise": "dot_product", "axes": "spacetime", "group_frames": 0}
        assert assumed(3, subsample=1, **known) == {}


class TestErrors:
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
                "subsample_position is 'before_conv'; 'after_conv' would change",
            ),
            ({}, "timm", {"subsample": 2}, "subsample is 2; 1 would change"),
            ({}, "timm", {"pairwise": "dot_product"}, "pairwise must be one of"),
            ({"pairwise": "gaussian"}, "slowfast", {}, "pairwise must be .*, got 'gaussian'"),
            ({"pairwise": "concatenation"}, "caffe2", {}, "got 'concatenation'"),
            ({"pairwise": "concatenation"}, "caffe2", {"pairwise": "gaussian"}, "is 'concatenati"),
            ({"in_channels": 32, "norm": "GN"}, "slowfast", {}, "norm is 'GN'; 'BN' would"),
            ({"in_channels": 32, "norm": "GN"}, "pytorchvideo", {}, "norm is 'GN'; 'BN' would"),
            ({"dim": 3}, "pytorchvideo", {"axes": "time"}, "axes is 'time'; 'spacetime' would"),
            ({"dim": 3}, "mmcv", {"dim": 2, "axes": "time"}, "axes is 'time'; 'spacetime' would"),
            ({"dim": 3}, "slowfast", {"group_frames": 4}, "group_frames is 4; 0 would change"),
            ({}, "mmcv", {"pairwise": "gaussian"}, "with these weights, pairwise must be one of"),
            ({}, "pytorchvideo", {"scale": False}, "give pairwise in options, as --block"),
            ({}, "pytorchvideo", {"reduction": 4}, "reduction is 2; 4 would change"),
            ({}, "pytorchvideo", {"subsampel": 2}, "got 'subsampel'"),
            ({}, "mmdet", {}, "dialect must be one of"),
            ({}, "torchvision", {}, "nothing to convert .* in 8 keys: nl.theta.weight"),
        ],
    )
    def test_of_ours(self, made_with, target, options, message):
        block = NonLocalBlock(**{"in_channels": C, **made_with})
        state = {f"nl.{key}": value for key, value in block.state_dict().items()}
        with pytest.raises(ValueError, match=message) as error:
            convert(state, "nl_detectron", target, given(**options))
        assert "'nl'" in str(error.value) or target in ("mmdet", "torchvision")

    @pytest.mark.parametrize(
        ("dialect", "change", "message"),
        [
            ("mmcv", {"phi.conv.weight": None}, "one of theta and phi is missing"),
            ("mmcv", {"phi.conv.alpha": torch.ones(1)}, "unexpected .*1 key: phi.conv.alpha"),
            ("mmcv", {"theta.conv.weight": torch.ones(D, C, 3, 3)}, "theta.weight of shape"),
            ("mmcv", {"g.conv.weight": torch.ones(8, C, 1, 1)}, "cannot map 12 to 8"),
            ("mmcv", {"g.conv.weight": torch.ones(24, C, 1, 1)}, "cannot map 12 to 24"),
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
