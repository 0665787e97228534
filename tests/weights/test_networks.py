"""Whole checkpoints between dialects: every key accounted for, and the same network after it."""

from __future__ import annotations

import sys
from fnmatch import fnmatch

import pytest
import torch
import torchvision
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import ResNet, build_model, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicStem
from torch.testing import assert_close

from nl_detectron import NonLocalBlock, insert_non_local_blocks
from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.weights import DIALECTS, convert, load, save
from nl_detectron_cli import convert_weights
from tests.running import QUICK

NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"


def randomized(model):
    """The model with norms that are not the identity, and with blocks that are not."""
    for name, value in model.state_dict().items():
        if "norm" in name or "bn" in name or "downsample.1" in name:
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
        if "conv_out" in name:
            value.normal_()
    return model.eval()


def resnet(depth, num_classes=None, **kwargs):
    """detectron2's classifier."""
    options = {"norm": "BN", **kwargs}
    if depth > 34:
        options["stride_in_1x1"] = False
    stem = BasicStem(norm="BN")
    return ResNet(stem, ResNet.make_default_stages(depth, **options), num_classes).eval()


def assert_accounted(state, result):
    assert set(result.mapped) | set(result.dropped) == set(state)
    assert not set(result.mapped) & set(result.dropped)
    assert set(result.mapped.values()) | set(result.added) == set(result.state)
    assert not set(result.mapped.values()) & set(result.added)


def assert_same_bits(state, other):
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


class TestResNet:
    @pytest.mark.parametrize(
        ("dialect", "depth"), [("torchvision", 18), ("torchvision", 50), ("timm", 18)]
    )
    def test_same_logits(self, dialect, depth):
        theirs = randomized(getattr(torchvision.models, f"resnet{depth}")(num_classes=7))
        result = convert(theirs.state_dict(), dialect, "detectron2")
        assert_accounted(theirs.state_dict(), result)
        assert not result.dropped
        ours = resnet(depth, 7)
        ours.load_state_dict(result.state)
        x = torch.rand(2, 3, 64, 96)
        assert_close(ours(x)["linear"], theirs(x), rtol=1e-5, atol=1e-5)
        back = convert(result.state, "detectron2", dialect)
        assert_same_bits(theirs.state_dict(), back.state)

    def test_resnext(self, cfg):
        theirs = torchvision.models.resnext50_32x4d().state_dict()
        cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32, 4
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        ours = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        result = convert(theirs, "torchvision", "detectron2")
        missing, unexpected = ours.load_state_dict(result.state, strict=False)
        assert not missing
        assert all("num_batches" in key or key.startswith("linear.") for key in unexpected)

    def test_many_keys_are_listed_by_pattern(self):
        state = torchvision.models.resnet18().state_dict()
        with pytest.raises(ValueError, match="122 keys: ") as error:
            convert(state, "caffe2", "detectron2")
        patterns = str(error.value).split("122 keys: ")[1].split(", ")
        assert "layer*.*.conv*.*" in patterns
        assert all(any(fnmatch(key, pattern) for pattern in patterns) for key in state)

    def test_two_for_one_place(self):
        state = {
            "res2.0.conv1.weight": torch.ones(1),
            "backbone.res2.0.conv1.weight": torch.ones(1),
        }
        with pytest.raises(ValueError, match="two keys would become 'layer1.0.conv1.weight'"):
            convert(state, "detectron2", "torchvision")

    def test_in_parallel(self):
        state = torchvision.models.resnet18().state_dict()
        wrapped = {f"module.{key}": value for key, value in state.items()}
        result = convert(wrapped, "torchvision", "detectron2")
        assert_accounted(wrapped, result)
        assert_same_bits(result.state, convert(state, "torchvision", "detectron2").state)

    def test_other_stem_is_refused(self):
        state = torchvision.models.resnet18().state_dict()
        state["conv1.0.weight"] = state.pop("conv1.weight")
        state["layer1.0.se.fc.weight"] = torch.ones(3)
        with pytest.raises(
            ValueError, match=r"2 keys: conv1\.0\.weight, layer1\.0\.se\.fc\.weight"
        ):
            convert(state, "timm", "detectron2")

    def test_block_inside_a_residual_block_is_refused(self):
        """timm's attn_layer sits before the sum; no block of ours does."""
        state = torchvision.models.resnet18().state_dict()
        for name, shape in {"t": (8, 64), "p": (8, 64), "g": (8, 64), "z": (64, 8)}.items():
            state[f"layer1.0.se.{name}.weight"] = torch.ones(*shape, 1, 1)
        with pytest.raises(ValueError, match=r"1 keys: layer1\.0\.se"):
            convert(state, "timm", "nl_detectron")


def as_caffe2(state):
    """A classifier's weights under video-nonlocal-net's names, with kernels over one frame."""
    convs = ["conv1", *(f"res{s}_0_branch1" for s in (2, 3, 4, 5))]
    for s, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        convs += [f"res{s}_{i}_branch2{part}" for i in range(blocks) for part in "abc"]
    names = ["pred_w", "pred_b", *(f"{conv}_w" for conv in convs)]
    for conv in convs:
        norm = "res_conv1_bn" if conv == "conv1" else f"{conv}_bn"
        names += [f"{norm}_{parameter}" for parameter in ("s", "b", "rm", "riv")]
    ours = dict(zip(names, convert_basic_c2_names(names)))  # by detectron2's own heuristics
    for place, new_place in (("conv3_1", "res3.non_local1"), ("conv4_4", "res4.non_local4")):
        for name, new in {"theta": "theta", "phi": "phi", "g": "g", "out": "conv_out"}.items():
            ours[f"nonlocal_{place}_{name}_w"] = f"{new_place}.{new}.weight"
            ours[f"nonlocal_{place}_{name}_b"] = f"{new_place}.{new}.bias"
        for name, new in NORM.items():
            ours[f"nonlocal_{place}_bn_{name}"] = f"{new_place}.norm.{new}"
    blobs = {name: state[new] for name, new in ours.items() if new in state}
    return {k: (v.unsqueeze(2) if v.dim() == 4 else v).numpy() for k, v in blobs.items()}


class TestCaffe2:
    @pytest.fixture
    def network(self):
        model = resnet(50, 7)
        insert_non_local_blocks(model, {"res3": [1], "res4": [-2]}, norm="BN", subsample=2)
        return randomized(model)

    def test_video_network_on_images(self, network):
        """Kernels over one frame are 2-D; riv is the variance; the optimiser's blobs go."""
        blobs = as_caffe2(network.state_dict())
        blobs |= {"conv1_w_momentum": blobs["conv1_w"], "lr": blobs["pred_b"][0], "model_iter": 3}
        result = convert(blobs, "caffe2", "nl_detectron", dim=2)
        assert_accounted(blobs, result)
        assert set(result.dropped) == {"conv1_w_momentum", "lr", "model_iter"}
        expected = network.state_dict()
        counters = {key for key in expected if key.endswith("num_batches_tracked")}
        assert_same_bits(
            {key: value for key, value in expected.items() if key not in counters}, result.state
        )

    def test_back_into_video(self, network):
        """Only the counters of batch norm are lost."""
        blobs = as_caffe2(network.state_dict())
        back = convert(network.state_dict(), "nl_detectron", "caffe2", dim=3)
        assert_accounted(network.state_dict(), back)
        assert all(key.endswith("num_batches_tracked") for key in back.dropped)
        assert_same_bits({k: torch.from_numpy(v) for k, v in blobs.items()}, back.state)

    def test_norms_that_only_scale(self, network):
        """Detectron's ImageNet models: FrozenBN needs statistics with which it is the same."""
        blobs = as_caffe2(network.state_dict())
        blobs = {k: v for k, v in blobs.items() if "nonlocal" not in k}
        blobs = {k: v for k, v in blobs.items() if not k.endswith(("_rm", "_riv"))}
        result = convert(blobs, "caffe2", "detectron2")
        assert_accounted(blobs, result)
        norm = FrozenBatchNorm2d(128)
        key = "res3.1.conv2.norm."
        norm.load_state_dict(
            {k.removeprefix(key): v for k, v in result.state.items() if k.startswith(key)}
        )
        s, b = (torch.from_numpy(blobs[f"res3_1_branch2b_bn_{n}"]).view(-1, 1, 1) for n in "sb")
        x = torch.randn(2, 128, 3, 3)
        assert_close(norm(x), x * s + b, rtol=1e-6, atol=1e-6)

    def test_kernel_over_frames_is_refused(self, network):
        blobs = as_caffe2(network.state_dict())
        blobs["res2_0_branch2a_w"] = torch.ones(64, 64, 3, 1, 1).numpy()
        with pytest.raises(ValueError, match=r"cannot be 2-D: 1 keys: res2.0.conv1.weight"):
            convert(blobs, "caffe2", "nl_detectron", dim=2)

    def test_detector_is_refused(self, network):
        blobs = as_caffe2(network.state_dict()) | {"rpn_cls_logits_fpn2_w": torch.ones(3).numpy()}
        with pytest.raises(ValueError, match="1 keys: rpn_cls_logits_fpn2_w"):
            convert(blobs, "caffe2", "nl_detectron")


class TestBlocksOfVideoNetworks:
    def test_the_rest_is_named_as_left_out(self):
        block = NonLocalBlock(8, norm="BN", dim=3).state_dict()
        place = "backbone.layer3.4.non_local_block."
        theirs = convert(block, "nl_detectron", "mmcv", lambda name: {"subsample": 2})
        state = {place + key: value for key, value in theirs.state.items()}
        state |= {"backbone.conv1.conv.weight": torch.ones(8, 3, 5, 7, 7), "epoch": 3}
        result = convert(state, "mmcv", "nl_detectron")
        assert_accounted(state, result)
        assert result.dropped.keys() == {"backbone.conv1.conv.weight", "epoch"}
        assert_same_bits({f"res4.non_local4.{k}": v for k, v in block.items()}, result.state)
        assert_same_bits(
            {k: v for k, v in state.items() if k.startswith(place)},
            convert(result.state, "nl_detectron", "mmcv", lambda name: {"subsample": 2}).state,
        )


class TestDetector:
    @pytest.fixture
    def models(self, small_cfg):
        stock = build_model(small_cfg)
        small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
        small_cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
        return stock, randomized(build_model(small_cfg))

    def test_blocks_are_stripped(self, models):
        stock, ours = models
        result = convert(ours.state_dict(), "nl_detectron", "detectron2")
        assert_accounted(ours.state_dict(), result)
        assert result.state.keys() == stock.state_dict().keys()
        assert len(result.dropped) == 8 * 5

    def test_backbone_for_torchvision(self, models):
        state = models[1].state_dict()
        result = convert(state, "nl_detectron", "torchvision")
        assert_accounted(state, result)
        assert result.mapped["backbone.bottom_up.res4.5.conv3.norm.bias"] == "layer3.5.bn3.bias"
        assert "roi_heads.box_predictor.cls_score.weight" in result.dropped
        assert all("conv_out" not in key for key in result.mapped)
        state["backbone.bottom_up.stem.conv2.weight"] = torch.ones(1)
        with pytest.raises(ValueError, match="nothing for 1 keys: .*conv2"):
            convert(state, "nl_detectron", "torchvision")

    @pytest.mark.parametrize("suffix", [".pth", ".pkl"])
    def test_file_is_loaded_into_a_detector(self, models, tmp_path, suffix):
        """detectron2 itself finds the place of a ResNet with blocks in a detector."""
        bottom_up = models[1].backbone.bottom_up
        theirs = {key: value.clone() for key, value in bottom_up.state_dict().items()}
        save(theirs, tmp_path / f"r50{suffix}", DIALECTS["nl_detectron"])
        for parameter in bottom_up.state_dict().values():
            parameter.zero_()
        StrictCheckpointer(models[1]).load(str(tmp_path / f"r50{suffix}"))
        assert_same_bits(theirs, bottom_up.state_dict())


class TestTool:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        def run(*arguments):
            monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
            convert_weights.main()
            return capsys.readouterr().out

        return run

    def test_offers_all_dialects(self):
        assert set(convert_weights.LIBRARIES) == set(DIALECTS)

    def test_torchvision(self, run, tmp_path):
        state = torchvision.models.resnet18().state_dict()
        torch.save(state, tmp_path / "in.pth")
        out = run(
            tmp_path / "in.pth", tmp_path / "out.pkl", "--from", "torchvision", "--to", "detectron2"
        )
        assert f"{len(state)} tensors converted" in out
        assert "INPUT.FORMAT RGB" in out
        assert "STRIDE_IN_1X1 False" in out
        back = tmp_path / "back.pth"
        run(tmp_path / "out.pkl", back, "--from", "detectron2", "--to", "torchvision")
        assert_same_bits(state, torch.load(back))

    def test_what_the_config_must_say(self, run, tmp_path):
        block = NonLocalBlock(8, norm="BN", dim=3).state_dict()
        place = "backbone.layer3.4.non_local_block."
        theirs = convert(block, "nl_detectron", "mmcv", lambda name: {"subsample": 2}).state
        theirs = {place + key: value for key, value in theirs.items()}
        torch.save({"state_dict": theirs, "meta": {"epoch": 3}}, tmp_path / "in.pth")
        out = run(
            tmp_path / "in.pth",
            tmp_path / "out.pth",
            "--from",
            "mmcv",
            "--to",
            "nl_detectron",
            "--dim",
            2,
            "--verbose",
        )
        assert f"{place}theta.conv.weight -> res4.non_local4.theta.weight" in out
        assert "1 left out: beside the weights in the file\n  meta\n" in out
        for line in ("SUBSAMPLE_POSITION after_conv", "NORM BN", "AFTER_BLOCKS.RES4 (4,)"):
            assert f"  {line}\n" in out
        for unknown in ("PAIRWISE", "SCALE"):
            assert f"  {unknown} as in the source: the weights do not tell\n" in out
        assert load(tmp_path / "out.pth")[0]["res4.non_local4.g.weight"].dim() == 4

    def test_names_the_option_that_is_missing(self, run, tmp_path):
        state = {f"res4.non_local4.{key}": v for key, v in NonLocalBlock(8).state_dict().items()}
        torch.save(state, tmp_path / "in.pth")
        command = [tmp_path / "in.pth", tmp_path / "out.pth", "--from", "nl_detectron"]
        with pytest.raises(SystemExit, match="non_local4.*do not tell; add --block subsample=2"):
            run(*command, "--to", "mmcv")
        assert "8 tensors converted" in run(*command, "--to", "mmcv", "--block", "subsample=2")

    def test_config_adds_its_blocks(self, run, cfg, tmp_path):
        cfg.merge_from_file(str(CONFIG))
        ours = build_model(cfg).state_dict()
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        stock = build_model(cfg).state_dict()
        torch.save({"model": stock, "iteration": 7}, tmp_path / "stock.pth")
        run(
            tmp_path / "stock.pth",
            tmp_path / "out.pth",
            "--from",
            "detectron2",
            "--to",
            "nl_detectron",
            "--config-file",
            CONFIG,
        )
        added = load(tmp_path / "out.pth")[0]
        assert added.keys() == ours.keys()
        assert not added["backbone.bottom_up.res4.non_local0.conv_out.weight"].any()
        run(
            tmp_path / "out.pth",
            tmp_path / "back.pth",
            "--from",
            "nl_detectron",
            "--to",
            "detectron2",
        )
        assert_same_bits(stock, load(tmp_path / "back.pth")[0])

    @pytest.mark.parametrize("kind", ["mask_rcnn_R_18_NL_FPN", "keypoint_rcnn_R_18_NL_FPN_NLhead"])
    def test_config_tells_what_its_blocks_compute(self, kind, run, cfg, tmp_path):
        config = QUICK / f"{kind}_overfit.yaml"
        cfg.merge_from_file(str(config))
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "in.pth")
        command = [tmp_path / "in.pth", tmp_path / "out.pth", "--from", "nl_detectron", "--to"]
        out = run(*command, "nl_detectron", "--config-file", config)
        assert "  PAIRWISE embedded_gaussian\n" in out
        assert "do not tell" not in out
        assert_same_bits(load(tmp_path / "in.pth")[0], load(tmp_path / "out.pth")[0])

    def test_block_that_the_config_lacks(self, run, tmp_path):
        block = NonLocalBlock(8, norm="BN").state_dict()
        torch.save({f"res5.non_local1.{k}": v for k, v in block.items()}, tmp_path / "in.pth")
        with pytest.raises(
            SystemExit, match=r"'res5.non_local1'.*no such block; it has .*res4"
        ) as e:
            run(
                tmp_path / "in.pth",
                tmp_path / "out.pth",
                "--from",
                "nl_detectron",
                "--to",
                "mmcv",
                "--config-file",
                CONFIG,
            )
        assert e.value.code != 0
        assert not (tmp_path / "out.pth").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [(None, "x.yaml' does not exist"), ("MODEL: {DEPHT: 50}", "MODEL.DEPHT")],
    )
    def test_bad_config(self, text, message, run, tmp_path):
        if text:
            (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(SystemExit, match=message):
            run(
                "in.pth",
                "out.pth",
                "--from",
                "mmcv",
                "--to",
                "mmcv",
                "--config-file",
                tmp_path / "x.yaml",
            )

    def test_missing_file(self, run, tmp_path):
        with pytest.raises(SystemExit, match="no checkpoint at"):
            run(tmp_path / "in.pth", tmp_path / "out.pth", "--from", "mmcv", "--to", "nl_detectron")
