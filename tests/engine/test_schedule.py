"""A schedule scaled to another batch size, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from nl_detectron.config import load_config
from nl_detectron.engine.coco.trainer import read_config
from nl_detectron.engine.schedule import SCALED, scale_schedule, schedule_table
from nl_detectron_cli import ab, train
from tests.running import ROOT

CONFIG = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml"


def values(cfg):
    solver = cfg.SOLVER
    lengths = (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS)
    return (solver.BASE_LR, *lengths, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)


def scaled(*options, file_options=()):
    """Give the scaled values, and the table, of a config with batch size 16."""
    file_cfg = load_config(CONFIG, ["TEST.EVAL_PERIOD", "500", *file_options])
    cfg = file_cfg.clone()
    cfg.merge_from_list(list(options))
    scale_schedule(cfg, file_cfg, options[::2])
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 0
    return values(cfg), schedule_table(cfg, file_cfg, options[::2])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        # 90000 iterations, steps at 60000 and 80000, warm-up 1000, checkpoints every 5000
        (4, (0.005, 360_000, (240_000, 320_000), 4_000, 20_000, 2_000)),
        (6, (0.0075, 240_000, (160_000, 213_333), 2_667, 13_333, 1_333)),
        (64, (0.08, 22_500, (15_000, 20_000), 250, 1_250, 125)),
    ],
)
def test_scales_linearly(batch, expected):
    found, _ = scaled("SOLVER.IMS_PER_BATCH", str(batch))
    assert found == (pytest.approx(expected[0], rel=1e-12), *expected[1:])


def test_given_keys_stay_and_the_table_says_so():
    options = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.STEPS", "(7, 8)", "TEST.EVAL_PERIOD", "9"]
    found, table = scaled(*options, "SOLVER.BASE_LR", "0.02")
    assert found == (0.02, 360_000, (7, 8), 4_000, 20_000, 9)
    assert table.splitlines()[2:] == [
        "| SOLVER.IMS_PER_BATCH | 16 | 4 | given |",
        "| SOLVER.BASE_LR | 0.02 | 0.02 | given |",
        "| SOLVER.MAX_ITER | 90000 | 360000 | |",
        "| SOLVER.STEPS | (60000, 80000) | (7, 8) | given |",
        "| SOLVER.WARMUP_ITERS | 1000 | 4000 | |",
        "| SOLVER.CHECKPOINT_PERIOD | 5000 | 20000 | |",
        "| TEST.EVAL_PERIOD | 500 | 9 | given |",
    ]
    assert all(key in table for key in SCALED)


def test_periods_do_not_become_never():
    periods = ["SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1"]
    assert scaled("SOLVER.IMS_PER_BATCH", "64", file_options=periods)[0][-2:] == (1, 1)
    never = ["TEST.EVAL_PERIOD", "0"]
    assert scaled("SOLVER.IMS_PER_BATCH", "64", file_options=never)[0][-1] == 0


@pytest.mark.parametrize("command", [train, ab])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "IMS_PER_BATCH must be given, and differ from the config's 16, .* got 16"),
        (["SOLVER.IMS_PER_BATCH", "0"], "IMS_PER_BATCH must be given, .* got 0"),
        (
            ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.REFERENCE_WORLD_SIZE", "8"],
            "SOLVER.REFERENCE_WORLD_SIZE must be 0.* got 8",
        ),
    ],
)
def test_refused(command, options, message):
    args = command.parse_args(["--config-file", str(CONFIG), "--scale-lr", *options])
    with pytest.raises(ValueError, match=f"--scale-lr: .*{message}"):
        read_config(args)
