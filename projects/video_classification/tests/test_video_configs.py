"""All configs: the row of the paper that each answers to, where its blocks are, and its cost."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from video_classification.config import default_video_config
from video_classification.data import VideoMapper
from video_classification.models import TemporalShift

from nl_detectron.config import load_config
from nl_detectron.non_local import find_blocks
from tests.running import ROOT

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# From the paper: tables, top-1 and top-5; in Table 4, mAP on train/val and trainval/test
ROWS = {
    "Kinetics/c2d_R_50_32x2": ("2a 2d 2f", 71.8, 89.7),
    "Kinetics/c2d_R_50_NL_gaussian_32x2": ("2a", 72.5, 90.2),
    "Kinetics/c2d_R_50_NL_32x2": ("2a 2c", 72.7, 90.5),
    "Kinetics/c2d_R_50_NL_dot_product_32x2": ("2a", 72.9, 90.3),
    "Kinetics/c2d_R_50_NL_concatenation_32x2": ("2a", 72.8, 90.5),
    "Kinetics/c2d_R_50_NL_res2_32x2": ("2b", 72.7, 90.3),
    "Kinetics/c2d_R_50_NL_res3_32x2": ("2b", 72.9, 90.4),
    "Kinetics/c2d_R_50_NL_res5_32x2": ("2b", 72.3, 90.1),
    "Kinetics/c2d_R_50_NL5_32x2": ("2c 2d", 73.8, 91.0),
    "Kinetics/c2d_R_50_NL10_32x2": ("2c", 74.3, 91.2),
    "Kinetics/c2d_R_101_32x2": ("2c 2f", 73.1, 91.0),
    "Kinetics/c2d_R_101_NL_32x2": ("2c", 74.3, 91.3),
    "Kinetics/c2d_R_101_NL5_32x2": ("2c 2d 2e", 75.1, 91.7),
    "Kinetics/c2d_R_101_NL10_32x2": ("2c", 75.1, 91.6),
    "Kinetics/c2d_R_50_NL5_space_32x2": ("2d", 72.9, 90.8),
    "Kinetics/c2d_R_50_NL5_time_32x2": ("2d", 73.1, 90.5),
    "Kinetics/c2d_R_101_NL5_space_32x2": ("2d", 74.4, 91.3),
    "Kinetics/c2d_R_101_NL5_time_32x2": ("2d", 74.4, 90.5),
    "Kinetics/i3d_3x3x3_R_101_32x2": ("2e", 74.1, 91.2),
    "Kinetics/i3d_R_101_32x2": ("2e 2f", 74.4, 91.1),
    "Kinetics/i3d_R_50_32x2": ("2f", 73.3, 90.7),
    "Kinetics/i3d_R_50_NL5_32x2": ("2f", 74.9, 91.6),
    "Kinetics/i3d_R_101_NL5_32x2": ("2f", 76.0, 92.1),
    "Kinetics/c2d_R_50_128x1": ("2g", 73.8, 91.2),
    "Kinetics/i3d_R_50_128x1": ("2g", 74.9, 91.7),
    "Kinetics/i3d_R_50_NL5_128x1": ("2g 3", 76.5, 92.6),
    "Kinetics/c2d_R_101_128x1": ("2g", 75.3, 91.8),
    "Kinetics/i3d_R_101_128x1": ("2g", 76.4, 92.7),
    "Kinetics/i3d_R_101_NL5_128x1": ("2g 3", 77.7, 93.3),
    "Charades/i3d_R_101_128x1": ("4", 35.5, 37.2),
    "Charades/i3d_R_101_NL5_128x1": ("4", 37.5, 39.5),
}
NO_ROWS = [f"Kinetics/tsm_{name}_8x8" for name in ("R_50", "R_50_NL5", "R_50_online", "R_101")]
# Residual blocks that blocks come after: right before the last one of a stage; else from the
# released code, for R101 with ten from GluonCV, and TSM's own
PLACES = {
    ("R_50", "NL"): {"res4": [4]},
    ("R_50", "NL_res2"): {"res2": [1]},
    ("R_50", "NL_res3"): {"res3": [2]},
    ("R_50", "NL_res5"): {"res5": [1]},
    ("R_50", "NL5"): {"res3": [1, 3], "res4": [1, 3, 5]},
    ("R_50", "NL10"): {"res3": [0, 1, 2, 3], "res4": [0, 1, 2, 3, 4, 5]},
    ("R_101", "NL"): {"res4": [21]},
    ("R_101", "NL5"): {"res3": [1, 3], "res4": [6, 13, 20]},
    ("R_101", "NL10"): {"res3": [0, 1, 2, 3], "res4": [2, 6, 10, 14, 18, 22]},
    ("tsm", "NL5"): {"res3": [0, 2], "res4": [0, 2, 4]},
}


def load(leaf, *options):
    return load_config(
        CONFIGS / f"{leaf}.yaml", ["MODEL.DEVICE", "meta", *options], default_video_config
    )


@functools.cache
def build(leaf, *options):
    cfg = load(leaf, *options)
    with torch.device("meta"):
        return build_model(cfg).eval()


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_every_file_is_expected_and_is_there_as_yaml_and_lazy(suffix):
    files = [path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob(f"*{suffix}")]
    leaves = {f.as_posix() for f in files if f.parts[0] in ("Kinetics", "Charades")}
    assert leaves == {*ROWS, *NO_ROWS}


@pytest.mark.parametrize("leaf", ROWS)
def test_first_line_names_the_row_of_the_paper(leaf):
    line, lazy = ((CONFIGS / f"{leaf}{s}").read_text().splitlines()[0] for s in (".yaml", ".py"))
    assert lazy == line
    tables, *numbers = ROWS[leaf]
    assert re.match(f"# Tables? {tables.split()[0]}.*paper, not reproduced here\\)$", line)
    assert all(re.search(rf"\b{table}\b", line) for table in tables.split())
    assert [float(number) for number in re.findall(r"\d\d\.\d", line)][:2] == numbers


@pytest.mark.parametrize("leaf", [*ROWS, *NO_ROWS])
def test_leaf_is_what_its_name_says(leaf):
    model = build(leaf)
    depth = "R_101" if "R_101" in leaf else "R_50"
    residual = [n for n, _ in model.backbone.res4.named_children() if n.isdigit()]
    assert len(residual) == {"R_50": 6, "R_101": 23}[depth]

    blocks = find_blocks(model)
    kind = re.search(r"NL\d*(_res\d)?", leaf)
    family = "tsm" if "tsm" in leaf else depth
    places = PLACES[family, kind[0]] if kind else {}
    names = [f"backbone.{stage}.non_local{i}" for stage in places for i in places[stage]]
    assert list(blocks) == names
    for name, block in blocks.items():
        stage, i = name.split(".")[1], name.split("non_local")[1]
        children = [child for child, _ in model.backbone.get_submodule(stage).named_children()]
        assert children[children.index(f"non_local{i}") - 1] == i
        pairwise = re.search("gaussian|dot_product|concatenation", leaf)
        assert block.pairwise == (pairwise[0] if pairwise else "embedded_gaussian")
        axes = re.search("(?<=_)(space|time)", leaf)
        assert block.axes == (axes[0] if axes else "spacetime")
        assert block.subsample == (1 if block.axes == "time" else 2)
        assert block.subsample_position == ("after_conv" if "tsm" in leaf else "before_conv")
        assert block.scale == ("tsm" not in leaf)
        assert block.group_frames == (4 if "128x1" in leaf and stage == "res3" else 0)
        assert (block.norm is None) == ("128x1" in leaf)

    kernels = {n: m.kernel_size[0] for n, m in model.named_modules() if isinstance(m, nn.Conv3d)}
    assert kernels["backbone.stem.conv1"] == (5 if "i3d" in leaf else 1)
    assert kernels["backbone.res2.0.conv1"] == (3 if "i3d_R" in leaf else 1)
    assert kernels["backbone.res2.0.conv2"] == (3 if "i3d_3x3x3" in leaf else 1)
    frozen = not any(name.endswith("norm.weight") for name, _ in model.named_parameters())
    assert frozen == ("128x1" in leaf)
    shifts = [m.direction for m in model.modules() if isinstance(m, TemporalShift)]
    if "tsm" in leaf:
        direction = "unidirectional" if "online" in leaf else "bidirectional"
        assert shifts == [direction] * (16 if depth == "R_50" else 2 + 2 + 12 + 2)
    else:
        assert shifts == []
    classes = 157 if "Charades" in leaf else 400
    assert (model.head.linear.out_features, model.head.multi_label) == (classes, classes == 157)


def test_small_network_for_a_cpu():
    model = build("quick_schedules/i3d_R_26_NL_8x5_overfit")
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv3d, nn.Linear))]
    assert len([n for n in layers if "shortcut" not in n and "non_local" not in n]) == 26
    assert list(find_blocks(model)) == ["backbone.res4.non_local0"]


@pytest.mark.parametrize("leaf", [*ROWS, *NO_ROWS])
def test_lazy_config_is_the_same_model(leaf):
    """All layers with what they print of themselves, and what they do not print."""
    windows = {"Charades/i3d": 9, "Kinetics/tsm": 0, "Kinetics/c2d": 7, "Kinetics/i3d": 7}
    config, cfg = LazyConfig.load(str(CONFIGS / f"{leaf}.py")).model, load(leaf).MODEL
    with torch.device("meta"):
        lazy, yaml = instantiate(config).eval(), build(leaf)
    assert str(lazy) == str(yaml)
    for (name, ours), (other, theirs) in zip(lazy.named_parameters(), yaml.named_parameters()):
        assert (name, ours.shape, ours.requires_grad) == (other, theirs.shape, theirs.requires_grad)
    assert lazy.feature == yaml.feature == "res5"
    assert lazy.backbone.min_frames == yaml.backbone.min_frames
    assert lazy.head.multi_label == yaml.head.multi_label
    assert lazy.head.pool_size == yaml.head.pool_size == windows[leaf.split("_")[0]]
    assert config.head.get("init_std", 0.01) == cfg.VIDEO.HEAD.INIT_STD
    assert (config.pixel_mean, config.pixel_std) == (cfg.PIXEL_MEAN, cfg.PIXEL_STD)


# From the paper and the released code: frames and stride of a clip; batch, learning rate, and steps
# and iterations in thousands; precise batch norm
TRAINING = {
    "32x2": (32, 2, 64, 0.01, (150, 300), 400, True),
    "128x1": (128, 1, 16, 0.0025, (150, 300), 400, False),
    "8x8": (
        8,
        8,
        128,
        0.02,
        (75, 150),
        187.5,
        False,
    ),  # TSM: 40, 80 and 100 epochs of 240,000 / 128
    "Charades": (128, 1, 8, 0.00125, (75, 150), 200, False),
}
# Frames for training, crop; for testing; starts of clips, and how views are combined
SIZES = {
    "Kinetics": ((256, 320), 224, 256, 256, "released", "mean"),
    "Charades": ((329, 411), 288, 320, 320, "charades", "max"),  # 256, 320 x 288 / 224
}


@pytest.mark.parametrize("leaf", [*ROWS, *NO_ROWS])
def test_training_and_testing(leaf):
    folder, name = leaf.split("/")
    cfg = load(leaf)
    clip, solver, views = cfg.INPUT.CLIP, cfg.SOLVER, cfg.TEST.VIEWS
    found = (
        *(clip.NUM_FRAMES, clip.STRIDE, solver.IMS_PER_BATCH, solver.BASE_LR),
        *(tuple(step / 1000 for step in solver.STEPS), solver.MAX_ITER / 1000),
        cfg.TEST.PRECISE_BN.ENABLED,
    )
    assert found == TRAINING[folder if folder == "Charades" else name.rsplit("_", 1)[1]]
    sizes, crop, short, test_crop, starts, combine = SIZES[folder]
    assert (cfg.INPUT.MIN_SIZE_TRAIN, tuple(cfg.INPUT.CROP.SIZE)) == (sizes, (crop, crop))
    assert (cfg.INPUT.MIN_SIZE_TEST, views.CROP_SIZE, views.COMBINE) == (short, test_crop, combine)
    assert (views.NUM_CLIPS, views.NUM_CROPS) == (10, 3)
    assert views.STARTS == ("tsm" if "tsm" in leaf else starts)
    same = (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WARMUP_ITERS)
    assert same == (0.9, 1e-4, 0.0, 0)
    assert solver.NESTEROV == ("tsm" not in leaf)
    # Whatever the loaders refuse, they refuse here.
    VideoMapper(cfg, is_train=True)
    VideoMapper(cfg, is_train=False)
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())


# Millions of parameters; of convolutions and linear layers alone; and for one clip of 32 frames of
# 224 x 224, 10^9 multiplications with the poolings of Table 1, and with the released ones. Worked
# out from the sizes of the layers.
COSTS = {
    "c2d_R_50": (24.328, 24.274, 20.44, 20.23),
    "c2d_R_101": (43.320, 43.214, 35.29, 35.08),
    "i3d_R_101": (51.754, 51.648, 51.68, 51.38),
    "i3d_3x3x3_R_101": (63.043, 62.937, 62.26, 61.86),
    "c2d_R_101_NL5": (50.678, 50.554, 43.41, 43.21),
    "c2d_R_50_NL": (26.429, None, 21.62, None),
    "c2d_R_50_NL5": (31.686, None, 28.57, None),
    "c2d_R_50_NL10": (39.045, None, 36.69, None),
    "i3d_R_50": (28.043, None, 33.13, None),
    "i3d_R_50_NL5": (35.402, None, 41.26, None),
    "i3d_R_101_NL5": (59.113, None, 59.80, None),
}
# Parameters and multiplications relative to C2D R101; in Table 2e, I3D 3x3x3 is 1.5x and 1.8x, I3D
# 3x1x1 1.2x and 1.5x, NL C2D 1.2x and 1.2x
RATIOS = {
    "i3d_R_101": (1.195, 1.464),
    "i3d_3x3x3_R_101": (1.456, 1.764),
    "c2d_R_101_NL5": (1.170, 1.230),
    "c2d_R_50_NL5": (0.732, 0.810),
    "i3d_R_101_NL5": (1.365, 1.695),
}


@functools.cache
def cost(leaf, pooling, frames=32, *options):
    model = build(f"Kinetics/{leaf}", "MODEL.VIDEO.POOLING", pooling, *options)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, frames, 224, 224, device="meta"))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    kernels = sum(p.numel() for p in model.parameters() if p.dim() > 1) / 1e6
    return parameters, kernels, counter.get_total_flops() / 2e9


@pytest.mark.parametrize("leaf", COSTS)
def test_cost(leaf):
    parameters, kernels, paper, released = COSTS[leaf]
    got = cost(f"{leaf}_32x2", "paper")
    assert round(got[0], 3) == parameters
    assert round(got[2], 2) == paper
    if released:
        assert round(got[1], 3) == kernels
        assert round(cost(f"{leaf}_32x2", "released_32x2")[2], 2) == released
    base = cost("c2d_R_101_32x2", "paper")
    if leaf in RATIOS:
        assert (got[0] / base[0], got[2] / base[2]) == pytest.approx(RATIOS[leaf], abs=0.001)


@pytest.mark.parametrize(("groups", "gmac"), [((), 200.9), (("GROUP_FRAMES", 4), 170.7)])
def test_cost_of_128_frames(groups, gmac):
    options = ("MODEL.NON_LOCAL.STAGE_OPTIONS.RES3", groups)
    assert round(cost("i3d_R_50_NL5_128x1", "paper", 128, *options)[2], 1) == gmac


def test_analyze():
    """The command knows these configs by detectron2's hook; 128 frames, without groups and with."""
    path = os.pathsep.join([str(ROOT), str(CONFIGS.parent)])
    env = os.environ | {"DETECTRON2_ENV_MODULE": "video_classification.env", "PYTHONPATH": path}
    command = [sys.executable, "tools/analyze.py", "--clip-size", "128", "224", "224"]
    for leaf in ("i3d_R_50_NL5_32x2", "i3d_R_50_NL5_128x1"):
        command += ["--config-file", str(CONFIGS / "Kinetics" / f"{leaf}.yaml")]
    command += ["MODEL.VIDEO.POOLING", "paper"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| i3d_R_50")]
    assert rows[0][:2] == ["| i3d_R_50_NL5_32x2", "35,401,936"]
    assert [float(row[3]) for row in rows] == pytest.approx([200.9, 170.7], abs=0.05)
    # Without norms, 53,120 in the trunk, and biases: 400 and, with the norms, 18,432 of the blocks
    assert [row[6] for row in rows] == [f"{35_401_936 - 53_120 - 400 - 18_432:,}"] * 2
    assert [row[-1] for row in rows] == ["1.000 |", f"{170.686 / 200.897:.3f} |"]
    block = "| backbone.res3.non_local1 | 1 x 512 x 16 x 28 x 28 | blocked | 526,592 |"
    assert block in run.stdout
