"""All files under configs/, found by glob: what they build, and what they are equal to."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from torch import nn

from nl_detectron.config import default_config, without_blocks
from nl_detectron.non_local import find_blocks
from tests.running import ROOT

CONFIGS = ROOT / "configs"

_RES4 = "backbone.bottom_up.res4.non_local"
_HEAD = [f"roi_heads.keypoint_head.non_local{i}" for i in (2, 4, 6, 8)]
_R18, _R50, _R101, _X152 = ([f"{_RES4}{i}"] for i in (0, 4, 21, 34))
_NL5 = [f"backbone.bottom_up.res3.non_local{i}" for i in (1, 3)]
_NL5 += [f"{_RES4}{i}" for i in (1, 3, 5)]

# From the paper. Config: the row of Table 5 or 6 that it answers to, and where its blocks are: one
# right before the last of the 2, 6, 23 or 36 residual blocks of res4; in the head, one after every
# two of the 8 convolutions.
LEAVES = {
    "COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x": ("R50 +1", _R50),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_3x": ("R50 +1", _R50),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_NL5_FPN_1x": (None, _NL5),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_NL_FPN_3x": ("R101 +1", _R101),
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_NL_FPN_3x": (None, _R101),
    "COCO-InstanceSegmentation/mask_rcnn_X_152_32x8d_NL_FPN_1x": ("X152 +1", _X152),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_NLhead_1x": (None, _HEAD),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_NLhead_3x": (None, _HEAD),
    "COCO-Keypoints/keypoint_rcnn_R_50_NL_FPN_NLhead_1x": (None, _R50 + _HEAD),
    "COCO-Keypoints/keypoint_rcnn_R_50_NL_FPN_NLhead_3x": (None, _R50 + _HEAD),
    "COCO-Keypoints/keypoint_rcnn_R_101_FPN_NLhead_3x": ("R101 +4", _HEAD),
    "COCO-Keypoints/keypoint_rcnn_R_101_NL_FPN_NLhead_3x": ("R101 +4 +1", _R101 + _HEAD),
    "COCO-Detection/faster_rcnn_R_50_NL_FPN_1x": (None, _R50),
    "COCO-Detection/faster_rcnn_R_50_NL_FPN_3x": (None, _R50),
    "COCO-Detection/retinanet_R_50_NL_FPN_1x": (None, _R50),
    "quick_schedules/mask_rcnn_R_50_NL_FPN_instant_test": (None, _R50),
    "quick_schedules/keypoint_rcnn_R_50_NL_FPN_NLhead_instant_test": (None, _R50 + _HEAD),
    "quick_schedules/retinanet_R_50_NL_FPN_instant_test": (None, _R50),
}
BLOCKS = {leaf: names for leaf, (_, names) in LEAVES.items()}
# YAML only: tools/overfit.py reads no other.
YAML_BLOCKS = {
    **BLOCKS,
    "quick_schedules/mask_rcnn_R_18_NL_FPN_overfit": _R18,
    "quick_schedules/keypoint_rcnn_R_18_NL_FPN_NLhead_overfit": _R18 + _HEAD,
}
FIRST_LINES = {
    "R50 +1": "Table 5, R50 +1 NL: 39.0 box AP, 35.5 mask AP",
    "R101 +1": "Table 5, R101 +1 NL: 40.8 box AP, 37.1 mask AP",
    "X152 +1": "Table 5, X152 +1 NL: 45.0 box AP, 40.3 mask AP",
    "R101 +4": "Table 6, R101 +4 NL in the head: 66.0 keypoint AP",
    "R101 +4 +1": "Table 6, R101 +4 NL in the head, +1 in the backbone: 66.5 keypoint AP",
}
INSTANT = [leaf for leaf in LEAVES if leaf.startswith("quick_schedules/")]
# detectron2 ships the same file without the blocks' tokens in its name, except for these.
WITHOUT_STOCK_LEAF = ["COCO-InstanceSegmentation/mask_rcnn_X_152_32x8d_NL_FPN_1x", *INSTANT]
WITH_STOCK_LEAF = [leaf for leaf in LEAVES if leaf not in WITHOUT_STOCK_LEAF]

each_leaf = pytest.mark.parametrize("leaf", LEAVES)
each_yaml_leaf = pytest.mark.parametrize("leaf", YAML_BLOCKS)


def load_yaml(path):
    cfg = default_config()
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "meta"  # shapes without numbers: all models are built in seconds
    return cfg


def load_stock_yaml(name):
    return load_yaml(model_zoo.get_config_file(name))


@functools.cache
def load_lazy(leaf):
    return LazyConfig.load(str(CONFIGS / f"{leaf}.py"))


@functools.cache
def yaml_model(leaf):
    with torch.device("meta"):
        return build_model(load_yaml(CONFIGS / f"{leaf}.yaml"))


@functools.cache
def lazy_model(leaf):
    with torch.device("meta"):
        return instantiate(load_lazy(leaf).model)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def parameters(model):
    return {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}


def settings(model):
    """What a model knows besides tensors: the plain attributes of its modules and their helpers."""

    def plain(value):
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, (str, int, float, type(None))):
            return value
        if callable(value) or isinstance(value, (nn.Module, torch.Tensor, torch.device)):
            return type(value).__name__
        return {"type": type(value).__name__, **plain(vars(value))}

    hidden = vars(nn.Module()).keys()
    return {
        name: plain({key: value for key, value in vars(module).items() if key not in hidden})
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(("suffix", "expected"), [(".yaml", YAML_BLOCKS), (".py", BLOCKS)])
def test_every_file_is_expected(suffix, expected):
    files = [path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob(f"*{suffix}")]
    leaves = [f for f in files if not f.name.startswith("Base-") and f.parts[0] != "common"]
    assert sorted(leaf.as_posix() for leaf in leaves) == sorted(expected)
    for path in CONFIGS.rglob("*.yaml"):
        yaml.safe_load(path.read_text())  # which runs no code


@each_leaf
@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_first_line_names_the_row_of_the_paper(leaf, suffix):
    first_line = (CONFIGS / f"{leaf}{suffix}").read_text().splitlines()[0]
    if row := LEAVES[leaf][0]:
        assert first_line == f"# {FIRST_LINES[row]} (paper, not reproduced here)"
    else:
        start = "# Short run of " if leaf in INSTANT else "# No row in the paper: "
        assert first_line.startswith(start)


@pytest.mark.parametrize(
    "base",
    ["Base-RCNN-FPN", "Base-RetinaNet", "COCO-Keypoints/Base-Keypoint-RCNN-FPN"],
)
def test_base_is_equal_to_the_installed_one(base):
    assert load_yaml(CONFIGS / f"{base}.yaml") == load_stock_yaml(f"{base}.yaml")


def test_legend_of_presets():
    """As many blocks a stage as in the paper, in places that the stage has, none taken twice."""
    legend = (CONFIGS / "Base-RCNN-NL-FPN.yaml").read_text().split("_BASE_")[0].splitlines()
    (header,) = (line for line in legend if "R101" in line)
    found, number = {}, 0
    for line in legend:
        number = int((re.findall(r"(\d+) blocks? ", line) or [number])[0])
        middle = header.index("R101")
        for depth, column in ((50, line[:middle]), (101, line[middle:])):
            for stage, places in re.findall(r"RES(\d) (\(.*?\))", column):
                length = {3: 4, 4: 6 if depth == 50 else 23}[int(stage)]
                taken = {range(length)[i] for i in ast.literal_eval(places)}
                found.setdefault((depth, number), {})[int(stage)] = len(taken)
    sizes = {1: {4: 1}, 5: {3: 2, 4: 3}, 10: {3: 4, 4: 6}}
    assert found == {(depth, n): sizes[n] for depth in (50, 101) for n in sizes}


@each_yaml_leaf
def test_blocks_are_where_the_paper_has_them(leaf):
    model = yaml_model(leaf)
    assert list(find_blocks(model)) == YAML_BLOCKS[leaf]
    for name, block in find_blocks(model).items():
        parent, _, child = name.rpartition(".")
        children = [name for name, _ in model.get_submodule(parent).named_children()]
        number = child[len("non_local") :]
        previous = f"conv_fcn_relu{number}" if "head" in parent else number
        assert children[children.index(child) - 1] == previous
        assert block.norm is None
        assert block.subsample == (1 if "head" in parent else 2)


@each_yaml_leaf
def test_blocks_add_parameters_and_change_none(leaf):
    """So a checkpoint of the model without them has all that the rest needs, by its names."""
    with torch.device("meta"):
        stock = build_model(without_blocks(load_yaml(CONFIGS / f"{leaf}.yaml")))
    for kind in (parameters, shapes):
        ours = kind(yaml_model(leaf))
        added = {name: ours.pop(name) for name in list(ours) if ".non_local" in name}
        assert ours == kind(stock)
        assert len(added) == 8 * len(YAML_BLOCKS[leaf])  # weight, bias: theta, phi, g, conv_out
        assert all(p.requires_grad for n, p in yaml_model(leaf).named_parameters() if n in added)


@each_leaf
def test_lazy_config_builds_the_same_model(leaf):
    """Its layers, in their order, their parameters and settings."""
    assert shapes(yaml_model(leaf)) == shapes(lazy_model(leaf))
    assert parameters(yaml_model(leaf)) == parameters(lazy_model(leaf))
    ours, theirs = settings(yaml_model(leaf)), settings(lazy_model(leaf))
    if "roi_heads.box_predictor" in ours:
        # A loss that has no entry weighs 1.
        ours["roi_heads.box_predictor"]["loss_weight"].setdefault("loss_cls", 1.0)
    assert list(ours.items()) == list(theirs.items())


@each_leaf
def test_lazy_config_has_the_same_data_and_schedule(leaf):
    cfg, lazy = load_yaml(CONFIGS / f"{leaf}.yaml"), load_lazy(leaf)
    train, test = lazy.dataloader.train, lazy.dataloader.test
    solver, data = cfg.SOLVER, cfg.INPUT
    resize, flip = train.mapper.augmentations
    assert (train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (test.dataset.names,) == cfg.DATASETS.TEST
    assert train.total_batch_size == solver.IMS_PER_BATCH
    assert train.num_workers == cfg.DATALOADER.NUM_WORKERS
    assert tuple(resize.short_edge_length) == data.MIN_SIZE_TRAIN
    assert resize.max_size == data.MAX_SIZE_TRAIN
    assert (flip.horizontal, data.RANDOM_FLIP) == (True, "horizontal")
    test_resize = test.mapper.augmentations[0]
    assert test_resize.short_edge_length == data.MIN_SIZE_TEST
    assert test_resize.max_size == data.MAX_SIZE_TEST
    assert train.mapper.use_instance_mask == cfg.MODEL.MASK_ON
    assert train.mapper.get("use_keypoint", False) == cfg.MODEL.KEYPOINT_ON
    assert train.mapper.image_format == data.FORMAT

    assert list(lazy.model.pixel_mean) == cfg.MODEL.PIXEL_MEAN
    assert list(lazy.model.pixel_std) == cfg.MODEL.PIXEL_STD
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS

    assert lazy.optimizer.lr == solver.BASE_LR
    assert lazy.optimizer.momentum == solver.MOMENTUM
    assert lazy.optimizer.weight_decay == solver.WEIGHT_DECAY
    assert lazy.optimizer.params.weight_decay_norm == solver.WEIGHT_DECAY_NORM
    steps = lazy.lr_multiplier.scheduler
    assert list(steps.milestones) == [*solver.STEPS, solver.MAX_ITER]
    gammas = [solver.GAMMA**k for k in range(len(steps["values"]))]
    assert list(steps["values"]) == pytest.approx(gammas)
    assert lazy.train.max_iter == solver.MAX_ITER
    assert lazy.lr_multiplier.warmup_length * solver.MAX_ITER == pytest.approx(solver.WARMUP_ITERS)
    assert lazy.lr_multiplier.warmup_factor == solver.WARMUP_FACTOR


@pytest.mark.parametrize("leaf", WITH_STOCK_LEAF)
def test_without_its_blocks_a_config_is_the_installed_one(leaf):
    stock = load_stock_yaml(re.sub("_NL5?(?=_FPN)|_NLhead", "", leaf) + ".yaml")
    cfg = without_blocks(load_yaml(CONFIGS / f"{leaf}.yaml"))
    cfg.MODEL.NON_LOCAL = stock.MODEL.NON_LOCAL
    assert cfg == stock


@pytest.mark.parametrize("leaf", INSTANT)
def test_instant_test_is_short_small_and_from_scratch(leaf):
    cfg = load_yaml(CONFIGS / f"{leaf}.yaml")
    assert cfg.SOLVER.MAX_ITER <= 20
    assert cfg.SOLVER.IMS_PER_BATCH <= 2
    assert max(cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) <= 320
    assert cfg.MODEL.WEIGHTS == ""
    model = yaml_model(leaf)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("start", ["", "configs"])
def test_lazy_config_loads_by_relative_path(start, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent / start)
    leaf = "COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.py"
    path = (CONFIGS / leaf).relative_to(Path.cwd())
    assert LazyConfig.load(str(path)) == load_lazy(leaf[: -len(".py")])
