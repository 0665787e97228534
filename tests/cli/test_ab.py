"""Training with and without blocks, and the comparison that is written and printed."""

from __future__ import annotations

import json
import re

import pytest
import torch
from detectron2.modeling import build_model
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.config import load_config
from nl_detectron_cli import ab
from tests.running import QUICK, TINY, custom_data_arguments, launched, run

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"


def coco_ap(json_file, results, task):
    """AP in percent, by pycocotools alone."""
    truth = COCO(str(json_file))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]


def test_trains_and_compares_both(custom_data, tmp_path):
    data = custom_data_arguments(custom_data, "train", "test")
    options = *TINY, "SOLVER.IMS_PER_BATCH 1 SOLVER.MAX_ITER 3 SEED -1"
    command = "tools/ab.py --scale-lr --config-file", CONFIG, *data, "OUTPUT_DIR", tmp_path
    done = run(*command, *options)
    assert "Warning" not in done.stdout + done.stderr
    trainings = ["Training 1 of 2: stock", "Training 2 of 2: non-local"]
    assert re.findall("Training .*", done.stdout) == trainings

    numbers = json.loads((tmp_path / "ab.json").read_text())
    stock, non_local = (numbers["losses"][name]["total_loss"] for name in ("stock", "non_local"))
    assert stock[0] == non_local[0]
    assert len(stock) == len(non_local) == 3
    assert f"{stock[0]} in both, bit for bit" in done.stdout

    table = [line.split() for line in done.stdout.splitlines()[-7:-3]]
    assert table[0] == ["box", "AP", "mask", "AP"]
    for row, label in zip(table[1:], ("stock", "non_local", "difference")):
        ap = numbers["scores"][label]
        assert row[0] == label.replace("_", "-")
        assert [float(x) for x in row[1:]] == pytest.approx(
            [ap["bbox/AP"], ap["segm/AP"]], abs=0.051
        )

    assert (tmp_path / "losses.png").stat().st_size > 10_000
    for name, builder in (("stock", "build_resnet"), ("non_local", "build_non_local_resnet")):
        for score, ap in numbers["scores"][name].items():
            found = tmp_path / name / "inference" / "coco_instances_results.json"
            assert ap == pytest.approx(coco_ap(custom_data, found, score.split("/")[0]), abs=1e-6)
        weights = torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        assert any(".non_local" in key for key in weights) == (name == "non_local")
        config = (tmp_path / name / "config.yaml").read_text()
        assert "  BASE_LR: 0.005\n" in config
        assert f"NAME: {builder}_fpn_backbone" in config


@pytest.fixture
def check(custom_data, tmp_path):
    """Ends without a comparison where the arguments are right."""

    def check(*arguments, config=CONFIG):
        data, began = custom_data_arguments(custom_data, "train"), []
        launched(ab, began.append, "--config-file", config, *data, *arguments, *TINY)
        assert began

    return check


def test_no_blocks(check, tmp_path):
    with pytest.raises(SystemExit, match="Base-RCNN-FPN.yaml has no blocks to compare"):
        check("OUTPUT_DIR", tmp_path, config="Base-RCNN-FPN.yaml")


def test_no_norms_to_fold(check, tmp_path):
    with pytest.raises(SystemExit, match="--fold-norms: the model has no frozen batch norm"):
        check("--fold-norms OUTPUT_DIR", tmp_path)


def test_weights_with_trained_blocks(check, tmp_path):
    """Without blocks it would be a network that no one has trained."""
    model = build_model(load_config(CONFIG, [*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", "1"]))
    weights = tmp_path / "trained.pth"
    torch.save({"model": model.state_dict()}, weights)
    options = "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", weights
    with pytest.raises(SystemExit, match="holds non-local blocks .*--strip-blocks"):
        check(*options)
    check("--strip-blocks", *options)


def test_eval_only_has_no_meaning(capsys):
    with pytest.raises(SystemExit):
        ab.parse_args(["--config-file", str(CONFIG), "--eval-only"])
    assert "both models are trained" in capsys.readouterr().err
