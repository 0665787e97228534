"""Checkpoints from strangers: what the model zoos write is read, and no code is run."""

from __future__ import annotations

import copy
import pickle
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nl_detectron.safety.checkpoints import read
from tests.malicious import rewrite_zip, write_code_weights


def weights(**values):
    return {"a.weight": torch.arange(6.0).reshape(2, 3), **values}


@pytest.mark.parametrize(
    "name",
    "detectron2.pkl caffe2.pkl protocol0.pkl model.pth pycls.pyth legacy.pth".split(),
)
def test_code_is_not_run(name, tmp_path):
    file = write_code_weights(tmp_path, tmp_path / "trace")[name]
    with pytest.raises(ValueError, match=r"it contains posix.mkdir; only tensors, arrays"):
        read(file)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_real_training_state(legacy, tmp_path):
    """What detectron2's trainer, its hooks and torch's optimizers and schedulers save."""
    parameter = torch.nn.Parameter(torch.rand(3, 2).t())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    state = {
        "model": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm2d(3)).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3]).state_dict(),
        "iteration": 9,
        "best": np.float64(41.5),
        "numbers": [np.int64(3), np.float32(0.1), np.bool_(True), np.arange(6.0).reshape(2, 3).T],
        "big_endian": np.arange(3, dtype=">i4"),
        "parameter": parameter,
        "half": torch.rand(3).bfloat16(),
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "set": {1, 2},
        "bytes": b"\xff\x00",
        "tied": [parameter[0]] * 3,
        "empty": torch.zeros(0, 4),
    }
    if not legacy:  # has no such numbers
        state["small"] = torch.arange(3).to(torch.uint16)
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    found = read(tmp_path / "m.pth")
    expected = torch.load(tmp_path / "m.pth", weights_only=False)
    assert found.keys() == expected.keys()
    assert found["scheduler"] == expected["scheduler"]
    assert isinstance(found["scheduler"]["milestones"], Counter)
    assert found["model"]._metadata == expected["model"]._metadata
    for name in ("model", "optimizer", "parameter", "half", "tied", "empty"):
        torch.testing.assert_close(_flat(found[name]), _flat(expected[name]), rtol=0, atol=0)
    for name in ("iteration", "best", "device", "size", "dtype", "set", "bytes"):
        assert found[name] == expected[name]
        assert type(found[name]) is type(expected[name])
    for value, other in zip(found["numbers"], expected["numbers"], strict=True):
        np.testing.assert_array_equal(value, other, strict=True)
    np.testing.assert_array_equal(found["big_endian"], [0, 1, 2])
    if not legacy:
        assert torch.equal(found["small"], state["small"])
        torch.testing.assert_close(read(tmp_path / "m.pth", mmap=True)["half"], state["half"])


def _flat(value):
    if isinstance(value, dict):
        return [part for child in value.values() for part in _flat(child)]
    if isinstance(value, list):
        return [part for child in value for part in _flat(child)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol(protocol, tmp_path):
    arrays = {
        "c": np.random.rand(2, 3).astype("f4"),
        "fortran": np.asfortranarray(np.random.rand(2, 3)),
        "view": np.arange(20)[::-3],
        "big": np.arange(4, dtype=">f8"),
        "bool": np.array([True, False]),
        "scalar": np.float16(0.5),
        "zero_d": np.array(3),
        "empty": np.zeros((0, 4)),
        "complex": np.array([1j]),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(arrays, protocol))
    expected = pickle.loads((tmp_path / "x.pkl").read_bytes())
    for name, found in read(tmp_path / "x.pkl").items():
        np.testing.assert_array_equal(found, expected[name], strict=True)


def tensor_file(path, size, stride, count=4):
    """A .pth of one tensor with a size and stride of one's choice, over ``count`` numbers."""
    tensor = torch.empty(0).set_(torch.zeros(count).untyped_storage(), 0, size, stride)
    torch.save({"model": {"x": tensor}}, path)


def huge_array(shape, dtype="f8", raw=b""):
    """The pickle of an array whose header says that it is larger than its bytes."""

    class Array:
        def __reduce__(self):
            start = np.array([]).__reduce__()
            return start[0], start[1], (1, shape, np.dtype(dtype), False, raw)

    return pickle.dumps({"x": Array()}, 2)


def opcode(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


NUMPY_ARRAY = b"cnumpy\nndarray\n"
HUGE = b"\x8a\x05\x00\x00\x00\x00\x10"  # 2 ** 36
PICKLE_BOMBS = {
    "shape": huge_array((2**36,)),
    "negative": huge_array((-2, -4), "u1", b"x" * 8),
    "object": huge_array((1,), "O", [0]),
    "number": huge_array((2**32,), "u1", 2**32),
    "structure": huge_array((1,), "f8,f8", b"x" * 16),
    "new_array": opcode(NUMPY_ARRAY, b"(", HUGE, b"\x85U\x01OtR"),
    "start": opcode(b"cnumpy.core.multiarray\n_reconstruct\n(", NUMPY_ARRAY, HUGE, b"\x85U\x01OtR"),
    "memo": opcode(b"}", b"r\xff\xff\xff\xff"),
    "memo_text": opcode(b"}", b"p4294967295\n"),
    "frame": b"\x80\x04\x95" + b"\xff" * 6 + b"\x00\x00}.",
    "bytes": b"\x80\x04\x8e" + b"\xff" * 6 + b"\x00\x00}.",
    "room": b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b".",
    "hex": opcode(b"c_codecs\nencode\n", b"U\x08" + b"x" * 8 + b"U\x03hex\x86R"),
    "bytearray": opcode(b"cbuiltins\nbytearray\n", HUGE, b"\x85R"),
    "state": opcode(b"ccollections\nOrderedDict\n)R}U\x04keysK\x01sb"),
    "nested": opcode(b"]" * 100_000, b"a" * 99_999),
    "entries": opcode(
        b"]q\x00(" + b"N" * 10 + b"e",
        *(b"]q%c(" % i + b"h%c" % (i - 1) * 10 + b"e" for i in range(1, 10)),
    ),
    "truncated": pickle.dumps({"x": np.zeros(1000)})[:4000],
}


@pytest.mark.parametrize("kind", PICKLE_BOMBS)
def test_pickle_bombs(kind, tmp_path):
    (tmp_path / "x.pkl").write_bytes(PICKLE_BOMBS[kind])
    refuse(tmp_path / "x.pkl")


def test_arrays_many_times(tmp_path):
    array = np.zeros(100_000)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([array] * 16))
    assert len(read(tmp_path / "x.pkl")) == 16
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([array] * 17))
    refuse(tmp_path / "x.pkl", "asks for 13600000 bytes of tensors, more than 16 times its size")


@pytest.mark.parametrize("legacy", [False, True])
def test_expanded_tensor(legacy, tmp_path):
    """Four terabytes, of which the file holds one number."""
    tensor = torch.zeros(1).expand(10**12)
    content = {"model": {"x": tensor}}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert torch.load(tmp_path / "x.pth", weights_only=True)["model"]["x"].numel() == 10**12
    refuse(tmp_path / "x.pth", "asks for 4000000000000 bytes")


def archive_bomb(kind, source, target):
    if kind == "compressed":
        rewrite_zip(source, target, compression=zipfile.ZIP_DEFLATED)
    elif kind == "record":  # the description says more than the record has
        storage = b"\x00\x00\x00\x10"

        def change(name, data):
            if not name.endswith("data.pkl"):
                return data
            assert data.count(b"K\x04t") == 1
            return data.replace(b"K\x04t", b"J" + storage + b"t")

        rewrite_zip(source, target, change)
    elif kind == "twice":
        rewrite_zip(source, target)
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "a") as new:
            name = next(name for name in old.namelist() if name.endswith("data.pkl"))
            new.writestr(name.replace("data.pkl", "DATA.pkl"), old.read(name))
    elif kind == "overlap":  # a thousand records that are one
        torch.save({"x": torch.zeros(1000)}, target)
        with zipfile.ZipFile(target, "a") as new:
            largest = max(new.infolist(), key=lambda record: record.file_size)
            for number in range(1000):
                record = copy.copy(largest)
                record.filename = f"{record.filename}{number}"
                new.filelist.append(record)
            new.writestr(record.filename.partition("/")[0] + "/last", "")
    elif kind == "function":
        call = opcode(b"cbuiltins\nbytearray\n", HUGE, b"\x85R")
        rewrite_zip(source, target, lambda name, data: call if "data.pkl" in name else data)
    elif kind == "tensor":
        call = opcode(b"ctorch\nTensor\n", HUGE, b"\x85R")
        rewrite_zip(source, target, lambda name, data: call if "data.pkl" in name else data)
    elif kind == "truncated":
        target.write_bytes(source.read_bytes()[:-30])
    elif kind == "empty":
        target.write_bytes(b"")
    elif kind == "no_data":
        with zipfile.ZipFile(target, "w") as new:
            new.writestr("x/version", "3")
    else:
        target.write_bytes(b"PK\x03\x04" + b"x" * 100)


@pytest.mark.parametrize(
    "kind",
    "compressed record twice overlap function tensor truncated empty no_data garbage".split(),
)
def test_archive_bombs(kind, tmp_path):
    torch.save({"model": {"x": torch.arange(4.0)}}, tmp_path / "good.pth")
    archive_bomb(kind, tmp_path / "good.pth", tmp_path / "bad.pth")
    refuse(tmp_path / "bad.pth")


def refuse(path, message="."):
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the memory
    before, start = peak_memory(), time.monotonic()
    with pytest.raises(ValueError, match=message):
        read(path)
    assert time.monotonic() - start < 20
    assert peak_memory() - before < 5e8


def peak_memory():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
