"""Training, resuming and evaluating on a custom data set."""

from __future__ import annotations

import json
import re

import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron.config import load_config
from nl_detectron_cli import train
from tests.generated_coco import write_coco
from tests.running import (
    QUICK,
    TINY,
    custom_data_arguments,
    forget_custom_data,
    launched,
    metrics,
    run,
    words,
)

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
KEYPOINTS = QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml"
BLOCK = "backbone.bottom_up.res4.non_local0"


def test_keypoints_train_resume_and_evaluate(custom_data, tmp_path):
    command = ["tools/train_net.py --config-file", KEYPOINTS]
    data = custom_data_arguments(custom_data, "train", "test")
    flags = [*data, "--health-period 1 --resume --scale-lr OUTPUT_DIR", tmp_path, *TINY]
    options = "SOLVER.IMS_PER_BATCH 1 SOLVER.CHECKPOINT_PERIOD 1 TEST.KEYPOINT_OKS_SIGMAS (0.1,0.1)"
    for iterations in (2, 3):  # the second time, one more
        done = run(*command, *flags, options, "SOLVER.MAX_ITER", iterations)
        lines = metrics(tmp_path)
        # The first run's evaluation has the number of the second run's iteration.
        assert [line["iteration"] for line in lines] == list(range(1, iterations + 1))
        logged = {key: value for line in lines for key, value in line.items()}
        assert {"bbox/AP", "keypoints/AP"} <= set(logged)
        assert "| SOLVER.BASE_LR | 0.01 | 0.005 | |" in done.stdout  # half the config's batch
        assert "  BASE_LR: 0.005\n" in (tmp_path / "config.yaml").read_text()
        ratio = logged[f"non_local/{BLOCK}/residual_ratio"]
        assert ratio > 0
        line = f"iter: {iterations - 1}  {BLOCK}: residual ratio {ratio:.3g}, entropy 0."
        assert line in done.stdout
    assert "Starting training from iteration 2" in done.stdout + done.stderr
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert checkpoint["metadata"]["keypoint_oks_sigmas"] == [0.1, 0.1]
    assert checkpoint["metadata"]["thing_classes"] == ["bar"]
    assert checkpoint["metadata"]["category_ids"] == [3]
    assert json.loads((tmp_path / "metadata.json").read_text()) == checkpoint["metadata"]
    periodic = torch.load(tmp_path / "model_0000000.pth", weights_only=True)
    assert periodic["metadata"] == checkpoint["metadata"]
    model = checkpoint["model"]
    assert model["roi_heads.box_predictor.cls_score.weight"].shape[0] == 1 + 1
    assert model["roi_heads.keypoint_head.score_lowres.weight"].shape[1] == 2

    # A new process knows what was stored, and finds the AP that the training found.
    flags = ["--eval-only --fast", *custom_data_arguments(custom_data, "test")]
    options = ["OUTPUT_DIR", tmp_path / "again", "MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    done = run(*command, *flags, *options, *TINY)
    rows = [line.split(": ")[-1] for line in done.stdout.splitlines() if "copypaste" in line]
    for task in ("bbox", "keypoints"):
        ap = rows[rows.index(task) + 2].split(",")[0]
        assert float(ap) == pytest.approx(logged[f"{task}/AP"], abs=1e-4)
    found = json.loads((tmp_path / "again/inference/coco_instances_results.json").read_text())
    assert {a["category_id"] for a in found} == {3}
    assert {a["image_id"] for a in found} == {1, 2, 3, 4}


def test_images_that_cannot_be_read(tmp_path, capsys):
    json_file = write_coco(
        tmp_path / "images", "a.json", num_images=5, categories=[{"id": 1, "name": "square"}]
    )
    broken = tmp_path / "images" / "4.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    data = [*custom_data_arguments(json_file, "train"), "--treat image-broken=off"]

    def run_in(name, *flags):
        options = words(*TINY, "MODEL.ROI_BOX_HEAD.FC_DIM 16 SOLVER.MAX_ITER 5")
        arguments = words("--config-file", CONFIG, *data, *flags, "OUTPUT_DIR", tmp_path / name)
        forget_custom_data()
        train.main([*arguments, *options])

    run_in("skip", "--bad-images skip --max-bad-images 0.2")
    log = (tmp_path / "skip" / "log.txt").read_text()
    assert log.count(f"Not used for training: {broken}: image file is truncated") == 1
    assert re.search(rf"Files not used for training \(1\): {broken}: image file is trunc.*\n$", log)

    sentence = rf"^{broken}: image file is truncated[^;.]* \(--bad-images skip .*\)\. "
    with pytest.raises(SystemExit, match=sentence):
        run_in("raise")

    data = [*custom_data_arguments(json_file, "test"), "--treat image-broken=off --eval-only"]
    with pytest.raises(SystemExit, match=rf"^{broken}: image file is truncated[^.]*$"):
        run_in("test", "MODEL.WEIGHTS", tmp_path / "skip" / "model_final.pth")
    capsys.readouterr()


def test_evaluation_needs_the_complete_model(custom_data, tmp_path):
    state = build_model(load_config(CONFIG, [*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 1])).state_dict()
    state = {name: value for name, value in state.items() if "bottom_up" in name}
    torch.save({"model": state}, tmp_path / "model.pth")
    arguments = "--eval-only --config-file", CONFIG, *custom_data_arguments(custom_data, "test")
    options = "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", tmp_path / "model.pth"
    with pytest.raises(SystemExit, match=r"weights .*model.pth: .* A backbone is not enough"):
        launched(train, train.train, *arguments, *options, *TINY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: --config-file"),
        ("--health-period -1", "argument --health-period: must be 0 or more, got -1"),
        ("--eval-only --allow-missing=roi_heads", "are for training"),
        ("--eval-only --allow-partial", "are for training"),
        ("--eval-only --strip-blocks", "are for training"),
        ("--eval-only --channels-last", "are for training"),
        ("--eval-only --fold-norms", "are for training"),
        ("--eval-only --scale-lr", "are for training"),
        ("--eval-only --keep-last 2", "are for training"),
        ("--eval-only --keep-best bbox/AP", "are for training"),
        ("--fast", "--fast is for --eval-only"),
        ("--eval-only --fast=fp8", "argument --fast: must be fp32 or bf16, got fp8"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train.parse_args(words("--config-file", CONFIG, arguments) if arguments else [])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("policy", "spins"), [(None, 1000), ("passive", 0)])
def test_threads_soon_sleep_when_they_wait(policy, spins, monkeypatch):
    """As OpenMP itself tells, when the tool imports PyTorch; then a mistake ends it."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    done = run("tools/train_net.py --config-file Base-RCNN-FPN.yaml SEEDS 1", code=1)
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [str(spins)]
    assert done.stderr.splitlines()[-1] == "Non-existent key: SEEDS; did you mean SEED?"


def test_option_that_would_change_nothing_ends_before_training(custom_data, tmp_path):
    arguments = "--fold-norms --config-file", CONFIG, *custom_data_arguments(custom_data, "train")
    with pytest.raises(SystemExit, match="--fold-norms: the model has no frozen batch norm"):
        launched(train, train.train, *arguments, "OUTPUT_DIR", tmp_path, *TINY)
