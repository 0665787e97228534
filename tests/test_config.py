"""The node MODEL.NON_LOCAL: its defaults, what it refuses, and that every key does something."""

from __future__ import annotations

import copy
import pickle
import re
import zlib
from operator import attrgetter

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.roi_heads import build_keypoint_head

from nl_detectron import add_non_local_config, config
from nl_detectron.config import default_config, load_config, without_blocks
from tests import oracles

# For each key, another value, and which of the two models it must change. DIM, AXES and
# GROUP_FRAMES are of 3-D backbones, see test_backbone.py.
BOTH, BACKBONE, HEAD = {"backbone", "head"}, {"backbone"}, {"head"}
OTHERS = {
    "PAIRWISE": ("gaussian", BOTH),
    "REDUCTION": (4, BOTH),
    "SCALE": (False, BOTH),
    "SUBSAMPLE": (1, BACKBONE),
    "SUBSAMPLE_POSITION": ("after_conv", BACKBONE),  # the head's maps are not subsampled
    "NORM": ("GN", BACKBONE),
    "ACTIVATION_CHECKPOINT": (True, BOTH),
    "AFTER_BLOCKS.RES2": ((0,), BACKBONE),
    "AFTER_BLOCKS.RES3": ((0,), BACKBONE),
    "AFTER_BLOCKS.RES4": ((), BACKBONE),
    "AFTER_BLOCKS.RES5": ((0,), BACKBONE),
    "MASK_PADDING": (False, BACKBONE),
    "STAGE_OPTIONS.RES4": (("SUBSAMPLE", 1), BACKBONE),
    "KEYPOINT_HEAD.AFTER_CONVS": ((1,), HEAD),
    "KEYPOINT_HEAD.SUBSAMPLE": (2, HEAD),
    "KEYPOINT_HEAD.NORM": ("GN", HEAD),
}


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def build(cfg, part):
    if part == "head":
        return build_keypoint_head(cfg, ShapeSpec(channels=6, height=14, width=14))
    return build_backbone(cfg)


def fingerprint(cfg, part):
    """Parameters, what is saved for backward, and the result once names decide all values."""
    model = build(cfg, part).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            std = parameter[0].numel() ** -0.5
            parameter.data.normal_(std=std, generator=generator)
    generator = torch.Generator().manual_seed(0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), id):
        if part == "head":
            out = model.layers(torch.randn(2, 6, 14, 14, generator=generator))
        else:
            images = torch.randn(1, 3, 64, 64, generator=generator)
            images[..., 32:] = 0  # padding
            out = model(images)["res5"]
    return ({name: p.shape for name, p in model.named_parameters()}, saved), out


@pytest.fixture
def nl_cfg(small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_backbone"
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    small_cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
    return small_cfg


@pytest.mark.parametrize(
    ("part", "place", "channels", "subsample"),
    [("backbone", "res4.non_local4", 128, 2), ("head", "non_local2", 32, 1)],
)
def test_defaults_compute_what_the_released_code_does(nl_cfg, part, place, channels, subsample):
    """Scaled dot products of half the channels; in the backbone, keys pooled before phi and g."""
    block = build(nl_cfg, part).get_submodule(place).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=channels**-0.5)
    weights, x = block.state_dict(), torch.randn(1, channels, 3, 5, dtype=torch.float64)
    assert weights["theta.weight"].shape == (channels // 2, channels, 1, 1)
    expected = oracles.block(x, weights, "embedded_gaussian", subsample=subsample)
    torch.testing.assert_close(block(x), expected)


def test_no_other_key_is_touched():
    cfg = get_cfg()
    expected = get_cfg()
    expected.MODEL.pop("NON_LOCAL", None)  # there if the hook is on
    add_non_local_config(cfg)
    cfg.MODEL.pop("NON_LOCAL")
    assert cfg == expected


def test_adding_twice_changes_nothing_and_configs_share_nothing(cfg):
    cfg.MODEL.NON_LOCAL.PAIRWISE, cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES2 = "gaussian", (0,)
    expected = cfg.clone()
    add_non_local_config(cfg)
    assert cfg == expected
    node = default_config().MODEL.NON_LOCAL
    assert (node.PAIRWISE, node.AFTER_BLOCKS.RES2) == ("embedded_gaussian", ())


def test_copies(cfg, tmp_path):
    cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES3 = (1, 3)
    assert pickle.loads(pickle.dumps(cfg)) == cfg == copy.deepcopy(cfg) == cfg.clone()
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    assert load_config(path).MODEL.NON_LOCAL == cfg.MODEL.NON_LOCAL
    plain = CfgNode.load_yaml_with_base(str(path), allow_unsafe=False)
    assert plain["MODEL"]["NON_LOCAL"]["PAIRWISE"] == "embedded_gaussian"


def test_no_key_is_forgotten_below(cfg):
    same = {f"STAGE_OPTIONS.{stage}" for stage in ("RES2", "RES3", "RES5")}
    assert {*OTHERS, "DIM", "AXES", "GROUP_FRAMES", *same} == set(flat(cfg.MODEL.NON_LOCAL))


@pytest.mark.parametrize("key", OTHERS)
def test_every_key_does_something(nl_cfg, key):
    value, parts = OTHERS[key]
    changed = nl_cfg.clone()
    changed.merge_from_list([f"MODEL.NON_LOCAL.{key}", value])
    for part in BOTH:
        shapes, out = fingerprint(nl_cfg, part)
        new_shapes, new_out = fingerprint(changed, part)
        assert (shapes != new_shapes or not torch.equal(out, new_out)) == (part in parts)


def test_head_has_its_own_norm_and_subsample_and_is_2d(nl_cfg):
    node = nl_cfg.MODEL.NON_LOCAL
    node.SUBSAMPLE, node.KEYPOINT_HEAD.SUBSAMPLE = 3, 2
    node.NORM, node.KEYPOINT_HEAD.NORM = "BN", "GN"
    block = build(nl_cfg, "backbone").res4.non_local4
    assert block.subsample == 3
    assert isinstance(block.norm, torch.nn.BatchNorm2d)
    node.DIM, node.AXES = 3, "space"
    block = build(nl_cfg, "head").non_local2
    assert (block.subsample, type(block.norm)) == (2, torch.nn.GroupNorm)
    assert (block.dim, block.axes) == (2, "spacetime")


@pytest.mark.parametrize("builder", ["build_non_local_resnet_fpn", "build_resnet_fpn"])
@pytest.mark.parametrize(
    ("yaml", "wrong", "right"),
    [
        ("{PAIRWSE: gaussian}", "PAIRWSE", "PAIRWISE"),
        ("{SUB_SAMPLE: 1}", "SUB_SAMPLE", "SUBSAMPLE"),
        ("{AFTER_BLOCKS: {RES_4: [1]}}", "AFTER_BLOCKS.RES_4", "AFTER_BLOCKS.RES4"),
        ("{KEYPOINT_HEAD: {NROM: GN}}", "KEYPOINT_HEAD.NROM", "KEYPOINT_HEAD.NORM"),
    ],
)
def test_misspelt_key_of_a_file(cfg, tmp_path, builder, yaml, wrong, right):
    """Also where nothing reads the node: the blocks would silently be missing."""
    path = tmp_path / "config.yaml"
    path.write_text(f"MODEL: {{BACKBONE: {{NAME: {builder}_backbone}}, NON_LOCAL: {yaml}}}")
    with pytest.raises(KeyError, match=f"key: MODEL.NON_LOCAL.{wrong}"):  # in stock tools
        cfg.merge_from_file(str(path))
    names = f"key: MODEL.NON_LOCAL.{wrong}; did you mean MODEL.NON_LOCAL.{right}"
    with pytest.raises(ValueError, match=names):
        load_config(path)


@pytest.mark.parametrize("part", sorted(BOTH))
@pytest.mark.parametrize(
    ("node", "wrong", "right"),
    [("", "SUB_SAMPLE", "SUBSAMPLE"), (".KEYPOINT_HEAD", "AFTER_CONV", "AFTER_CONVS")],
)
def test_misspelt_key_in_code(nl_cfg, part, node, wrong, right):
    path = f"MODEL.NON_LOCAL{node}"
    setattr(attrgetter(path)(nl_cfg), wrong, 1)  # yacs takes any
    with pytest.raises(
        ValueError, match=f"unknown config key {path}.{wrong}, did you mean {right}"
    ):
        build(nl_cfg, part)


@pytest.mark.parametrize("part", sorted(BOTH))
def test_missing_node(nl_cfg, part):
    nl_cfg.MODEL.pop("NON_LOCAL")
    with pytest.raises(KeyError, match="add_non_local_config.*DETECTRON2_ENV_MODULE") as error:
        build(nl_cfg, part)
    assert "MODEL.NON_LOCAL is missing" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "part", "message"),
    [
        ("PAIRWISE", "softmax", "backbone", "PAIRWISE.*'gaussian'.*got 'softmax'"),
        ("DIM", 3, "backbone", "MODEL.NON_LOCAL.DIM.* must be 2, .*got 3"),
        ("AXES", "space", "backbone", "axes 'space'.*key DIM.* must be 3, got 2"),
        ("NORM", "FrozenBN", "backbone", "'FrozenBN'.*one of"),
        ("STAGE_OPTIONS.RES4", ("DPI", 3), "backbone", r"STAGE_OPTIONS.RES4 .*'SUBSAMPLE'.*'DPI'"),
        ("STAGE_OPTIONS.RES4", ("NORM",), "backbone", "RES4 must be keys .* and values in turn"),
        ("STAGE_OPTIONS.RES4", ("NORM", 3), "backbone", "STAGE_OPTIONS.RES4: .*NORM"),
        ("STAGE_OPTIONS.RES3", ("NORM", "BN"), "backbone", "RES3.*no block is inserted"),
        ("AFTER_BLOCKS.RES4", (6,), "backbone", r"AFTER_BLOCKS.RES4.*\[-6, 5\], got \[6\]"),
        ("KEYPOINT_HEAD.AFTER_CONVS", (9,), "head", "AFTER_CONVS.*1 to 8.*got"),
        ("KEYPOINT_HEAD.NORM", "LN", "head", "NORM.*'GN'.*got 'LN'"),
    ],
)
def test_wrong_values(nl_cfg, key, value, part, message):
    nl_cfg.merge_from_list([f"MODEL.NON_LOCAL.{key}", value])
    with pytest.raises(ValueError, match=message):
        build(nl_cfg, part)


@pytest.mark.parametrize(("key", "value"), [("SCALE", 2), ("AFTER_BLOCKS.RES4", 4), ("NORM", 1)])
def test_values_of_another_type(cfg, key, value):
    with pytest.raises(ValueError, match=key):
        cfg.merge_from_list([f"MODEL.NON_LOCAL.{key}", value])


# As the version before wrote it, without DIM and AXES.
OLD_CONFIG = """
MODEL:
  BACKBONE: {NAME: build_non_local_resnet_fpn_backbone}
  NON_LOCAL:
    ACTIVATION_CHECKPOINT: false
    AFTER_BLOCKS: {RES2: [], RES3: [1, 3], RES4: [-2], RES5: []}
    KEYPOINT_HEAD: {AFTER_CONVS: [2, 4, 6, 8], NORM: "", SUBSAMPLE: 1}
    NORM: ""
    PAIRWISE: embedded_gaussian
    REDUCTION: 2
    SCALE: true
    SUBSAMPLE: 2
    SUBSAMPLE_POSITION: before_conv
"""


def test_config_of_the_version_before(cfg, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(OLD_CONFIG)
    cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES3 = (1, 3)
    assert load_config(file).MODEL.NON_LOCAL == cfg.MODEL.NON_LOCAL
    assert (cfg.MODEL.NON_LOCAL.DIM, cfg.MODEL.NON_LOCAL.AXES) == (2, "spacetime")


STOCK = {
    "build_non_local_resnet_backbone": "build_resnet_backbone",
    "build_non_local_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_non_local_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
}


@pytest.mark.parametrize(("builder", "stock"), STOCK.items())
def test_config_without_blocks(cfg, builder, stock):
    cfg.MODEL.BACKBONE.NAME = stock
    expected = cfg.clone()
    assert without_blocks(expected) == expected
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
    cfg.freeze()
    assert without_blocks(cfg) == expected
    assert cfg.MODEL.BACKBONE.NAME == builder


@pytest.mark.parametrize("key", ["BACKBONE", "ROI_KEYPOINT_HEAD"])
def test_builder_without_a_known_stock_counterpart(cfg, key, monkeypatch):
    cfg.MODEL[key].NAME = "build_non_local_vovnet"
    known = "known: build_non_local_resnet_backbone, .*NonLocalKeypointHead.*STOCK_BUILDERS"
    message = f"no stock counterpart .* MODEL.{key}.NAME 'build_non_local_vovnet'; {known}"
    with pytest.raises(ValueError, match=message):
        without_blocks(cfg)
    monkeypatch.setitem(config.STOCK_BUILDERS, "build_non_local_vovnet", "build_vovnet")
    assert without_blocks(cfg).MODEL[key].NAME == "build_vovnet"


def test_load_config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("MODEL:\n  MASK_ON: True\n  NON_LOCAL:\n    REDUCTION: 4\n")
    cfg = load_config(file, ["MODEL.NON_LOCAL.REDUCTION", "1"])
    assert cfg.MODEL.MASK_ON
    assert cfg.MODEL.NON_LOCAL.REDUCTION == 1
    assert cfg.MODEL.DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load_config(file, ["MODEL.DEVICE", "meta"]).MODEL.DEVICE == "meta"


def test_load_config_of_another_task(tmp_path):
    def get_config():
        return CfgNode({"VERSION": 2, "MODEL": {"DEVICE": "cpu", "CLIP": {"FRAMES": 8}}})

    file = tmp_path / "config.yaml"
    file.write_text("MODEL: {CLIP: {FRAMES: 4}}")
    assert load_config(file, get_config=get_config).MODEL.CLIP.FRAMES == 4
    with pytest.raises(ValueError, match=r"MODEL.FRAMES; did you mean MODEL.CLIP.FRAMES\?"):
        load_config(file, ["MODEL.FRAMES", 4], get_config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL:\n  MASKON: True\n", "MODEL.MASKON; did you mean MODEL.MASK_ON?"),
        ("MODEL:\n  MASK_ON: maybe\n", "MODEL.MASK_ON"),
        ("MODEL: [\n", "config.yaml is not a YAML config"),
        ("", "config.yaml is not a YAML config"),
        ("model\n", "config.yaml is not a YAML config"),
        ("\0", "config.yaml is not a YAML config"),
    ],
)
def test_wrong_config_file(text, message, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(file)


def test_config_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="lost.yaml' does not exist"):
        load_config(tmp_path / "lost.yaml")
    with pytest.raises(ValueError, match="a.py is a LazyConfig"):
        load_config(tmp_path / "a.py")
    (tmp_path / "config.yaml").write_text("SEED: 1\n")
    with pytest.raises(ValueError, match="odd length"):
        load_config(tmp_path / "config.yaml", ["SEED"])
