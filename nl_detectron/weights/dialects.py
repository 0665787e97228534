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

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nl_detectron.weights import networks
from nl_detectron.weights.networks import caffe2_keys, torch_keys

POOLING = "MODEL.VIDEO.POOLING"
TEMPORAL_POOL = "tsm_temporal_pool"  # the pooling that names of parameters show
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
        backbone: key map of the ResNet's parameters, one of :mod:`nl_detectron.weights.networks`;
            empty if only blocks are converted, ``None`` if every key is named as in detectron2.
        backbone_of_images: the ResNet has 2-D convolutions, though its blocks have 3-D ones.
        prefix: what every key begins with.
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
        settings: the config keys that its ResNets are trained with -> value.
        poolings: values of ``MODEL.VIDEO.POOLING`` for its networks for video -> which of them.
        note: what else the config of a ResNet from this library must set.
    """

    block: Mapping[str, str] = field(default_factory=dict)
    block_names: Mapping[str, str] = field(default_factory=dict)
    separator: str = "."
    backbone: Mapping[str, str] | None = field(default_factory=dict)
    backbone_of_images: bool = False
    prefix: str = ""
    ignored: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    pairwise: tuple[str, ...] = SAME_PARAMETERS
    norms: tuple[str, ...] = ("", "BN")
    affine_norm: bool = False
    bias_before_norm: bool = True
    concat_dim: int | None = None
    scales_by_in_channels: bool = False
    state_dict_key: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    poolings: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def blocks_only(self) -> bool:
        """Whether nothing but non-local blocks is converted."""
        return self.backbone is not None and not self.backbone

    @property
    def names_show_subsampling(self) -> bool:
        """Whether parameters are named differently in blocks that subsample."""
        return any("{pool}" in name for name in self.block.values())

    def trained_with(self, known: Collection[str] = ()) -> str:
        """Text of the settings, poolings and note, without the config keys that are known."""
        parts = [f"{key} {value}" for key, value in self.settings.items() if key not in known]
        if self.poolings and POOLING not in known:
            names = [f"{name} {which}".rstrip() for name, which in self.poolings.items()]
            parts.append(f"{POOLING} {' or '.join(names)}")
        return "; ".join(filter(None, (", ".join(parts), self.note)))


# As in the released configs (NONLOCAL.USE_SCALE True), with NONLOCAL.GROUP 1
_ALL_POSITIONS = {"axes": "spacetime", "group_frames": 0}
_AS_RELEASED = {"subsample_position": "before_conv", "scale": True, **_ALL_POSITIONS}
_IMAGENET_RGB = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
_VIDEO_RGB = {
    **_IMAGENET_RGB,
    "MODEL.PIXEL_MEAN": [114.75, 114.75, 114.75],
    "MODEL.PIXEL_STD": [57.375, 57.375, 57.375],
    "MODEL.VIDEO.HEAD.POOL_SIZE": 7,
}
_TSM: dict[str, Any] = {
    "settings": {**_IMAGENET_RGB, "MODEL.VIDEO.SHIFT.DIRECTION": "bidirectional"},
    "poolings": {"space": "", TEMPORAL_POOL: "with temporal pooling"},
    "note": "MODEL.VIDEO.SHIFT.EVERY 2 for R101, else 1",
}

# Networks and the names of blocks are those of mmaction2.
_MMCV = Dialect(
    block=torch_keys(
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
        f"res{s}.non_local{{i}}": f"backbone.layer{s - 1}.{{i}}.non_local_block" for s in _STAGES
    },
    backbone=networks.MMACTION2,
    fixed={"subsample_position": "after_conv", **_ALL_POSITIONS},
    pairwise=ALL_PAIRWISE,
    bias_before_norm=False,
    concat_dim=2,
    state_dict_key="state_dict",
    settings=_IMAGENET_RGB,
    poolings={
        "mmaction2": "for I3D",
        "released_8x8": "for C2D",
        "space": "for C2D without pooling over time",
    },
    note="its C2D has 2-D kernels: convert it with --dim 3",
)

DIALECTS = {
    "nl_detectron": Dialect(
        block=torch_keys(
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
    "mmcv": _MMCV,
    "mmaction2_tsm": replace(
        _MMCV,
        backbone=networks.MMACTION2_TSM,
        backbone_of_images=True,
        fixed={"dim": 3, **_MMCV.fixed},
        **_TSM,
    ),
    "tsm": Dialect(
        block=torch_keys(
            {
                "theta": "theta",
                "phi": "phi{pool}",
                "g": "g{pool}",
                "conv_out": "W{norm}",
                "norm": "W.1",
            }
        ),
        block_names={
            f"res{s}.non_local{{i}}": f"base_model.layer{s - 1}.{{i}}.nl" for s in _STAGES
        },
        backbone=networks.TSM,
        backbone_of_images=True,
        prefix="module.",
        fixed={"dim": 3, "subsample_position": "after_conv", "scale": False, **_ALL_POSITIONS},
        pairwise=("embedded_gaussian",),
        norms=("BN",),
        state_dict_key="state_dict",
        **_TSM,
    ),
    "pytorchvideo": Dialect(
        block=torch_keys(
            {
                "theta": "conv_theta",
                "phi": "conv_phi",
                "g": "conv_g",
                "conv_out": "conv_out",
                "norm": "norm",
            }
        ),
        backbone=networks.PYTORCHVIDEO,
        fixed={"dim": 3, **_AS_RELEASED},
        settings=_VIDEO_RGB,
        poolings={"slowfast": ""},
    ),
    "slowfast": Dialect(
        block=torch_keys(
            {
                "theta": "conv_theta",
                "phi": "conv_phi",
                "g": "conv_g",
                "conv_out": "conv_out",
                "norm": "bn",
            }
        ),
        block_names={f"res{s}.non_local{{i}}": f"s{s}.pathway0_nonlocal{{i}}" for s in _STAGES},
        backbone=networks.SLOWFAST,
        fixed={"dim": 3, **_AS_RELEASED},
        norms=("BN",),
        state_dict_key="model_state",
        settings=_VIDEO_RGB,
        poolings={"slowfast": "", "space": "where its MODEL.ARCH is 2d, slow_c2d or slow_i3d"},
    ),
    "alexhex7": Dialect(
        block=torch_keys(
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
        block=torch_keys({"theta": "t", "phi": "p", "g": "g", "conv_out": "z", "norm": "norm"}),
        backbone=networks.TORCHVISION,
        fixed={"dim": 2, "subsample": 1, "scale": True},
        norms=("BN",),
        pairwise=("embedded_gaussian",),
        scales_by_in_channels=True,
        settings=_IMAGENET_RGB,
        note="a few timm models have another mean and std (pretrained_cfg)",
    ),
    "torchvision": Dialect(backbone=networks.TORCHVISION, fixed={"dim": 2}, settings=_IMAGENET_RGB),
    "caffe2": Dialect(
        block=caffe2_keys(
            {"theta": "theta", "phi": "phi", "g": "g", "conv_out": "out", "norm": "bn"}
        ),
        block_names={f"res{s}.non_local{{i}}": f"nonlocal_conv{s}_{{i}}" for s in _STAGES},
        separator="_",
        backbone=networks.CAFFE2,
        ignored={r".*_momentum|lr|model_iter": "optimizer state"},
        fixed=_AS_RELEASED,
        affine_norm=True,
        state_dict_key="blobs",
        settings=_VIDEO_RGB,
        poolings={
            "released_32x2": "for 32 (stride 2) and 128 frames",
            "released_8x8": "for 8 and 32 (stride 4)",
            "slowfast": "for SlowFast's models in this format",
        },
        note="on images, the stem of video-nonlocal-net pools without padding; Detectron's R-50 "
        "and R-101 are trained with INPUT.FORMAT BGR, MODEL.PIXEL_MEAN [102.9801, 115.9465, "
        "122.7717], MODEL.PIXEL_STD [1.0, 1.0, 1.0], MODEL.RESNETS.STRIDE_IN_1X1 True",
    ),
}
