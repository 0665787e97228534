"""One output folder, one run."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from nl_detectron.engine import lock
from nl_detectron.engine.launch import launch
from nl_detectron.engine.lock import run_lock
from nl_detectron_cli.arguments import training_parser


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the lock until it is killed; return it."""
    children = []

    def hold():
        ready, write = os.pipe()
        if not (child := os.fork()):
            with run_lock(tmp_path):
                os.write(write, b"!")
                time.sleep(60)
            os._exit(0)
        assert os.read(ready, 1) == b"!"
        children.append(child)
        return child

    yield hold
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_holder_is_named(hold, tmp_path, monkeypatch):
    child = hold()
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    with pytest.raises(ValueError, match="OUTPUT_DIR") as error, run_lock(tmp_path):
        pass
    assert f"process {child} on {socket.gethostname()} since 20" in str(error.value)


def test_of_a_killed_process_is_taken_over(hold, tmp_path):
    os.kill(hold(), signal.SIGKILL)
    with run_lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_is_free_after_an_exception(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    for _ in range(2):
        with pytest.raises(KeyError), run_lock(tmp_path / "new"):
            raise KeyError("fault")


def test_workers_that_outlive_a_killed_run(tmp_path):
    if not (child := os.fork()):
        with run_lock(tmp_path):
            if not os.fork():
                time.sleep(1)  # as the worker of a data loader that notices late that it is alone
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with run_lock(tmp_path):
        pass


def test_launch(hold, cfg, tmp_path, monkeypatch):
    """Neither the check nor the run begins while another one is there, and no other one later."""
    args = training_parser("").parse_args(["--config-file", "Base-RCNN-FPN.yaml"])
    cfg.OUTPUT_DIR = str(tmp_path)
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    began = []

    def run(args):
        began.append(args)
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
            check(args, cfg)

    def check(args, cfg):
        ready, write = os.pipe()
        if not (child := os.fork()):
            try:
                with run_lock(cfg.OUTPUT_DIR):
                    pass
            except ValueError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        if message := os.read(ready, 1000):
            raise ValueError(message.decode())

    with pytest.raises(SystemExit, match=f"in use by process {os.getpid()} on"):
        launch(run, args, lambda args: cfg, check)
    launch(run, args, lambda args: cfg, lambda *_: None)
    assert began == [args]
    hold()
    with pytest.raises(SystemExit, match="in use by process"):
        launch(run, args, lambda args: cfg, lambda *_: None)
    assert began == [args]
