"""Running scripts and commands, and small options for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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
    MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.EVAL_PERIOD 0
    MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 20
    MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (32,32,32,32,32,32,32,32)
""".split()


def words(*parts):
    """The words of a command line; those without spaces may stand in one string."""
    return [word for part in parts for word in str(part).split()]


def run(*command, hook=False, datasets=None, code=0):
    """Run a script with Python at the root of the repository; it must exit with ``code``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DETECTRON2_")}
    env["OMP_NUM_THREADS"] = "1"
    if hook:
        env["DETECTRON2_ENV_MODULE"] = "nl_detectron.env"
    if datasets:
        env["DETECTRON2_DATASETS"] = str(datasets)
    command = [sys.executable, *words(*command)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def forked(function, processes, folder, codes=None, timeout=60):
    """Run ``function(rank, folder)`` in copies of this process that form a group.

    They must exit with ``codes``, by default all with 0.
    """
    (folder / "store").unlink(missing_ok=True)
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            code = 1
            try:
                torch.set_num_threads(1)  # those of OpenMP do not survive the fork
                url = f"file://{folder}/store"
                dist.init_process_group("gloo", url, rank=rank, world_size=processes)
                function(rank, folder)
                dist.barrier()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
                print(error, file=sys.stderr, flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    end = time.monotonic() + timeout
    ended = {}
    while len(ended) < processes:
        for child in set(children) - set(ended):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                ended[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert [ended[child] for child in children] == (codes or [0] * processes)


def metrics(output):
    """What a training logged."""
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def launched(command, main, *arguments):
    """Read the arguments as a command does that trains, then run ``main`` instead of its own."""
    launch(main, command.parse_args(words(*arguments)), read_config, command.check)


def custom_data_arguments(json_file, *splits):
    for split in splits:
        yield f"--{split}-json {json_file} --{split}-images {json_file.parent / 'images'}"


def forget_custom_data():
    """What a tool has registered in this process, so that the next call may name other files."""
    for name in {"custom_train", "custom_test"} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
