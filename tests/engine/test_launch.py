"""What a tool does before its work: it refuses, in one sentence, or starts its processes."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from detectron2 import engine
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from nl_detectron.config import load_config
from nl_detectron.engine.coco.trainer import CocoTrainer, read_config
from nl_detectron.engine.console import mistakes_in_one_sentence, quiet_detectron2
from nl_detectron.engine.launch import launch, share_cores
from nl_detectron_cli import train
from tests.running import QUICK, ROOT, TINY, custom_data_arguments

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
SMALL = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]


@pytest.fixture
def arguments(custom_data, tmp_path):
    """Of a training that is all right; more options may follow."""
    arguments = ["--config-file", CONFIG, *custom_data_arguments(custom_data, "train", "test")]
    return [*map(str, arguments), "OUTPUT_DIR", str(tmp_path / "out"), *TINY]


def write_threads(args):
    """Tell how many threads PyTorch uses in this process."""
    name, folder = torch.distributed.get_rank(), Path(args.opts[1])
    (folder / f"rank{name}").write_text(str(torch.get_num_threads()))


def fail(args):
    raise AssertionError("the training began")


class TestMistakes:
    """They end the program before anything is printed, and before any training."""

    def refuse(self, arguments, message, capfd):
        with pytest.raises(SystemExit) as exit:
            launch(fail, train.parse_args(arguments), read_config, train.check)
        assert re.search(message, exit.value.code), exit.value.code
        assert len(exit.value.code.splitlines()) == 1
        assert capfd.readouterr() == ("", "")

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
            ("MODEL.BACKBONE.NAME build_resnet_fpn", "no model can be built .*'build_resnet_fpn'"),
            ("MODEL.RESNETS.DEPTH 51", "no model can be built .*51"),
            ("MODEL.WEIGHTS lost.pth", "weights lost.pth: .*not found"),
            (f"MODEL.WEIGHTS {__file__}", "weights .*test_launch.py: this file does not"),
            (f"OUTPUT_DIR {__file__}/output", "OUTPUT_DIR .*output cannot be written to"),
            ("SOLVER.IMS_PER_BATCH 3", "SOLVER.IMS_PER_BATCH must be a multiple .* 2; got 3"),
        ],
    )
    def test_options(self, options, message, arguments, capfd):
        if "away" not in DatasetCatalog.list():
            register_coco_instances("away", {}, "away.json", "images")
        if "DATASETS.TEST" in options:
            start = arguments.index("--test-json")
            del arguments[start : start + 4]
        if "IMS_PER_BATCH" in options:
            arguments = ["--num-processes", "2", *arguments]
        self.refuse([*arguments, *options.split()], message, capfd)

    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("lost.yaml", "lost.yaml' does not exist"),
            (CONFIG.with_suffix(".py"), "is a LazyConfig"),
            (ROOT / "LICENSE", "LICENSE is not a YAML config"),
        ],
    )
    def test_config_file(self, file, message, arguments, capfd):
        self.refuse([*arguments[2:4], "--config-file", str(file), *arguments[4:]], message, capfd)

    @pytest.mark.parametrize(
        ("count", "message"),
        [
            pytest.param(
                8,
                "--num-gpus 8: there is no CUDA device, .* --num-processes 8",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs no CUDA device"),
            ),
            pytest.param(
                99, "--num-gpus 99: this machine has . CUDA devices", marks=pytest.mark.gpu
            ),
        ],
    )
    def test_more_gpus_than_there_are(self, count, message, arguments, capfd):
        if count == 99 and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        self.refuse(["--num-gpus", str(count), *arguments], message, capfd)

    def test_weights_of_another_depth(self, arguments, tmp_path, capfd):
        cfg = load_config(CONFIG, [*SMALL, "MODEL.RESNETS.DEPTH", 34])
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "r34.pth")
        weights = ["MODEL.WEIGHTS", str(tmp_path / "r34.pth")]
        message = "weights .*r34.pth: the checkpoint holds layers .*another depth"
        self.refuse([*arguments, *weights], message, capfd)

    def test_what_the_checkpointer_warns_of_is_for_the_training_to_say(
        self, arguments, tmp_path, caplog
    ):
        cfg = load_config(CONFIG, [*SMALL, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"])
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "stock.pth")
        arguments += ["MODEL.WEIGHTS", str(tmp_path / "stock.pth")]
        caplog.set_level("INFO", logger="fvcore")
        began = []
        launch(began.append, train.parse_args(arguments), read_config, train.check)
        assert began
        assert not caplog.records

    def test_health_of_no_blocks(self, arguments, capfd):
        stock = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
        message = "the model has no non-local block"
        self.refuse(["--health-period", "1", *arguments, *stock], message, capfd)

    def test_faults_of_the_code_keep_their_traceback(self):
        with pytest.raises(KeyError), mistakes_in_one_sentence():
            _ = {}["fault"]

    def test_files(self, tmp_path):
        with pytest.raises(SystemExit, match="lost.json: No such file"), mistakes_in_one_sentence():
            (tmp_path / "lost.json").read_text()


class TestProcesses:
    def test_share_the_cores(self, arguments, tmp_path, monkeypatch):
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        count = "import torch; print(torch.get_num_threads())"
        alone = subprocess.run([sys.executable, "-c", count], capture_output=True, check=True)
        arguments = ["--num-processes", "2", "--dist-url", "auto", *arguments]
        launch(write_threads, train.parse_args(arguments), read_config, train.check)
        written = {path.name: path.read_text() for path in (tmp_path / "out").glob("rank*")}
        half = str(max(1, int(alone.stdout) // 2))
        assert written == {"rank0": half, "rank1": half}

    @pytest.mark.parametrize("given", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
    def test_number_of_threads_that_is_given_stays(self, given, monkeypatch):
        monkeypatch.setenv(given, "3")
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        share_cores(2)
        after = torch.get_num_threads()
        torch.set_num_threads(before)
        assert after == 3

    def test_detectron2_is_left_as_it_was(self, custom_data_name, small_cfg, tmp_path):
        stock = engine.defaults.create_ddp_model
        small_cfg.OUTPUT_DIR = str(tmp_path)
        small_cfg.DATASETS.TRAIN = (custom_data_name,)
        small_cfg.MODEL.KEYPOINT_ON = False
        small_cfg.DATALOADER.NUM_WORKERS = 0
        CocoTrainer(small_cfg)
        assert engine.defaults.create_ddp_model is stock


class TestWarnings:
    @pytest.mark.parametrize(
        ("category", "text"),
        [(FutureWarning, "`torch.load` is deprecated"), (UserWarning, "torch.meshgrid: something")],
    )
    def test_others_are_shown(self, category, text):
        with pytest.warns(category, match=text), quiet_detectron2():
            warnings.warn(text, category, stacklevel=1)
