"""Checkpoint dialects: how libraries name a ResNet and its non-local blocks, and how these differ.

Only tables; :mod:`nl_detectron.weights.convert` applies them. A key map goes from our names
(detectron2's) to theirs and is used in both directions; ``{i}`` stands for the index of a residual
block. What a library's block computes is written as arguments of our
:class:`~nl_detectron.NonLocalBlock`.

Sources: mmcv ``cnn/bricks/non_local.py``, mmaction2 ``models/backbones/resnet3d.py``, pytorchvideo
``layers/nonlocal_net.py``, SlowFast ``models/nonlocal_helper.py``, AlexHex7/Non-local_pytorch
``lib/``, timm ``layers/non_local_attn.py``, video-nonlocal-net ``lib/models/`` for Caffe2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_STAGES = (2, 3, 4, 5)
SAME_PARAMETERS = ("embedded_gaussian", "dot_product")  # weights cannot tell these two apart
ALL_PAIRWISE = (*SAME_PARAMETERS, "gaussian", "concatenation")


@dataclass(frozen=True)
class Dialect:
    """The parameter names of one library, and what its non-local block can compute.

    Attributes:
        block: key map of a block's parameters; empty if the library has no such block. ``{pool}``
            and ``{norm}`` become ".0" in blocks that subsample or have a norm, "" in others.
        block_names: key map of the names of blocks in a ResNet. A block elsewhere keeps its name.
        separator: what joins the name of a block and the name of its parameter.
        backbone: key map of the ResNet's parameters; empty if only blocks are converted, ``None``
            if every key is named as in detectron2.
        ignored: pattern of keys to leave out -> reason.
        fixed: arguments of our block that have a single value in theirs.
        pairwise: the pairwise functions that their block supports.
        norms: the norms that it supports.
        affine_norm: a norm may be stored as scale and bias only, its statistics folded into them.
        bias_before_norm: whether the output convolution has a bias when a norm follows.
        concat_dim: number of spatial axes of ``concat_project``, if not that of the block.
        scales_by_in_channels: its scale is C ** -0.5, ours D ** -0.5.
        state_dict_key: the entry of a checkpoint that holds the weights; "" if they are all it
            holds.
        note: what the config of a ResNet from this library must set.
    """

    block: Mapping[str, str] = field(default_factory=dict)
    block_names: Mapping[str, str] = field(default_factory=dict)
    separator: str = "."
    backbone: Mapping[str, str] | None = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    pairwise: tuple[str, ...] = SAME_PARAMETERS
    norms: tuple[str, ...] = ("", "BN")
    affine_norm: bool = False
    bias_before_norm: bool = True
    concat_dim: int | None = None
    scales_by_in_channels: bool = False
    state_dict_key: str = ""
    note: str = ""

    @property
    def blocks_only(self) -> bool:
        """Whether nothing but non-local blocks is converted."""
        return self.backbone is not None and not self.backbone

    @property
    def names_show_subsampling(self) -> bool:
        """Whether parameters are named differently in blocks that subsample."""
        return any("{pool}" in name for name in self.block.values())


def _torch_keys(modules: Mapping[str, str]) -> dict[str, str]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{ours}.{n}": f"{theirs}.{n}" for ours, theirs in modules.items() for n in names}


def _caffe2_keys(modules: Mapping[str, str]) -> dict[str, str]:
    conv = {"weight": "w", "bias": "b"}
    # "riv" reads like inverse variance, but video-nonlocal-net says that it holds the variance.
    norm = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    return {
        f"{ours}.{n}": f"{theirs}_{short}"
        for ours, theirs in modules.items()
        for n, short in (norm if ours.endswith("norm") else conv).items()
    }


_TORCHVISION_RESNET = _torch_keys(
    {
        "stem.conv1": "conv1",
        "stem.conv1.norm": "bn1",
        **{f"res{s}.{{i}}.shortcut": f"layer{s - 1}.{{i}}.downsample.0" for s in _STAGES},
        **{f"res{s}.{{i}}.shortcut.norm": f"layer{s - 1}.{{i}}.downsample.1" for s in _STAGES},
        **{
            f"res{s}.{{i}}.conv{n}{norm}": f"layer{s - 1}.{{i}}.{name}{n}"
            for s in _STAGES
            for n in (1, 2, 3)
            for norm, name in (("", "conv"), (".norm", "bn"))
        },
        "linear": "fc",
    }
)

_CAFFE2_RESNET = _caffe2_keys(
    {
        "stem.conv1": "conv1",
        "stem.conv1.norm": "res_conv1_bn",
        **{
            f"res{s}.{{i}}.{ours}{norm}": f"res{s}_{{i}}_{theirs}{bn}"
            for s in _STAGES
            for ours, theirs in (
                ("shortcut", "branch1"),
                ("conv1", "branch2a"),
                ("conv2", "branch2b"),
                ("conv3", "branch2c"),
            )
            for norm, bn in (("", ""), (".norm", "_bn"))
        },
        "linear": "pred",
    }
)

# As in the released configs (NONLOCAL.USE_SCALE True), with NONLOCAL.GROUP 1
_ALL_POSITIONS = {"axes": "spacetime", "group_frames": 0}
_AS_RELEASED = {"subsample_position": "before_conv", "scale": True, **_ALL_POSITIONS}
_IMAGENET_RGB = (
    "INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.280, 103.530], MODEL.PIXEL_STD "
    "[58.395, 57.120, 57.375], MODEL.RESNETS.STRIDE_IN_1X1 False"
)

DIALECTS = {
    "nl_detectron": Dialect(
        block=_torch_keys(
            {
                "theta": "theta",
                "phi": "phi",
                "g": "g",
                "conv_out": "conv_out",
                "norm": "norm",
                "concat_project": "concat_project",
            }
        ),
        backbone=None,
        pairwise=ALL_PAIRWISE,
        norms=("", "GN", "SyncBN", "BN"),
        state_dict_key="model",
    ),
    "detectron2": Dialect(backbone=None, fixed={"dim": 2}, state_dict_key="model"),
    # Blocks are named as in mmaction2.
    "mmcv": Dialect(
        block=_torch_keys(
            {
                "theta": "theta.conv",
                "phi": "phi{pool}.conv",
                "g": "g{pool}.conv",
                "conv_out": "conv_out.conv",
                "norm": "conv_out.bn",
                "concat_project": "concat_project.conv",
            }
        ),
        block_names={
            f"res{s}.non_local{{i}}": f"backbone.layer{s - 1}.{{i}}.non_local_block"
            for s in _STAGES
        },
        fixed={"subsample_position": "after_conv", **_ALL_POSITIONS},
        pairwise=ALL_PAIRWISE,
        bias_before_norm=False,
        concat_dim=2,
        state_dict_key="state_dict",
    ),
    "pytorchvideo": Dialect(
        block=_torch_keys(
            {
                "theta": "conv_theta",
                "phi": "conv_phi",
                "g": "conv_g",
                "conv_out": "conv_out",
                "norm": "norm",
            }
        ),
        fixed={"dim": 3, **_AS_RELEASED},
    ),
    "slowfast": Dialect(
        block=_torch_keys(
            {
                "theta": "conv_theta",
                "phi": "conv_phi",
                "g": "conv_g",
                "conv_out": "conv_out",
                "norm": "bn",
            }
        ),
        block_names={f"res{s}.non_local{{i}}": f"s{s}.pathway0_nonlocal{{i}}" for s in _STAGES},
        fixed={"dim": 3, **_AS_RELEASED},
        norms=("BN",),
        state_dict_key="model_state",
    ),
    "alexhex7": Dialect(
        block=_torch_keys(
            {
                "theta": "theta",
                "phi": "phi{pool}",
                "g": "g{pool}",
                "conv_out": "W{norm}",
                "norm": "W.1",
                "concat_project": "concat_project.0",
            }
        ),
        fixed={"subsample_position": "after_conv", "scale": False, **_ALL_POSITIONS},
        pairwise=ALL_PAIRWISE,
        concat_dim=2,
    ),
    # For blocks made with use_scale=True, the default.
    "timm": Dialect(
        block=_torch_keys({"theta": "t", "phi": "p", "g": "g", "conv_out": "z", "norm": "norm"}),
        backbone=_TORCHVISION_RESNET,
        fixed={"dim": 2, "subsample": 1, "scale": True},
        norms=("BN",),
        pairwise=("embedded_gaussian",),
        scales_by_in_channels=True,
        note=f"{_IMAGENET_RGB}; a few timm models have another mean and std (pretrained_cfg)",
    ),
    "torchvision": Dialect(backbone=_TORCHVISION_RESNET, fixed={"dim": 2}, note=_IMAGENET_RGB),
    "caffe2": Dialect(
        block=_caffe2_keys(
            {"theta": "theta", "phi": "phi", "g": "g", "conv_out": "out", "norm": "bn"}
        ),
        block_names={f"res{s}.non_local{{i}}": f"nonlocal_conv{s}_{{i}}" for s in _STAGES},
        separator="_",
        backbone=_CAFFE2_RESNET,
        ignored={r".*_momentum|lr|model_iter": "optimizer state"},
        fixed=_AS_RELEASED,
        affine_norm=True,
        state_dict_key="blobs",
        note="for video-nonlocal-net, INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [114.75, 114.75, "
        "114.75], MODEL.PIXEL_STD [57.375, 57.375, 57.375], MODEL.RESNETS.STRIDE_IN_1X1 False, and "
        "its stem pools without padding; for Detectron's R-50 or R-101, INPUT.FORMAT BGR, "
        "MODEL.PIXEL_MEAN [102.9801, 115.9465, 122.7717], MODEL.PIXEL_STD [1.0, 1.0, 1.0], "
        "MODEL.RESNETS.STRIDE_IN_1X1 True",
    ),
}
