"""What ends a training early: signals, and processes that are lost."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from nl_detectron.config import load_config
from nl_detectron.engine.coco.trainer import CocoTrainer
from nl_detectron.engine.signals import StopOnSignal
from tests.running import QUICK, TINY, forked, words

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
SMALL = """
    MODEL.META_ARCHITECTURE ProposalNetwork MODEL.DEVICE cpu MODEL.RESNETS.NORM BN
    MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STEM_OUT_CHANNELS 8
    MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8
"""


class At(HookBase):
    """Does something in an iteration."""

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.action()


@pytest.fixture
def trainer(custom_data_name, tmp_path):
    """Makes trainers of the same training, in one folder after the other."""

    def trainer(name, *options, resume=False, at=()):
        output = tmp_path / name
        output.mkdir(exist_ok=True)
        cfg = load_config(CONFIG, words(*TINY, SMALL, "OUTPUT_DIR", output, *options))
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (custom_data_name,), ()
        seed_all_rng(3)
        trainer = CocoTrainer(cfg)
        trainer.register_hooks([At(*at)] if at else [])
        trainer.resume_or_load(resume=resume)
        return trainer

    return trainer


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM, signal.SIGINT], 143),  # as if it came by two ways
        ([signal.SIGINT], 130),
        ([signal.SIGUSR1], 138),
    ],
)
def test_signal(numbers, code, trainer, tmp_path, caplog):
    """The iteration is finished and saved, and the handlers are as before."""
    before = [signal.getsignal(number) for number in numbers]
    run = trainer("stopped", "SOLVER.MAX_ITER 4", at=(1, send(*numbers)))
    with pytest.raises(SystemExit) as exit:
        run.train()
    assert exit.value.code == code
    assert checkpoints(tmp_path / "stopped") == ["model_0000001.pth"]
    saved = torch.load(tmp_path / "stopped" / "model_0000001.pth", weights_only=False)
    assert saved["iteration"] == 1
    name = signal.Signals(code - 128).name
    assert f"Stopped by {name} after iteration 1." in caplog.text
    assert "model_0000001.pth; the same command with --resume goes on" in caplog.text
    assert [signal.getsignal(number) for number in numbers] == before
    assert code != 143 or same_end(trainer, "stopped")


def test_stopped_in_the_last_iteration(trainer, tmp_path):
    with pytest.raises(SystemExit) as exit:
        trainer("stopped", at=(1, send(signal.SIGTERM))).train()
    assert exit.value.code == 143
    assert checkpoints(tmp_path / "stopped") == ["model_final.pth"]
    trainer("stopped", resume=True).train()


def test_second_signal_ends_at_once():
    child = os.fork()
    if not child:
        with StopOnSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # the same one, by another way
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def same_end(trainer, folder="failed"):
    """Whether a resumed training ends as one that nothing happened to."""
    whole = trainer("whole", "SOLVER.MAX_ITER 4")
    resumed = trainer(folder, "SOLVER.MAX_ITER 4", resume=True)
    assert resumed.start_iter == 2
    for run in (whole, resumed):
        run.train()
    expected, found = (run.model.state_dict() for run in (whole, resumed))
    return all(torch.equal(value, found[name]) for name, value in expected.items())


def test_failure(trainer, tmp_path, caplog):
    """What an iteration has changed before it failed, the statistics of batch norm, is undone."""

    def fail(*_):
        raise RuntimeError("something else")

    def register():
        run.model.proposal_generator.register_forward_hook(fail)

    run = trainer("failed", "SOLVER.MAX_ITER 4", at=(2, register))
    with pytest.raises(RuntimeError, match="something else"):
        run.train()
    assert checkpoints(tmp_path / "failed") == ["model_0000001.pth"]
    assert "Iteration 1 was the last complete one. The state is saved in" in caplog.text
    assert same_end(trainer)


def test_failure_after_the_step(trainer, tmp_path):
    """Then the iteration is complete."""

    class Failing(HookBase):
        def after_step(self):
            if self.trainer.iter == 1:
                raise OSError(28, "No space left", "metrics.json")

    run = trainer("failed", "SOLVER.MAX_ITER 4")
    run.register_hooks([Failing()])
    with pytest.raises(SystemExit, match=r"No space left.*Iteration 1 was the last complete one"):
        run.train()
    saved = torch.load(tmp_path / "failed" / "model_0000001.pth", weights_only=False)
    assert saved["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 2


def test_failure_in_an_update(trainer, tmp_path, caplog):
    def fail(*_):
        raise RuntimeError("in the middle")

    run = trainer("failed", "SOLVER.MAX_ITER 4")
    run.register_hooks([At(2, lambda: run.optimizer.register_step_post_hook(fail))])
    with pytest.raises(RuntimeError, match="in the middle"):
        run.train()
    assert checkpoints(tmp_path / "failed") == []
    assert "Nothing is saved, because the weights were being updated." in caplog.text


def test_failure_in_the_last_iteration_is_not_evaluated(trainer):
    evaluated = []

    class Trainer(CocoTrainer):
        @classmethod
        def test(cls, *_):
            evaluated.append(True)

    def fail(*_):
        raise RuntimeError("at the end")

    run = Trainer(trainer("failed").cfg)
    run.register_hooks([At(1, fail)])
    with pytest.raises(RuntimeError, match="at the end"):
        run.train()
    assert evaluated == []


def test_killed_loader_worker(trainer, tmp_path):
    def kill():
        for child in multiprocessing.active_children():
            child.kill()

    before = signal.getsignal(signal.SIGCHLD)
    options = ("SOLVER.MAX_ITER 4", "DATALOADER.NUM_WORKERS 1")
    run = trainer("failed", *options, at=(2, kill))
    with pytest.raises(SystemExit, match=r"worker .*is lost: .*Iteration \d+ was .* with --resume"):
        run.train()
    assert signal.getsignal(signal.SIGCHLD) == before
    (name,) = checkpoints(tmp_path / "failed")
    saved = torch.load(tmp_path / "failed" / name, weights_only=False)["iteration"]
    assert saved >= 1


def test_weights_that_are_not_finite(trainer, tmp_path):
    """They are not saved, and the parameter is named."""

    def ruin():
        with torch.no_grad():
            run.model.proposal_generator.rpn_head.conv.weight.fill_(math.nan)

    run = trainer("failed", "SOLVER.MAX_ITER 20", at=(2, ruin))
    with pytest.raises(SystemExit, match=r"--max-nonfinite 10.*nonfinite.json.*rpn_head.conv"):
        run.train()
    assert checkpoints(tmp_path / "failed") == []
    report = json.loads((tmp_path / "failed" / "nonfinite.json").read_text())
    assert (report["iteration"], report["skipped"]) == (12, 10)
    process = report["processes"][0]
    assert process["first_module"] == "proposal_generator.rpn_head.conv.activation (ReLU)"
    assert "Training has diverged" in next(iter(process["losses"]))  # detectron2's words
    assert [name.endswith(".png") for name in process["images"]] == [True, True]


@pytest.mark.parametrize("killed", [0, 1])
def test_lost_process(killed, trainer, tmp_path):
    """The one that is left saves."""
    (tmp_path / "failed").mkdir()

    def train(rank, folder):
        at = (2, send(signal.SIGKILL)) if rank == killed else ()
        trainer("failed", "SOLVER.MAX_ITER 4", at=at).train()

    codes = [1, 1]
    codes[killed] = -signal.SIGKILL
    forked(train, 2, tmp_path, codes)
    assert checkpoints(tmp_path / "failed") == ["model_0000001.pth"]
    assert trainer("failed", "SOLVER.MAX_ITER 4", resume=True).start_iter == 2


def test_signal_to_one_of_two_processes(trainer, tmp_path):
    (tmp_path / "stopped").mkdir()

    def train(rank, folder):
        at = (2, send(signal.SIGUSR1)) if rank else ()
        trainer("stopped", "SOLVER.MAX_ITER 4", at=at).train()

    forked(train, 2, tmp_path, [138, 138])
    assert checkpoints(tmp_path / "stopped") == ["model_0000002.pth"]
