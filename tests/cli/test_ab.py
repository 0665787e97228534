"""tools/ab.py, as a person runs it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from detectron2.modeling import build_model
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.config import load_config
from nl_detectron.engine.coco.trainer import read_config
from nl_detectron.engine.launch import launch
from nl_detectron_cli import ab
from tests.running import QUICK, ROOT, TINY, custom_data_arguments, run

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"


def coco_ap(json_file, results, task):
    """AP in percent, by pycocotools alone."""
    truth = COCO(str(json_file))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]


def test_trains_and_compares_twins(custom_data, tmp_path):
    command = ["tools/ab.py", "--config-file", CONFIG, *custom_data_arguments(custom_data, "train")]
    command += [*custom_data_arguments(custom_data, "test"), "--scale-lr", "OUTPUT_DIR", tmp_path]
    command += [*TINY, "SOLVER.IMS_PER_BATCH", "1"]
    done = run(*command, "TEST.EVAL_PERIOD", "0", "SOLVER.MAX_ITER", "3", "SEED", "-1")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stdout + done.stderr
    assert re.findall("Training .*", done.stdout) == [
        "Training 1 of 2: stock",
        "Training 2 of 2: non-local",
    ]

    numbers = json.loads((tmp_path / "ab.json").read_text())
    stock, non_local = (numbers["losses"][twin]["total_loss"] for twin in ("stock", "non_local"))
    assert stock[0] == non_local[0]
    assert len(stock) == len(non_local) == 3
    assert stock[1:] != non_local[1:]
    assert f"{stock[0]} in both, bit for bit" in done.stdout

    table = [line.split() for line in done.stdout.splitlines()[-7:-3]]
    assert table[0] == ["box", "AP", "mask", "AP"]
    for row, label in zip(table[1:], ("stock", "non_local", "difference")):
        ap = numbers["ap"][label]
        assert row[0] == label.replace("_", "-")
        assert [float(x) for x in row[1:]] == pytest.approx([ap["bbox"], ap["segm"]], abs=0.051)

    for twin, aps in list(numbers["ap"].items())[:2]:
        found = tmp_path / twin / "inference" / "coco_instances_results.json"
        for task, ap in aps.items():
            assert ap == pytest.approx(coco_ap(custom_data, found, task), abs=1e-6)
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    for twin, builder in (("stock", "build_resnet"), ("non_local", "build_non_local_resnet")):
        assert (tmp_path / twin / "model_final.pth").exists()
        assert "  BASE_LR: 0.005\n" in (tmp_path / twin / "config.yaml").read_text()
        assert f"NAME: {builder}_fpn_backbone" in (tmp_path / twin / "config.yaml").read_text()


def test_no_blocks(custom_data, tmp_path):
    arguments = ["--config-file", ROOT / "configs/Base-RCNN-FPN.yaml", "OUTPUT_DIR", tmp_path]
    arguments = [*custom_data_arguments(custom_data, "train"), *arguments, "DATASETS.TEST", "()"]
    args = ab.parse_args([str(argument) for argument in arguments])
    with pytest.raises(SystemExit, match="Base-RCNN-FPN.yaml has no blocks to compare"):
        launch(ab.compare, args, read_config, ab.check)


@pytest.fixture
def launch_ab(custom_data, tmp_path):
    def launch_ab(*options, flags=(), main=None):
        words = ["--config-file", CONFIG, *custom_data_arguments(custom_data, "train", "test")]
        words += [*flags, "OUTPUT_DIR", tmp_path, *TINY, "TEST.EVAL_PERIOD", "0", *options]
        launch(
            main or ab.compare, ab.parse_args([str(word) for word in words]), read_config, ab.check
        )

    return launch_ab


def test_nothing_detected(launch_ab, tmp_path, capsys):
    launch_ab("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.1")
    numbers = json.loads((tmp_path / "ab.json").read_text())
    zeros = {"bbox": 0.0, "segm": 0.0}
    assert numbers["ap"] == dict.fromkeys(("stock", "non_local", "difference"), zeros)
    stock, non_local, difference = capsys.readouterr().out.splitlines()[-6:-3]
    assert stock.split() == ["stock", "0.0", "0.0"]
    assert non_local.split() == ["non-local", "0.0", "0.0"]
    assert difference.split() == ["difference", "+0.0", "+0.0"]


def test_weights_with_trained_blocks(launch_ab, tmp_path):
    """Without blocks it would be a network that no one has trained."""
    model = build_model(load_config(CONFIG, [*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", "1"]))
    weights = tmp_path / "trained.pth"
    torch.save({"model": model.state_dict()}, weights)
    with pytest.raises(SystemExit, match="holds non-local blocks .*--strip-blocks"):
        launch_ab("MODEL.WEIGHTS", weights)
    began = []
    launch_ab("MODEL.WEIGHTS", weights, flags=["--strip-blocks"], main=began.append)
    assert began


@pytest.mark.parametrize("option", ["--resume", "--eval-only"])
def test_options_without_a_meaning(option, capsys):
    with pytest.raises(SystemExit):
        ab.parse_args(["--config-file", str(CONFIG), option])
    assert "both models are trained from the start" in capsys.readouterr().err
