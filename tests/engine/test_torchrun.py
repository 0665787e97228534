"""PyTorch's launcher with real processes: one is killed, all start again and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.running import QUICK, ROOT, TINY, custom_data_arguments, words

pytestmark = pytest.mark.slow
CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
TRAIN = "-m nl_detectron_cli train --resume --config-file", CONFIG


def started(*parts):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words(*parts)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_starts_again(rank, custom_data, tmp_path):
    """The end is, bit for bit, that of a training in which nothing happened."""
    data = list(custom_data_arguments(custom_data, "train"))
    options = [*TINY, "SOLVER.MAX_ITER 12 SOLVER.CHECKPOINT_PERIOD 2"]
    whole = started(TORCHRUN, *TRAIN, *data, "OUTPUT_DIR", tmp_path / "whole", *options)
    assert whole.wait(300) == 0
    killed = started(
        TORCHRUN, "--max-restarts 1", *TRAIN, *data, "OUTPUT_DIR", tmp_path / "killed", *options
    )
    while not (tmp_path / "killed" / "model_0000003.pth").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(children(killed.pid)[rank], signal.SIGKILL)
    assert killed.wait(300) == 0
    log = (tmp_path / "killed" / "log.txt").read_text()
    assert "Starting training from iteration 0" in log
    assert log.count("Starting training from iteration") == 2
    final = [
        torch.load(tmp_path / run / "model_final.pth", weights_only=False)["model"]
        for run in ("whole", "killed")
    ]
    for name, value in final[0].items():
        assert torch.equal(value, final[1][name]), name


def test_input_is_refused_once(custom_data, tmp_path):
    data = custom_data_arguments(custom_data, "train")
    run = started(TORCHRUN, *TRAIN, *data, "OUTPUT_DIR", tmp_path, *TINY, "SOLVER.IMS_PER_BATCH 3")
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 1
    message = "SOLVER.IMS_PER_BATCH must be a multiple of the number of processes, 2; got 3"
    assert stderr.count(message) == 1
