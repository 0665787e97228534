"""Key maps of whole ResNets: our names, which are detectron2's, to those of other libraries.

``{i}`` stands for the index of a residual block. ``{wrap}`` is ".block" in a residual block that a
non-local block follows, ``{shift}`` ".net" where TSM shifts channels, ``{temporal_pool}`` ".net"
where it pools over time; otherwise they are empty.

Sources: torchvision ``models/resnet.py``, video-nonlocal-net ``lib/models/``, pytorchvideo
``models/hub/resnet.py``, SlowFast ``models/{stem,resnet,head}_helper.py``, mmaction2
``models/backbones/{resnet3d,c2d,resnet_tsm}.py``, TSM ``ops/{models,temporal_shift}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

_Keys = Callable[[Mapping[str, str]], dict[str, str]]


def torch_keys(modules: Mapping[str, str]) -> dict[str, str]:
    """Return the key map of convolutions, norms and linear layers of PyTorch."""
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{ours}.{n}": f"{theirs}.{n}" for ours, theirs in modules.items() for n in names}


def caffe2_keys(modules: Mapping[str, str]) -> dict[str, str]:
    """Return the key map of convolutions, norms and linear layers of Caffe2."""
    conv = {"weight": "w", "bias": "b"}
    # "riv" reads like inverse variance, but video-nonlocal-net says that it holds the variance.
    norm = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    return {
        f"{ours}.{n}": f"{theirs}_{short}"
        for ours, theirs in modules.items()
        for n, short in (norm if ours.endswith("norm") else conv).items()
    }


def _resnet(
    stem: tuple[str, str],
    block: str,
    layers: Mapping[str, tuple[str, str]],
    linear: str,
    stages: tuple[int, ...] = (1, 2, 3, 4),
    keys: _Keys = torch_keys,
) -> dict[str, str]:
    """Return the key map of a ResNet.

    Args:
        stem: its convolution and norm.
        block: what the names in a residual block begin with; ``{s}`` stands for the stage.
        layers: our name of a convolution in a residual block -> it and its norm.
        linear: the classifier.
        stages: numbers of res2, res3, res4 and res5.
        keys: adds the parameters.
    """
    modules = {"stem.conv1": stem[0], "stem.conv1.norm": stem[1], "linear": linear}
    for ours, stage in enumerate(stages, start=2):
        for name, layer in layers.items():
            for suffix, theirs in zip(("", ".norm"), layer):
                modules[f"res{ours}.{{i}}.{name}{suffix}"] = (
                    block.replace("{s}", str(stage)) + theirs
                )
    return keys(modules)


def _layers(
    shortcut: tuple[str, str], conv: str, norm: str, names: str = "123"
) -> dict[str, tuple[str, str]]:
    """Return the layers of a residual block; "*" stands for each of ``names``, of the main path."""
    convs = {
        f"conv{n}": (conv.replace("*", c), norm.replace("*", c)) for n, c in enumerate(names, 1)
    }
    return {"shortcut": shortcut, **convs}


TORCHVISION = _resnet(
    ("conv1", "bn1"),
    "layer{s}.{i}.",
    _layers(("downsample.0", "downsample.1"), "conv*", "bn*"),
    "fc",
)
CAFFE2 = _resnet(
    ("conv1", "res_conv1_bn"),
    "res{s}_{i}_",
    _layers(("branch1", "branch1_bn"), "branch2*", "branch2*_bn", "abc"),
    "pred",
    (2, 3, 4, 5),
    caffe2_keys,
)
PYTORCHVIDEO = _resnet(
    ("blocks.0.conv", "blocks.0.norm"),
    "blocks.{s}.res_blocks.{i}.",
    _layers(("branch1_conv", "branch1_norm"), "branch2.conv_*", "branch2.norm_*", "abc"),
    "blocks.6.proj",
    (1, 3, 4, 5),  # 2 is the pooling before res3
)
SLOWFAST = _resnet(
    ("s1.pathway0_stem.conv", "s1.pathway0_stem.bn"),
    "s{s}.pathway0_res{i}.",
    _layers(("branch1", "branch1_bn"), "branch2.*", "branch2.*_bn", "abc"),
    "head.projection",
    (2, 3, 4, 5),
)
MMACTION2 = _resnet(
    ("backbone.conv1.conv", "backbone.conv1.bn"),
    "backbone.layer{s}.{i}.",
    _layers(("downsample.conv", "downsample.bn"), "conv*.conv", "conv*.bn"),
    "cls_head.fc_cls",
)


def _shifted(network: Mapping[str, str]) -> dict[str, str]:
    """Wrap residual blocks, their first convolutions, and res3 as TSM does."""
    wrapped = {}
    for ours, theirs in network.items():
        key = theirs.replace("{i}.", "{i}{wrap}.").replace("layer2.", "layer2{temporal_pool}.")
        if ours.endswith(".{i}.conv1.weight"):
            key = key.replace(".weight", "{shift}.weight")
        wrapped[ours] = key
    return wrapped


MMACTION2_TSM = _shifted(MMACTION2)
TSM = _shifted(
    _resnet(
        ("base_model.conv1", "base_model.bn1"),
        "base_model.layer{s}.{i}.",
        _layers(("downsample.0", "downsample.1"), "conv*", "bn*"),
        "new_fc",
    )
)
