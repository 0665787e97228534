"""tools/train_net.py --eval-only: what it evaluates, and what it refuses to."""

from __future__ import annotations

import json
import re

import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron.config import load_config
from nl_detectron.engine.coco.metadata import dataset_metadata
from nl_detectron.engine.coco.trainer import read_config
from nl_detectron.engine.launch import launch
from nl_detectron_cli import train
from tests.running import QUICK, TINY, custom_data_arguments

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
PLACE = "MODEL.NON_LOCAL.AFTER_BLOCKS.RES4"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    one_class = ["MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    return build_model(load_config(CONFIG, [*TINY, *one_class])).state_dict()


@pytest.fixture
def evaluate(custom_data, custom_data_name, state, tmp_path):
    def evaluate(*options, keep="", metadata=None):
        kept = {name: value for name, value in state.items() if name.startswith(keep)}
        metadata = metadata or dataset_metadata(custom_data_name)
        torch.save({"model": kept, "metadata": metadata}, tmp_path / "model.pth")
        data = custom_data_arguments(custom_data, "test")
        words = ["--eval-only", "--config-file", CONFIG, *data, "OUTPUT_DIR", tmp_path / "out"]
        words += ["MODEL.WEIGHTS", tmp_path / "model.pth", *TINY, *options]
        args = train.parse_args([str(word) for word in words])
        results = []
        launch(lambda args: results.append(train.train(args)), args, read_config, train.check)
        return results[0]

    return evaluate


def test_results(evaluate, custom_data, tmp_path):
    results = evaluate()
    assert results.keys() == {"bbox", "segm"}
    found = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert {a["category_id"] for a in found} == {3}
    assert {a["image_id"] for a in found} == {1, 2, 3, 4}


def test_nothing_detected(evaluate):
    results = evaluate("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.1")
    assert {task: scores["AP"] for task, scores in results.items()} == {"bbox": 0, "segm": 0}


@pytest.mark.parametrize(
    ("options", "kwargs", "message"),
    [
        (
            "",
            {"keep": "backbone.bottom_up"},
            "weights .*model.pth: .* A backbone is not enough",
        ),
        (
            f"{PLACE} (-1,)",
            {},
            "non-local blocks that the model does not have: .*non_local0. Was",
        ),
        ("MODEL.BACKBONE.NAME build_resnet_fpn_backbone", {}, "non-local blocks that the model"),
        ("MODEL.WEIGHTS lost.pth", {}, "weights lost.pth: .*not found"),
        ("MODEL.WEIGHTS ''", {}, "--eval-only needs weights, but MODEL.WEIGHTS is empty"),
        ("", {"metadata": {"thing_classes": ["rod"]}}, "1 is 'bar' there, 'rod' in the model"),
        ("", {"metadata": {"thing_classes": ["bar", "rod"]}}, "1 classes, but the model has 2"),
    ],
)
def test_refused(options, kwargs, message, evaluate):
    options = [option.strip("'") for option in options.split()]
    with pytest.raises(SystemExit) as exit:
        evaluate(*options, **kwargs)
    assert re.search(message, exit.value.code), exit.value.code


@pytest.mark.parametrize(
    "option", ["--allow-missing=roi_heads", "--allow-partial", "--strip-blocks", "--scale-lr"]
)
def test_options_of_a_training(option, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--config-file", "Base-RCNN-FPN.yaml", "--eval-only", option])
    assert "are for training" in capsys.readouterr().err
