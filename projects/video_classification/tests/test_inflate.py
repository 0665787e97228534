"""Weights of networks for images, and of shorter clips, in networks for video."""

from __future__ import annotations

import pickle

import inflate_weights
import pytest
import torch
from detectron2.modeling import ResNet, build_model
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch.testing import assert_close
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet
from video_classification.models import inflate, load_image_weights, make_resnet3d

from nl_detectron import insert_non_local_blocks
from nl_detectron.engine.checkpoint import StrictCheckpointer

NARROW = {"stem_channels": 64, "res2_channels": 256, "width": 8, "pooling": "paper"}


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_copies_over_time(frames):
    image, norm = torch.randn(4, 2, 3, 3), torch.randn(4)
    like = {"conv.weight": torch.zeros(4, 2, frames, 3, 3), "conv.norm.weight": torch.zeros(4)}
    for weight in (image, image[:, :, None]):
        got = inflate({"conv.weight": weight, "conv.norm.weight": norm, "other": image}, like)
        for t in range(frames):
            assert_close(got["conv.weight"][:, :, t], image / frames)
        assert got["conv.weight"].shape[2] == frames
        assert got["conv.norm.weight"] is norm
        assert got["other"] is image


def torchvision_resnet(randomize, layers=(1, 2, 1, 1)):
    network = TorchvisionResNet(Bottleneck, list(layers), num_classes=7, width_per_group=8)
    randomize(network)
    for name, tensor in network.state_dict().items():
        if "bn" in name and name.endswith("weight") or name.endswith("downsample.1.weight"):
            tensor.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture
def image_file(tmp_path, randomize):
    """Writes a network for images in a dialect; returns the file, and what it makes of an image."""

    def write(dialect):
        image = torch.randn(1, 3, 37, 45)
        if dialect == "detectron2":  # as in its model zoo: a pickle of arrays
            stages = [
                ResNet.make_stage(
                    BottleneckBlock, n, in_channels=c, out_channels=256 * 2**i,
                    bottleneck_channels=8 * 2**i,
                    stride_per_block=[1 + (i > 0 and j == 0) for j in range(n)],
                )
                for i, (n, c) in enumerate(zip((1, 2, 1, 1), (64, 256, 512, 1024)))
            ]  # fmt: skip
            network = randomize(ResNet(BasicStem(), stages)).eval()
            arrays = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
            path = tmp_path / "image.pkl"
            path.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision"}))
            return path, image, network(image)["res5"]
        network, path = torchvision_resnet(randomize), tmp_path / "image.pth"
        torch.save(network.state_dict(), path)
        x = network.maxpool(network.relu(network.bn1(network.conv1(image))))
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = layer(x)
        return path, image, x

    return write


@pytest.mark.parametrize("dialect", ["torchvision", "timm", "detectron2"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_network_for_images(norm, dialect, image_file):
    """timm names the layers of its ResNets as torchvision does."""
    path, image, expected = image_file(dialect)
    network = make_resnet3d(num_blocks=(1, 2, 1, 1), norm=norm, **NARROW).eval()
    insert_non_local_blocks(network, {"res3": [0]}, dim=3)
    load_image_weights(network, path, dialect)
    assert_close(network(image[:, :, None])["res5"][:, :, 0], expected, rtol=1e-4, atol=1e-4)


def test_detector(tmp_path, randomize):
    """Of which the ResNet is taken, whatever it is called there."""
    state = torchvision_resnet(randomize).state_dict()
    torch.save(state, tmp_path / "image.pth")
    network, other = (make_resnet3d(num_blocks=(1, 2, 1, 1), **NARROW) for _ in range(2))
    load_image_weights(network, tmp_path / "image.pth", "torchvision")
    weights = {
        f"backbone.bottom_up.{name}": tensor for name, tensor in network.state_dict().items()
    }
    weights["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(3, 4)
    torch.save({"model": weights}, tmp_path / "detector.pth")
    load_image_weights(other, tmp_path / "detector.pth", "detectron2")
    assert_close(dict(other.state_dict()), dict(network.state_dict()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": (1, 1, 1, 1)}, "has no place in this network for .* res3.1.conv1.weight"),
        ({"num_blocks": (1, 2, 2, 1)}, "image.pth lacks .* keys: .*res4.1.conv1.weight"),
        ({"width": 4}, r"has in another shape .*res\*\.\*\.conv\*"),
        ({"norm": ""}, "no place .*norm"),
    ],
)
def test_another_network(options, message, image_file):
    path, *_ = image_file("torchvision")
    network = make_resnet3d(**{"num_blocks": (1, 2, 1, 1), **NARROW, **options})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_image_weights(network, path, "torchvision")
    assert_close(dict(network.state_dict()), before)


def test_command(video_cfg, image_file, tmp_path, capsys):
    """Its file is a backbone alone for the checkpointer, for a model with blocks, too."""
    path, image, expected = image_file("torchvision")
    video_cfg.merge_from_list(
        ["MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256,
         "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.VIDEO.NUM_BLOCKS", (1, 2, 1, 1),
         "MODEL.BACKBONE.NAME", "build_non_local_resnet3d_backbone",
         "MODEL.NON_LOCAL.AFTER_BLOCKS.RES4", (0,)]
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(video_cfg.dump())
    command = ["--input", str(path), "--output", str(tmp_path / "init.pth")]
    command += ["--from", "torchvision", "--config-file"]
    inflate_weights.main([*command, str(tmp_path / "config.yaml")])
    assert "train with INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675" in capsys.readouterr().out
    model = build_model(video_cfg).eval()
    StrictCheckpointer(model, backbone_prefix="backbone.").load(str(tmp_path / "init.pth"))
    got = model.backbone(image[:, :, None])["res5"][:, :, 0]
    assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit, match="image.pth .*no place in this network for"):
        inflate_weights.main(
            [*command, str(tmp_path / "config.yaml"), "MODEL.VIDEO.NUM_BLOCKS", "(1, 1, 1, 1)"]
        )


def test_network_of_32_frames_in_one_of_128(video_cfg, randomize, tmp_path):
    """Its norms become constants; new blocks, in groups of frames, are the identity."""
    video_cfg.MODEL.VIDEO.POOLING = "released_32x2"
    video_cfg.MODEL.VIDEO.INFLATE, video_cfg.MODEL.VIDEO.STEM_KERNEL = "3x1x1", (5, 7, 7)
    short = randomize(build_model(video_cfg)).eval()
    torch.save({"model": short.state_dict()}, tmp_path / "short.pth")
    video_cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "build_non_local_resnet3d_backbone", "MODEL.NON_LOCAL.NORM", "",
         "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.NON_LOCAL.AFTER_BLOCKS.RES3", (1,),
         "MODEL.NON_LOCAL.STAGE_OPTIONS.RES3", ("GROUP_FRAMES", 4)]
    )  # fmt: skip
    long = build_model(video_cfg).eval()
    StrictCheckpointer(long, backbone_prefix="backbone.").load(str(tmp_path / "short.pth"))
    clip = torch.randint(0, 256, (1, 3, 128, 32, 32)).float()
    assert_close(long(clip), short(clip), rtol=1e-4, atol=1e-5)
    assert not any(name.endswith("norm.weight") for name, _ in long.named_parameters())
