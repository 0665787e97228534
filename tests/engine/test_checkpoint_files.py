"""Checkpoints on disk: whole or absent, and only valid ones are resumed from."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from nl_detectron.engine.checkpoint import StrictCheckpointer, checkpoint_to_load
from nl_detectron.engine.checkpoint_files import (
    check_nothing_is_overwritten,
    newest_checkpoint,
    write_atomically,
)


class State:
    """Stands for the trainer, whose state has the number of the iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def checkpointer(folder, iteration=-1):
    return StrictCheckpointer(nn.Linear(3, 2), str(folder), trainer=State(iteration))


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints of a training, of iterations 1, 9 and 10, and the best one, also of 10."""
    for name, iteration in (("best", 10), ("0000001", 1), ("0000009", 9), ("0000010", 10)):
        checkpointer(tmp_path, iteration).save(f"model_{name}")
    return tmp_path


def truncate(path):
    os.truncate(path, path.stat().st_size - 7)


def flip(path, bit=None):
    """Flip a bit in the middle of a tensor, unless another one is given."""
    content = bytearray(path.read_bytes())
    if bit is None:
        weight = torch.load(path, weights_only=True)["model"]["weight"]
        bit = 8 * content.index(weight.numpy().tobytes()) + 3
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def spoil(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["bias"][1] = float("nan")
    torch.save(checkpoint, path)


DAMAGES = {
    "truncated": (truncate, "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "damaged"),
    "one flipped bit": (flip, "checksum of .*data/"),
    "text": (lambda path: path.write_text("404: not found"), "damaged"),
    "not finite": (spoil, "bias is not finite"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


class TestNewestCheckpoint:
    def test_is_chosen_by_its_iteration(self, folder):
        """Not by its name, its time, or the tag."""
        (folder / "model_0000010.pth").rename(folder / "a.pth")
        os.utime(folder / "a.pth", (0, 0))
        (folder / "last_checkpoint").write_text("model_0000001.pth")
        assert newest_checkpoint(str(folder)) == str(folder / "a.pth")
        state = State(-1)
        StrictCheckpointer(nn.Linear(3, 2), str(folder), trainer=state).resume_or_load("")
        assert state.iteration == 10

    @pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
    def test_is_valid_or_refused_by_name(self, damage, reason, folder, caplog):
        damage(folder / "model_0000010.pth")
        assert newest_checkpoint(str(folder)) == str(folder / "model_0000009.pth")
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "model_0000010.pth: " in record.message
        assert "model_0000009.pth: " not in record.message
        for name in ("0000009", "0000001"):
            damage(folder / f"model_{name}.pth")
        assert newest_checkpoint(str(folder)) == str(folder / "model_best.pth")
        damage(folder / "model_best.pth")
        names = ["model_best", "model_0000001", "model_0000009", "model_0000010"]
        with pytest.raises(ValueError, match=f"no valid checkpoint .*{reason}") as error:
            checkpointer(folder).resume_or_load("")
        assert all(f"{name}.pth: " in str(error.value) for name in names)
        assert len(str(error.value).splitlines()) == 1

    @pytest.mark.parametrize("tag", [None, b"", b"\xff\0garbage", b"model_0000011.pth"])
    def test_tag_is_not_needed(self, tag, folder, caplog):
        (folder / "last_checkpoint").unlink()
        if tag is not None:
            (folder / "last_checkpoint").write_bytes(tag)
        assert newest_checkpoint(str(folder)) == str(folder / "model_0000010.pth")
        assert [("last_checkpoint: " in record.message) for record in caplog.records] == (
            [] if tag is None else [True]
        )

    def test_lost_but_tagged(self, tmp_path):
        (tmp_path / "last_checkpoint").write_text("model_0000011.pth")
        with pytest.raises(ValueError, match=r"last_checkpoint: it names 'model_0000011\.pth'"):
            checkpointer(tmp_path).resume_or_load("")

    def test_of_an_empty_folder(self, tmp_path, cfg):
        """A training starts; weights alone are not the checkpoint of one."""
        torch.save({"model": {}}, tmp_path / "r50.pth")
        cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(tmp_path), str(tmp_path / "r50.pth")
        assert checkpoint_to_load(cfg, resume=True) == (cfg.MODEL.WEIGHTS, False)
        assert newest_checkpoint(str(tmp_path / "lost")) == ""
        check_nothing_is_overwritten(str(tmp_path))
        assert not checkpointer(tmp_path).has_checkpoint()

    def test_is_not_overwritten(self, folder):
        with pytest.raises(ValueError, match=r"model_0000001\.pth and 3 more.*--resume"):
            check_nothing_is_overwritten(str(folder))
        for path in folder.glob("*.pth"):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"model_0000001\.pth and 3 more.*--resume"):
            check_nothing_is_overwritten(str(folder))


@contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestSaving:
    @pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
    def test_limited_file_size(self, share, folder):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        saving = checkpointer(folder, 11)
        assert saving.has_checkpoint()
        refusal = r"model_0000011\.pth cannot be saved: File too large; .* is .*model_0000010\.pth"
        size = int(share * (folder / "model_0000010.pth").stat().st_size)
        with file_size_limit(size), pytest.raises(OSError, match=refusal):
            saving.save("model_0000011")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        saving.save("model_0000011")
        assert newest_checkpoint(str(folder)) == str(folder / "model_0000011.pth")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
    def test_full_disk(self, tmp_path):
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this machine does not let root mount a file system")
        try:
            saving = StrictCheckpointer(nn.Linear(100, 100), str(tmp_path), trainer=State(1))
            saving.save("model_0000001")
            with pytest.raises(OSError, match=r"No space left .* is .*model_0000001\.pth"):
                saving.save("model_0000002")
            assert {path.name for path in tmp_path.iterdir()} == {
                "model_0000001.pth",
                "last_checkpoint",
            }
            assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "model_0000001.pth")
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, value, folder):
        saving = checkpointer(folder, 11)
        with torch.no_grad():
            saving.model.weight[1, 2] = value
        refusal = r"model_0000011\.pth is not saved, .*not finite: weight; .*0000010\.pth"
        assert saving.has_checkpoint()
        with pytest.raises(FloatingPointError, match=refusal):
            saving.save("model_0000011")
        assert newest_checkpoint(str(folder)) == str(folder / "model_0000010.pth")
        torch.save({"model": saving.model.state_dict()}, folder / "weights.pth")
        for options in ({}, {"complete": True}):
            with pytest.raises(ValueError, match=r"weights\.pth: the weights are not finite: weig"):
                StrictCheckpointer(nn.Linear(3, 2), **options).load(str(folder / "weights.pth"))

    def test_what_killed_runs_left_is_removed(self, folder):
        (folder / ".model_0000007.pth.partial").write_bytes(b"half")
        checkpointer(folder, 11).save("model_0000011")
        assert not list(folder.glob(".*"))

    def test_large_weights(self, folder):
        """Their sum is not finite, but they are."""
        saving = checkpointer(folder, 11)
        with torch.no_grad():
            saving.model.weight.fill_(3e38)
        saving.save("model_0000011")
        assert newest_checkpoint(str(folder)) == str(folder / "model_0000011.pth")

    def test_damaged_weights_are_not_loaded(self, folder):
        flip(folder / "model_0000009.pth")
        with pytest.raises(ValueError, match=r"model_0000009\.pth: .*checksum"):
            checkpointer(folder).load(str(folder / "model_0000009.pth"))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class TestWritingAtomically:
    @pytest.mark.parametrize("moment", ["write", "replace", "replaced"])
    def test_killed(self, moment, tmp_path, monkeypatch):
        path = tmp_path / "a.txt"
        path.write_text("old")
        if not (child := os.fork()):
            if moment == "replace":
                monkeypatch.setattr(Path, "replace", lambda *_: kill())
            with write_atomically(path) as file:
                file.write("new" * 100_000)
                file.flush()
                if moment == "write":
                    kill()
            kill()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert path.read_text() == ("new" * 100_000 if moment == "replaced" else "old")
        with write_atomically(path) as file:
            file.write("newest")
        assert path.read_text() == "newest"
        assert list(tmp_path.iterdir()) == [path]

    def test_exception(self, tmp_path):
        def write(path):
            with write_atomically(path, "wb") as file:
                file.write(b"half of i")
                raise KeyError("fault")

        (tmp_path / "a").write_bytes(b"old")
        with pytest.raises(KeyError):
            write(tmp_path / "a")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_bytes() == b"old"

    def test_symbolic_link_is_replaced(self, tmp_path):
        (tmp_path / "precious").write_text("old")
        for name in ("a", ".a.partial"):
            (tmp_path / name).symlink_to("precious")
        with write_atomically(tmp_path / "a") as file:
            file.write("new")
        assert (tmp_path / "precious").read_text() == "old"
        assert (tmp_path / "a").read_text() == "new"
        assert not (tmp_path / "a").is_symlink()
        assert not os.path.lexists(tmp_path / ".a.partial")


class TestRecords:
    def test_every_bit_about_a_tensor(self, folder, tmp_path):
        """What is not refused does no harm."""
        original = folder / "model_0000010.pth"
        expected = torch.load(original, weights_only=True)
        content = original.read_bytes()
        start = content.rindex(b"archive/data/0") - 46  # all that it says about this tensor
        assert content[start:].startswith(b"PK\1\2")
        end = content.rindex(b"PK\5\6")
        harmless = 0
        for bit in [*range(8 * start, 8 * (start + 46)), *range(8 * end, 8 * len(content), 13)]:
            path = tmp_path / "flipped.pth"
            path.write_bytes(content)
            flip(path, bit)
            loading = checkpointer(tmp_path)
            try:
                loading.load(str(path))
            except ValueError:
                continue
            harmless += 1
            for name, value in loading.model.state_dict().items():
                assert torch.equal(value, expected["model"][name]), (bit, name)
        assert harmless > 0
