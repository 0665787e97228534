"""Whole checkpoints between dialects: every key accounted for, and the same network after it."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest
import torch
import torchvision
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import ResNet, build_model
from detectron2.modeling.backbone.resnet import BasicStem
from torch.testing import assert_close

from nl_detectron import NonLocalBlock, insert_non_local_blocks
from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.weights import DIALECTS, convert, load, save
from nl_detectron_cli import convert as convert_command
from tests.running import QUICK

NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
MMCV_BLOCK = "backbone.layer3.4.non_local_block."


def randomized(model):
    """The model with norms that are not the identity, and with blocks that are not."""
    for name, value in model.state_dict().items():
        if "norm" in name or "bn" in name or "downsample.1" in name:
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
        if "conv_out" in name:
            value.normal_()
    return model.eval()


def resnet(depth, num_classes):
    """detectron2's classifier."""
    options = {"stride_in_1x1": False} if depth > 34 else {}
    stages = ResNet.make_default_stages(depth, norm="BN", **options)
    return ResNet(BasicStem(norm="BN"), stages, num_classes).eval()


def mmcv_network():
    """The state dict of a 3-D block, and that of a network of mmaction2 with it."""
    block = NonLocalBlock(8, norm="BN", dim=3).state_dict()
    theirs = convert(block, "nl_detectron", "mmcv", lambda name: {"subsample": 2})
    return block, {MMCV_BLOCK + key: value for key, value in theirs.state.items()}


def assert_accounted(state, result):
    assert set(result.mapped) | set(result.dropped) == set(state)
    assert not set(result.mapped) & set(result.dropped)
    assert set(result.mapped.values()) | set(result.added) == set(result.state)
    assert not set(result.mapped.values()) & set(result.added)


def assert_same_bits(state, other):
    assert_close(dict(other), dict(state), rtol=0, atol=0)


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

    def test_many_keys_are_listed_by_pattern(self):
        state = torchvision.models.resnet18().state_dict()
        with pytest.raises(ValueError, match="122 keys: ") as error:
            convert(state, "caffe2", "detectron2")
        patterns = str(error.value).split("122 keys: ")[1].split(", ")
        assert "layer*.*.conv*.*" in patterns
        assert all(any(fnmatch(key, pattern) for pattern in patterns) for key in state)

    def test_two_keys_that_become_one(self):
        state = dict.fromkeys(
            ["res2.0.conv1.weight", "backbone.res2.0.conv1.weight"], torch.ones(1)
        )
        with pytest.raises(ValueError, match="two keys would both become 'layer1.0.conv1.weight'"):
            convert(state, "detectron2", "torchvision")

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (
                {"conv1.0.weight": [1], "layer1.0.se.fc.weight": [3]},
                r"2 keys: conv1\.0\.weight, layer1\.0\.se\.fc\.weight",
            ),
            # timm's attn_layer sits before the sum, where no block of ours does.
            (
                {
                    **{f"layer1.0.se.{name}.weight": [8, 64, 1, 1] for name in "tpg"},
                    "layer1.0.se.z.weight": [64, 8, 1, 1],
                },
                r"1 key: layer1\.0\.se; .*--blocks-only",
            ),
        ],
        ids=["another stem", "a block inside a residual block"],
    )
    def test_parts_that_detectron2_lacks(self, shapes, message):
        state = torchvision.models.resnet18().state_dict()
        state |= {key: torch.ones(shape) for key, shape in shapes.items()}
        with pytest.raises(ValueError, match=message):
            convert(state, "timm", "nl_detectron")


class TestCaffe2:
    @pytest.fixture
    def network(self):
        model = resnet(50, 7)
        insert_non_local_blocks(model, {"res3": [1], "res4": [-2]}, norm="BN", subsample=2)
        return randomized(model).state_dict()

    @pytest.fixture
    def blobs(self, network):
        """The network under the names of video-nonlocal-net, with kernels over one frame."""
        convs = ["conv1", *(f"res{s}_0_branch1" for s in (2, 3, 4, 5))]
        for s, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
            convs += [f"res{s}_{i}_branch2{part}" for i in range(blocks) for part in "abc"]
        names = ["pred_w", "pred_b", *(f"{conv}_w" for conv in convs)]
        for conv in convs:
            norm = "res_conv1_bn" if conv == "conv1" else f"{conv}_bn"
            names += [f"{norm}_{parameter}" for parameter in NORM]
        ours = dict(zip(names, convert_basic_c2_names(names)))  # by detectron2's own heuristics
        for theirs, block in (("conv3_1", "res3.non_local1"), ("conv4_4", "res4.non_local4")):
            for name, new in {"theta": "theta", "phi": "phi", "g": "g", "out": "conv_out"}.items():
                ours[f"nonlocal_{theirs}_{name}_w"] = f"{block}.{new}.weight"
                ours[f"nonlocal_{theirs}_{name}_b"] = f"{block}.{new}.bias"
            for name, new in NORM.items():
                ours[f"nonlocal_{theirs}_bn_{name}"] = f"{block}.norm.{new}"
        blobs = {name: network[new] for name, new in ours.items() if new in network}
        return {k: (v.unsqueeze(2) if v.dim() == 4 else v).numpy() for k, v in blobs.items()}

    def test_video_network_on_images(self, network, blobs):
        """Kernels over one frame are 2-D; riv is the variance; the optimizer's blobs go."""
        blobs |= {"conv1_w_momentum": blobs["conv1_w"], "lr": blobs["pred_b"][0], "model_iter": 3}
        result = convert(blobs, "caffe2", "nl_detectron", dim=2)
        assert_accounted(blobs, result)
        assert set(result.dropped) == {"conv1_w_momentum", "lr", "model_iter"}
        counted = {k: v for k, v in network.items() if not k.endswith("num_batches_tracked")}
        assert_same_bits(counted, result.state)

    def test_back_into_video(self, network, blobs):
        """Only the counters of batch norm are lost."""
        back = convert(network, "nl_detectron", "caffe2", dim=3)
        assert_accounted(network, back)
        assert all(key.endswith("num_batches_tracked") for key in back.dropped)
        assert_same_bits({k: torch.from_numpy(v) for k, v in blobs.items()}, back.state)

    def test_norms_that_only_scale(self, blobs):
        """Detectron's ImageNet models: FrozenBN needs statistics with which it is the same."""
        blobs = {
            k: v for k, v in blobs.items() if not ("nonlocal" in k or k.endswith(("_rm", "_riv")))
        }
        result = convert(blobs, "caffe2", "detectron2")
        assert_accounted(blobs, result)
        assert result.state["stem.conv1.weight"].dim() == 4
        norm, key = FrozenBatchNorm2d(128), "res3.1.conv2.norm."
        norm.load_state_dict(
            {k.removeprefix(key): v for k, v in result.state.items() if k.startswith(key)}
        )
        s, b = (torch.from_numpy(blobs[f"res3_1_branch2b_bn_{n}"]).view(-1, 1, 1) for n in "sb")
        x = torch.randn(2, 128, 3, 3)
        assert_close(norm(x), x * s + b, rtol=1e-6, atol=1e-6)

    def test_blocks_alone_go_to_slowfast(self, blobs):
        for key in [k for k in blobs if k.endswith(("_rm", "_riv")) and "nonlocal" not in k]:
            del blobs[key]
        result = convert(blobs, "caffe2", "slowfast", blocks_only=True)
        assert_accounted(blobs, result)
        assert set(result.mapped) == {key for key in blobs if "nonlocal" in key}

    @pytest.mark.parametrize(
        ("blob", "shape", "message"),
        [
            ("res2_0_branch2a_w", (64, 64, 3, 1, 1), "cannot be 2-D: 1 key: res2.0.conv1.weight"),
            ("rpn_cls_logits_fpn2_w", (3,), "1 key: rpn_cls_logits_fpn2_w"),
        ],
        ids=["kernel over frames", "detector"],
    )
    def test_error_names_the_key(self, blobs, blob, shape, message):
        blobs[blob] = torch.ones(shape).numpy()
        with pytest.raises(ValueError, match=message):
            convert(blobs, "caffe2", "nl_detectron", dim=2)


def test_only_blocks_are_taken_from_a_network():
    block, theirs = mmcv_network()
    state = theirs | {"backbone.conv1.conv.weight": torch.ones(8, 3, 5, 7, 7), "epoch": 3}
    with pytest.raises(ValueError, match=r"lacks backbone\.layer1\.0\.conv2.*--blocks-only"):
        convert(state, "mmcv", "nl_detectron")
    result = convert(state, "mmcv", "nl_detectron", blocks_only=True)
    assert_accounted(state, result)
    assert result.dropped.keys() == {"backbone.conv1.conv.weight", "epoch"}
    assert_same_bits({f"res4.non_local4.{k}": v for k, v in block.items()}, result.state)
    back = convert(result.state, "nl_detectron", "mmcv", lambda name: {"subsample": 2})
    assert_same_bits(theirs, back.state)


class TestDetector:
    @pytest.fixture
    def models(self, small_cfg):
        stock = build_model(small_cfg)
        small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
        small_cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
        return stock, randomized(build_model(small_cfg))

    def test_blocks_are_removed_for_detectron2(self, models):
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
        with pytest.raises(ValueError, match="no counterpart for 1 key: .*conv2"):
            convert(state, "nl_detectron", "torchvision")

    @pytest.mark.parametrize("suffix", [".pth", ".pkl"])
    def test_backbone_file_is_loaded_into_a_detector(self, models, tmp_path, suffix):
        """By detectron2's own matching of names, with blocks in the ResNet."""
        bottom_up = models[1].backbone.bottom_up
        theirs = {key: value.clone() for key, value in bottom_up.state_dict().items()}
        save(theirs, tmp_path / f"r50{suffix}", DIALECTS["nl_detectron"])
        for parameter in bottom_up.state_dict().values():
            parameter.zero_()
        checkpointer = StrictCheckpointer(models[1], backbone_prefix="backbone.bottom_up.")
        checkpointer.load(str(tmp_path / f"r50{suffix}"))
        assert_same_bits(theirs, bottom_up.state_dict())


class TestTool:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch, capsys):
        """Convert one file of the current folder into another; returns what is printed."""
        monkeypatch.chdir(tmp_path)

        def run(source, target, *options, files=("in.pth", "out.pth")):
            convert_command.main([*files, "--from", source, "--to", target, *map(str, options)])
            return capsys.readouterr().out

        return run

    def test_offers_all_dialects(self):
        assert set(convert_command.LIBRARIES) == set(DIALECTS)

    def test_torchvision(self, run):
        state = torchvision.models.resnet18().state_dict()
        torch.save(state, "in.pth")
        out = run("torchvision", "detectron2", files=("in.pth", "out.pkl"))
        assert f"{len(state)} tensors converted" in out
        assert "INPUT.FORMAT RGB" in out
        assert "STRIDE_IN_1X1 False" in out
        run("detectron2", "torchvision", files=("out.pkl", "back.pth"))
        assert_same_bits(state, torch.load("back.pth"))
        run("torchvision", "nl_detectron", "--config-file", CONFIG)
        assert not load("out.pth")[0]["res4.non_local0.conv_out.weight"].any()

    def test_says_what_is_assumed_of_a_block(self, run):
        torch.save(NonLocalBlock(8, norm="BN").state_dict(), "in.pth")
        out = run("nl_detectron", "timm")
        assert "  SCALE True (assumed; please check)\n" in out
        assert "  to keep the output the same, theta is multiplied by 1.41421 (" in out
        assert "STRIDE_IN_1X1" not in out  # there is no ResNet

    def test_prints_what_the_config_must_set(self, run):
        state = mmcv_network()[1] | {"neck.weight": torch.ones(1)}
        torch.save({"state_dict": state, "meta": {"epoch": 3}}, "in.pth")
        out = run("mmcv", "nl_detectron", "--dim", 2, "--verbose", "--blocks-only")
        assert "only blocks are converted\n  neck.weight\n" in out
        assert f"{MMCV_BLOCK}theta.conv.weight -> res4.non_local4.theta.weight" in out
        assert "1 left out: not part of the state dict\n  meta\n" in out
        for line in ("SUBSAMPLE_POSITION after_conv", "NORM BN", "AFTER_BLOCKS.RES4 (4,)"):
            assert f"  {line}\n" in out
        for unknown in ("PAIRWISE", "SCALE"):
            assert f"  {unknown} as in the source: the weights do not show it\n" in out
        assert load("out.pth")[0]["res4.non_local4.g.weight"].dim() == 4
        assert "DIM" not in out
        out = run("mmcv", "nl_detectron", "--blocks-only")
        assert "  DIM 3\n" in out
        assert "  AXES spacetime\n" in out
        assert "for a detector on images, convert with --dim 2" in out

    def test_config_adds_its_blocks(self, run, cfg):
        cfg.merge_from_file(str(CONFIG))
        ours = build_model(cfg).state_dict()
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        stock = build_model(cfg).state_dict()
        torch.save({"model": stock, "iteration": 7}, "in.pth")
        out = run("detectron2", "nl_detectron", "--config-file", CONFIG)
        assert re.search(r"\n8 added: of a new block\n  [^,]+(, [^,]+){3}, \.\.\.\n", out)
        added = load("out.pth")[0]
        assert added.keys() == ours.keys()
        assert not added["backbone.bottom_up.res4.non_local0.conv_out.weight"].any()
        run("nl_detectron", "detectron2", files=("out.pth", "back.pth"))
        assert_same_bits(stock, load("back.pth")[0])

    @pytest.mark.parametrize(
        ("kind", "subsample"),
        [("mask_rcnn_R_18_NL_FPN", {"2"}), ("keypoint_rcnn_R_18_NL_FPN_NLhead", {"1", "2"})],
    )
    def test_config_supplies_what_weights_do_not_show(self, kind, subsample, run, cfg):
        config = QUICK / f"{kind}_overfit.yaml"
        cfg.merge_from_file(str(config))
        torch.save({"model": build_model(cfg).state_dict()}, "in.pth")
        out = run("nl_detectron", "nl_detectron", "--config-file", config)
        assert "  PAIRWISE embedded_gaussian\n" in out
        assert set(re.findall(r"  SUBSAMPLE (\d)\n", out)) == subsample
        assert "not show" not in out
        assert_same_bits(load("in.pth")[0], load("out.pth")[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "'res5.non_local1'.*not show it; .* --block subsample=2"),
            (("--config-file", CONFIG), "'res5.non_local1': the model has no .*; it has .*res4"),
            (("--config-file", "bad.yaml"), "MODEL.DEPHT"),
            (("--config-file", "missing.yaml"), "missing.yaml is neither a file nor in"),
        ],
    )
    def test_mistake(self, options, message, run, tmp_path):
        (tmp_path / "bad.yaml").write_text("MODEL: {DEPHT: 50}")
        with pytest.raises(SystemExit, match="no checkpoint at in.pth"):
            run("nl_detectron", "mmcv")
        block = NonLocalBlock(8, norm="BN").state_dict()
        torch.save({f"res5.non_local1.{key}": value for key, value in block.items()}, "in.pth")
        with pytest.raises(SystemExit, match=message) as error:
            run("nl_detectron", "mmcv", *options)
        assert error.value.code != 0
        assert not (tmp_path / "out.pth").exists()
        assert "12 tensors converted" in run("nl_detectron", "mmcv", "--block", "subsample=2")
