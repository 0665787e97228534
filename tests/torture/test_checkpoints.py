"""A training that is killed at random moments, and checkpoints with random bits flipped."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from torch import nn

from nl_detectron.engine.checkpoint import StrictCheckpointer
from nl_detectron.engine.checkpoint_files import check_records, newest_checkpoint
from nl_detectron_cli import train
from tests.running import QUICK, TINY, custom_data_arguments, forget_custom_data, words

pytestmark = pytest.mark.slow

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
KILLS = 50
ITERATIONS = 40


@pytest.fixture
def start(custom_data):
    """Train in a child of this process, which has imported everything; return its number."""

    def start(folder, output=os.devnull):
        data = custom_data_arguments(custom_data, "train")
        arguments = words("--resume --keep-last 3 --config-file", CONFIG, *data, *TINY)
        arguments += words("SOLVER.CHECKPOINT_PERIOD 1 SOLVER.MAX_ITER", ITERATIONS)
        if child := os.fork():
            return child
        code = 1
        try:
            written = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(written, 1)
            forget_custom_data()
            torch.set_num_threads(1)
            train.main([*arguments, "OUTPUT_DIR", str(folder)])
            code = 0
        except SystemExit as exit:
            os.write(written, str(exit.code).encode())
        finally:
            os._exit(code)

    return start


def ended(child, wait, code=0):
    """Return whether a process has ended, with this exit code, after so many seconds."""
    end = time.monotonic() + wait
    while time.monotonic() < end:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            assert os.waitstatus_to_exitcode(status) == code
            return True
        time.sleep(0.001)
    return False


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_killed_at_random(start, tmp_path):
    """What is there is whole and the newest of it found; the end is that of a run left alone."""
    assert ended(start(tmp_path / "whole"), 600)
    expected = weights(tmp_path / "whole")
    rng = random.Random(0)
    kills, in_a_save, rounds = 0, 0, 0
    while kills < KILLS:
        folder = tmp_path / f"killed{rounds}"
        rounds += 1
        iterations = [-1]
        while True:
            limit = KILLS <= kills
            child = start(folder)
            if limit:
                assert ended(child, 600)
                break
            wait = rng.uniform(0.5, 4)
            if ended(child, wait):
                break
            if rng.random() < 0.5:  # in the middle of a save
                while not list(folder.glob(".model*.partial")) and not ended(child, 0.0005):
                    pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            in_a_save += bool(list(folder.glob(".model*.partial")))
            for path in folder.glob("*.pth"):
                check_records(path)
            newest = newest_checkpoint(str(folder))
            if newest:
                iteration = torch.load(newest, weights_only=True)["iteration"]
                assert iteration >= iterations[-1]
                iterations.append(iteration)
            else:
                assert iterations == [-1]
        for name, tensor in weights(folder).items():
            assert torch.equal(tensor, expected[name]), name
        assert not list(folder.glob(".*.partial"))
        shutil.rmtree(folder)
    assert in_a_save > 0
    print(f"{kills} kills, {in_a_save} of them in a save, {rounds} runs")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_full_disk(start, tmp_path):
    """The training ends with a sentence; when there is room, it goes on as if nothing were."""
    assert ended(start(tmp_path / "whole"), 600)
    disk, output = tmp_path / "disk", tmp_path / "output.txt"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=350m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a file system")
    try:
        assert ended(start(disk, output), 600, code=1)
        last = output.read_text().splitlines()[-1]
        assert re.search(
            r"^\S+_0000003\.pth cannot be saved: No space .* is \S+_0000002\.pth$", last
        )
        assert [path.name for path in sorted(disk.glob("model*"))] == [
            f"model_{iteration:07d}.pth" for iteration in range(3)
        ]
        subprocess.run(["mount", "-o", "remount,size=2g", str(disk)], check=True)
        assert ended(start(disk), 600)
        expected = weights(tmp_path / "whole")
        for name, tensor in weights(disk).items():
            assert torch.equal(tensor, expected[name]), name
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def checkpoint(tmp_path):
    """A small one, and what loads it."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    StrictCheckpointer(model, str(tmp_path)).save("model", iteration=7)
    return tmp_path / "model.pth"


def load(path):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    StrictCheckpointer(model).load(str(path))
    return model.state_dict()


def test_every_bit(checkpoint):
    """A checkpoint with one bit flipped is refused, or it has the same weights."""
    expected = load(checkpoint)
    content = bytearray(checkpoint.read_bytes())
    refused = 0
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        checkpoint.unlink()
        checkpoint.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            state = load(checkpoint)
        except ValueError:
            refused += 1
            continue
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), (bit, name)
    assert refused > 4 * len(content)


def test_random_bits_of_a_detector(start, tmp_path):
    """The newest checkpoint that is valid is never the one with the flipped bit, unless equal."""
    assert ended(start(tmp_path), 600)
    newest = tmp_path / "model_final.pth"
    content = newest.read_bytes()
    expected = weights(tmp_path)
    rng = random.Random(0)
    refused = 0
    for _ in range(50):
        damaged = bytearray(content)
        bit = rng.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        newest.write_bytes(damaged)
        (tmp_path / f"model_{ITERATIONS - 1:07d}.pth").unlink(missing_ok=True)
        found = newest_checkpoint(str(tmp_path))
        if found == str(newest):
            for name, tensor in weights(tmp_path).items():
                assert torch.equal(tensor, expected[name]), (bit, name)
        else:
            assert found == str(tmp_path / f"model_{ITERATIONS - 2:07d}.pth")
            refused += 1
    assert refused > 40
