"""Checkpoint dialects: how libraries name a ResNet and its non-local blocks, and how these differ.

Only tables; :mod:`nl_detectron.weights.convert` applies them. Names map from ours (detectron2's) to
theirs, and are read in both directions; ``{i}`` stands for the index of a residual block. What
their block computes is said in the arguments of our :class:`~nl_detectron.NonLocalBlock`.

Sources: mmcv ``cnn/bricks/non_local.py``, mmaction2 ``models/backbones/resnet3d.py``, pytorchvideo
``layers/nonlocal_net.py``, SlowFast ``models/nonlocal_helper.py``, AlexHex7/Non-local_pytorch
``lib/``, timm ``layers/non_local_attn.py``, video-nonlocal-net ``lib/models/`` for Caffe2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGES = (2, 3, 4, 5)
SAME_PARAMETERS = ("embedded_gaussian", "dot_product")  # weights do not tell these two apart
ALL_PAIRWISE = (*SAME_PARAMETERS, "gaussian", "concatenation")


@dataclass(frozen=True)
class Dialect:
    """The names of one library, and what its non-local block can compute.

    Attributes:
        block: parameter of our block -> theirs; empty if the library has no such block. ``{pool}``
            and ``{norm}`` are ".0" in blocks that are subsampled or have a norm, "" in others.
        places: our name of a block in a ResNet -> theirs. Elsewhere a block keeps its name.
        joint: what joins the name of a block and that of its parameter.
        trunk: our parameter of the ResNet -> theirs; ``None`` if all is named as in detectron2.
        rest: without ``trunk``, why what is not a block is left out.
        dropped: pattern of other keys to leave out -> why.
        fixed: arguments of our block that have but one value in theirs.
        pairwise: the forms that it has.
        norms: what may follow the output convolution.
        affine_norm: a norm may come as scale and bias alone, its statistics folded into them.
        bias_beside_norm: whether its output convolution has a bias when a norm follows.
        concat_dim: number of spatial axes of ``concat_project``, if it is not that of the block.
        scales_by_width: its scale is C ** -0.5, ours D ** -0.5.
        wrapper: the entry of a file that holds the weights; "" if the file holds nothing else.
        note: what a config says for a ResNet of this dialect.
    """

    block: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    joint: str = "."
    trunk: Mapping[str, str] | None = field(default_factory=dict)
    rest: str = ""
    dropped: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    pairwise: tuple[str, ...] = SAME_PARAMETERS
    norms: tuple[str, ...] = ("", "BN")
    affine_norm: bool = False
    bias_beside_norm: bool = True
    concat_dim: int | None = None
    scales_by_width: bool = False
    wrapper: str = ""
    note: str = ""


def _torch(modules: Mapping[str, str]) -> dict[str, str]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{ours}.{n}": f"{theirs}.{n}" for ours, theirs in modules.items() for n in names}


def _caffe2(modules: Mapping[str, str]) -> dict[str, str]:
    conv = {"weight": "w", "bias": "b"}
    # "riv" is read as inverse variance; video-nonlocal-net says that it holds the variance.
    norm = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    return {
        f"{ours}.{n}": f"{theirs}_{short}"
        for ours, theirs in modules.items()
        for n, short in (norm if ours.endswith("norm") else conv).items()
    }


_TORCHVISION_TRUNK = _torch(
    {
        "stem.conv1": "conv1",
        "stem.conv1.norm": "bn1",
        **{f"res{s}.{{i}}.shortcut": f"layer{s - 1}.{{i}}.downsample.0" for s in STAGES},
        **{f"res{s}.{{i}}.shortcut.norm": f"layer{s - 1}.{{i}}.downsample.1" for s in STAGES},
        **{
            f"res{s}.{{i}}.conv{n}{norm}": f"layer{s - 1}.{{i}}.{name}{n}"
            for s in STAGES
            for n in (1, 2, 3)
            for norm, name in (("", "conv"), (".norm", "bn"))
        },
        "linear": "fc",
    }
)

_CAFFE2_TRUNK = _caffe2(
    {
        "stem.conv1": "conv1",
        "stem.conv1.norm": "res_conv1_bn",
        **{
            f"res{s}.{{i}}.{ours}{norm}": f"res{s}_{{i}}_{theirs}{bn}"
            for s in STAGES
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

# By the released configs (NONLOCAL.USE_SCALE True) and with NONLOCAL.GROUP 1
_AS_RELEASED = {"subsample_position": "before_conv", "scale": True, "axes": "spacetime"}
_BLOCKS_ALONE = "not of a non-local block; of these networks the blocks alone are converted"
_IMAGENET_RGB = (
    "INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.280, 103.530], MODEL.PIXEL_STD "
    "[58.395, 57.120, 57.375], MODEL.RESNETS.STRIDE_IN_1X1 False"
)

DIALECTS = {
    "nl_detectron": Dialect(
        block=_torch(
            {
                "theta": "theta",
                "phi": "phi",
                "g": "g",
                "conv_out": "conv_out",
                "norm": "norm",
                "concat_project": "concat_project",
            }
        ),
        trunk=None,
        pairwise=ALL_PAIRWISE,
        norms=("", "GN", "SyncBN", "BN"),
        wrapper="model",
    ),
    "detectron2": Dialect(trunk=None, fixed={"dim": 2}, wrapper="model"),
    # With the places of mmaction2
    "mmcv": Dialect(
        block=_torch(
            {
                "theta": "theta.conv",
                "phi": "phi{pool}.conv",
                "g": "g{pool}.conv",
                "conv_out": "conv_out.conv",
                "norm": "conv_out.bn",
                "concat_project": "concat_project.conv",
            }
        ),
        places={
            f"res{s}.non_local{{i}}": f"backbone.layer{s - 1}.{{i}}.non_local_block" for s in STAGES
        },
        rest=_BLOCKS_ALONE,
        fixed={"subsample_position": "after_conv", "axes": "spacetime"},
        pairwise=ALL_PAIRWISE,
        bias_beside_norm=False,
        concat_dim=2,
        wrapper="state_dict",
    ),
    "pytorchvideo": Dialect(
        block=_torch(
            {
                "theta": "conv_theta",
                "phi": "conv_phi",
                "g": "conv_g",
                "conv_out": "conv_out",
                "norm": "norm",
            }
        ),
        rest=_BLOCKS_ALONE,
        fixed={"dim": 3, **_AS_RELEASED},
    ),
    "slowfast": Dialect(
        block=_torch(
            {
                "theta": "conv_theta",
                "phi": "conv_phi",
                "g": "conv_g",
                "conv_out": "conv_out",
                "norm": "bn",
            }
        ),
        places={f"res{s}.non_local{{i}}": f"s{s}.pathway0_nonlocal{{i}}" for s in STAGES},
        rest=_BLOCKS_ALONE,
        fixed={"dim": 3, **_AS_RELEASED},
        norms=("BN",),
        wrapper="model_state",
    ),
    "alexhex7": Dialect(
        block=_torch(
            {
                "theta": "theta",
                "phi": "phi{pool}",
                "g": "g{pool}",
                "conv_out": "W{norm}",
                "norm": "W.1",
                "concat_project": "concat_project.0",
            }
        ),
        rest=_BLOCKS_ALONE,
        fixed={"subsample_position": "after_conv", "scale": False, "axes": "spacetime"},
        pairwise=ALL_PAIRWISE,
        concat_dim=2,
    ),
    # Of a block made without use_scale=False
    "timm": Dialect(
        block=_torch({"theta": "t", "phi": "p", "g": "g", "conv_out": "z", "norm": "norm"}),
        trunk=_TORCHVISION_TRUNK,
        fixed={"dim": 2, "subsample": 1, "scale": True},
        norms=("BN",),
        pairwise=("embedded_gaussian",),
        scales_by_width=True,
        note=f"{_IMAGENET_RGB}; a few timm models have another mean and std (pretrained_cfg)",
    ),
    "torchvision": Dialect(trunk=_TORCHVISION_TRUNK, fixed={"dim": 2}, note=_IMAGENET_RGB),
    "caffe2": Dialect(
        block=_caffe2({"theta": "theta", "phi": "phi", "g": "g", "conv_out": "out", "norm": "bn"}),
        places={f"res{s}.non_local{{i}}": f"nonlocal_conv{s}_{{i}}" for s in STAGES},
        joint="_",
        trunk=_CAFFE2_TRUNK,
        dropped={r".*_momentum|lr|model_iter": "state of the optimiser"},
        fixed=_AS_RELEASED,
        affine_norm=True,
        wrapper="blobs",
        note="if of video-nonlocal-net, INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [114.75, 114.75, "
        "114.75], MODEL.PIXEL_STD [57.375, 57.375, 57.375], MODEL.RESNETS.STRIDE_IN_1X1 False, and "
        "its stem pools without padding; if Detectron's R-50 or R-101, INPUT.FORMAT BGR, "
        "MODEL.PIXEL_MEAN [102.9801, 115.9465, 122.7717], MODEL.PIXEL_STD [1.0, 1.0, 1.0], "
        "MODEL.RESNETS.STRIDE_IN_1X1 True",
    ),
}
