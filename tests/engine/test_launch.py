"""What a tool does before its work: it refuses, in one sentence, or starts its processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from nl_detectron.config import load_config
from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings
from nl_detectron.engine.launch import limit_threads
from nl_detectron.engine.signals import StopOnSignal
from nl_detectron_cli import train
from tests.running import NO_GPU, QUICK, ROOT, TINY, custom_data_arguments, launched

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
LAZY = QUICK / "mask_rcnn_R_50_NL_FPN_instant_test.py"
RESNET = "MODEL.BACKBONE.NAME build_resnet_fpn_backbone"


@pytest.fixture
def start(custom_data, tmp_path, monkeypatch):
    """Starts a training that is all right, but for its options."""
    monkeypatch.chdir(tmp_path)

    def start(main, options):
        words = ["--config-file", CONFIG, *custom_data_arguments(custom_data, "train")]
        launched(train, main, *words, *options.split(), *TINY)

    return start


def save_model(file, *options):
    cfg = load_config(CONFIG, ["MODEL.ROI_HEADS.NUM_CLASSES", 1, *options, *TINY])
    torch.save({"model": build_model(cfg).state_dict()}, file)


def wait_for_signal(args):
    """Tell how many threads PyTorch uses in this process, and exit as a training does."""
    with StopOnSignal() as stop:
        Path(f"rank{torch.distributed.get_rank()}").write_text(str(torch.get_num_threads()))
        while not stop.received:
            time.sleep(0.01)
    raise SystemExit(128 + stop.received)


def fail(args):
    raise AssertionError("the training began")


class TestMistakes:
    """They end the program before anything is printed, and before any training."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("SEEED 1", "did you mean SEED?"),
            ("SOLVER.MAX_ITER", "odd"),
            ("SOLVER.MAX_ITER many", "many.* SOLVER.MAX_ITER"),
            ("DATASETS.TEST ('lost',)", "TEST: no data set 'lost'"),
            ("DATASETS.TEST ('away',)", "'away' needs away.json, which"),
            ("MODEL.NON_LOCAL.PAIRWISE dot", "pairwise.*embedded_gaussian.*'dot'"),
            ("MODEL.NON_LOCAL.PAIRWIZE gaussian", "did you mean MODEL.NON_LOCAL.PAIRWISE?"),
            ("MODEL.NON_LOCAL.REDUCTION two", "two.* MODEL.NON_LOCAL.REDUCTION"),
            (
                "MODEL.BACKBONE.NAME build_resnet_fpn",
                "does not build a model: .*'build_resnet_fpn'",
            ),
            ("MODEL.RESNETS.DEPTH 51", "the config does not build a model: .*51"),
            ("MODEL.WEIGHTS lost.pth", "weights lost.pth: .*not found"),
            (
                f"MODEL.WEIGHTS {__file__}",
                "weights .*test_launch.py: it is damaged, or another kind of file",
            ),
            ("MODEL.WEIGHTS r34.pth", "weights r34.pth: the checkpoint holds .*another depth"),
            (f"OUTPUT_DIR {__file__}/output", "OUTPUT_DIR .*output cannot be written to"),
            ("OUTPUT_DIR damaged", r"already has checkpoints .*model_0000001\.pth.*--resume"),
            ("--resume OUTPUT_DIR damaged", r"no valid checkpoint .*model_0000001\.pth: it is dam"),
            ("--keep-best bbox/AP", r"--keep-best bbox/AP needs evaluations .*TEST is \(\)"),
            ("--num-processes 3", "SOLVER.IMS_PER_BATCH must be a multiple .* 3; got 2"),
            (f"--health-period 1 {RESNET}", "the model has no non-local block"),
            ("--config-file lost.yaml", "lost.yaml is neither a file nor in the model zoo"),
            (f"--config-file {LAZY}", "is a LazyConfig"),
            (f"--config-file {ROOT}/LICENSE", "LICENSE is not a YAML config"),
            pytest.param(
                "--num-gpus 8",
                "--num-gpus 8 needs CUDA devices, .* --num-processes 8",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs no CUDA device"),
            ),
            pytest.param(
                "--num-gpus 99",
                "--num-gpus must be at most .* got 99",
                marks=[pytest.mark.gpu, NO_GPU],
            ),
        ],
    )
    def test_options(self, options, message, start, capfd):
        if "away" not in DatasetCatalog.list():
            register_coco_instances("away", {}, "away.json", "images")
        if "r34.pth" in options:
            save_model("r34.pth", "MODEL.RESNETS.DEPTH", 34)
        if "damaged" in options:
            Path("damaged").mkdir()
            Path("damaged/model_0000001.pth").write_bytes(b"PK")
        with pytest.raises(SystemExit) as exit:
            start(fail, options)
        assert re.search(message, exit.value.code), exit.value.code
        assert len(exit.value.code.splitlines()) == 1
        assert capfd.readouterr() == ("", "")

    def test_what_the_checkpointer_warns_of_is_for_the_training_to_say(self, start, caplog):
        save_model("stock.pth", *RESNET.split())
        caplog.set_level("INFO", logger="fvcore")
        began = []
        start(began.append, "MODEL.WEIGHTS stock.pth")
        assert began
        assert not caplog.records

    def test_faults_of_the_code_keep_their_traceback(self, tmp_path):
        with pytest.raises(KeyError), errors_without_traceback():
            _ = {}["fault"]
        with pytest.raises(SystemExit, match="lost.json: No such file"), errors_without_traceback():
            (tmp_path / "lost.json").read_text()


class TestProcesses:
    def test_share_the_cores_and_get_signals(self, start, tmp_path, monkeypatch):
        """A signal to the one that started them reaches them, and their exit code is its own."""
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        count = "import torch; print(torch.get_num_threads())"
        alone = subprocess.run([sys.executable, "-c", count], capture_output=True, check=True)

        def send_signal():
            while len(list(tmp_path.glob("rank*"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)

        threading.Thread(target=send_signal, daemon=True).start()
        with pytest.raises(SystemExit) as exit:
            start(wait_for_signal, "--num-processes 2 --dist-url auto")
        assert exit.value.code == 128 + signal.SIGUSR1
        written = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
        half = str(max(1, int(alone.stdout) // 2))
        assert written == {"rank0": half, "rank1": half}

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--num-processes 2", "--num-processes must not be given under torchrun, .* got 2"),
            ("--num-gpus 3", "--num-gpus must not be .* --nproc-per-node and --nnodes.* got 3"),
            ("--num-machines 2", "--num-machines must not be .* got 2"),
            ("--machine-rank 1", "--machine-rank must not be .* got 1"),
        ],
    )
    def test_options_that_are_torchruns(self, option, message, start, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        with pytest.raises(SystemExit, match=message):
            start(fail, option)

    @pytest.mark.parametrize("given", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
    def test_number_of_threads_that_is_given_stays(self, given, monkeypatch):
        monkeypatch.setenv(given, "3")
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        limit_threads(2)
        after = torch.get_num_threads()
        torch.set_num_threads(before)
        assert after == 3


@pytest.mark.parametrize(
    ("category", "text"),
    [(FutureWarning, "`torch.load` is deprecated"), (UserWarning, "torch.meshgrid: something")],
)
def test_other_warnings_are_shown(category, text):
    with pytest.warns(category, match=text), suppress_detectron2_warnings():
        warnings.warn(text, category, stacklevel=1)
