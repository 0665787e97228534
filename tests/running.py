"""Running the tools as a person does, and small options for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.engine.coco.trainer import read_config
from nl_detectron.engine.launch import launch

ROOT = Path(__file__).parent.parent
QUICK = ROOT / "configs" / "quick_schedules"
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# A detector as small as it gets, on images of one size
TINY = """
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 0
    DATALOADER.NUM_WORKERS 0 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SEED 3
    MODEL.RPN.POST_NMS_TOPK_TEST 20 MODEL.FPN.OUT_CHANNELS 32
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
    MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (32,32,32,32,32,32,32,32)
    MODEL.RPN.POST_NMS_TOPK_TRAIN 20
""".split()


def run(*command, hook=False, datasets=None, cwd=ROOT):
    env = {k: v for k, v in os.environ.items() if not k.startswith("DETECTRON2_")}
    env["OMP_NUM_THREADS"] = "1"
    if hook:
        env["DETECTRON2_ENV_MODULE"] = "nl_detectron.env"
    if datasets:
        env["DETECTRON2_DATASETS"] = str(datasets)
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def launched(command, main, *words):
    """Read the words as a command does that trains, then run ``main`` instead of its own."""
    launch(main, command.parse_args([str(word) for word in words]), read_config, command.check)


def custom_data_arguments(json_file, *splits):
    for split in splits:
        yield from (f"--{split}-json", json_file)
        yield from (f"--{split}-images", json_file.parent / "images")


def forget_custom_data():
    """What a tool has registered in this process, so that the next call may name other files."""
    for name in {"custom_train", "custom_test"} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
