"""Checkpoint files: what is read and written, and that no file runs code."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from nl_detectron.weights import DIALECTS, load, save
from nl_detectron.weights.files import SUFFIXES, to_tensor

SAFETENSORS = pytest.param(
    ".safetensors",
    marks=pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="not there"),
)
ANY_SUFFIX = [suffix for suffix in SUFFIXES if suffix != ".safetensors"] + [SAFETENSORS]

STATE = {
    "float": torch.tensor([1 / 3, float("nan"), -0.0]),
    "double": torch.rand(2, 3, dtype=torch.float64),
    "half": torch.rand(3, 2).half(),
    "number": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
}


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# Keys of the files of each library, the first of which has the weights; others hold these alone.
KEYS = dict.fromkeys(["nl_detectron", "detectron2"], ["model", "__author__", "matching_heuristics"])
KEYS |= dict.fromkeys(["mmcv", "mmaction2_tsm", "tsm"], ["state_dict"])
KEYS |= {"slowfast": ["model_state"], "caffe2": ["blobs"]}


def read(path):
    """The content of a file, read by the library that the format belongs to."""
    if path.suffix == ".pkl":
        return pickle.loads(path.read_bytes())
    if path.suffix == ".safetensors":
        return importlib.import_module("safetensors.torch").load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("suffix", ANY_SUFFIX)
def test_same_bits(suffix, dialect, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save(STATE, path, DIALECTS[dialect])
    written = read(path)
    if dialect in KEYS and suffix != ".safetensors":
        assert list(written) == KEYS[dialect]
        written = written[KEYS[dialect][0]]
    state = load(path)[0]
    assert written.keys() == state.keys() == STATE.keys()
    for name, value in STATE.items():
        for found in (np.asarray(written[name]), to_tensor(state[name]).numpy()):
            assert found.dtype == value.numpy().dtype
            assert found.shape == value.shape
            assert found.tobytes() == value.numpy().tobytes()


@pytest.mark.parametrize("suffix", [".pth", SAFETENSORS])
def test_bfloat16(suffix, tmp_path):
    state = {"x": torch.rand(3).bfloat16()}
    save(state, tmp_path / f"weights{suffix}", DIALECTS["mmcv"])
    assert torch.equal(load(tmp_path / f"weights{suffix}")[0]["x"], state["x"])
    with pytest.raises(ValueError, match="cannot hold bfloat16"):
        save(state, tmp_path / "weights.pkl", DIALECTS["mmcv"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(protocol, tmp_path):
    blobs = OrderedDict(conv1_w=np.random.rand(2, 3).astype("f4"), lr=np.float32(0.1), iter=3)
    (tmp_path / "c2.pkl").write_bytes(pickle.dumps({"blobs": blobs, "cfg": "text"}, protocol))
    state, other_entries = load(tmp_path / "c2.pkl")
    assert other_entries == ["cfg"]
    assert (state["conv1_w"] == blobs["conv1_w"]).all()
    assert (state["lr"], state["iter"]) == (blobs["lr"], 3)


def test_pickle_of_python_2(tmp_path):
    """Protocol 2 of Python 2 has byte strings, and numpy under its old name."""
    array = np.arange(200, 206, dtype=np.uint8)
    data = (
        b"\x80\x02}U\x05blobs}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x06\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06"
        + array.tobytes()
        + b"tbss."
    )
    (tmp_path / "c2.pkl").write_bytes(data)
    assert (load(tmp_path / "c2.pkl")[0]["w"] == array).all()


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pyth"])
def test_code_is_not_run(suffix, tmp_path):
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    data = {"model": {"x": Malicious(trace)}}
    path.write_bytes(pickle.dumps(data)) if suffix == ".pkl" else torch.save(data, path)
    with pytest.raises(ValueError, match=r"it contains (posix|nt)\.mkdir; only tensors"):
        load(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(data))
    assert trace.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "torch.hub.load", "os.system"])
def test_pickle_with_another_global_is_refused(name, tmp_path):
    module, _, attribute = name.rpartition(".")
    (tmp_path / "x.pkl").write_bytes(
        b"\x80\x02}U\x01xc%b\n%b\ns." % (module.encode(), attribute.encode())
    )
    with pytest.raises(ValueError, match=f"it contains {name}; only tensors"):
        load(tmp_path / "x.pkl")


@pytest.mark.parametrize("suffix", ANY_SUFFIX)
def test_damaged_file_is_named(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save(STATE, path, DIALECTS["torchvision"])
    for content in (path.read_bytes()[:-40], b"garbage"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read .*weights{suffix}") as error:
            load(path)
        assert "weights_only" not in str(error.value)  # torch advises to set it to False


def test_file_without_a_state_dict(tmp_path):
    for data, name in (([1, 2], "list"), ({1: torch.ones(1)}, "dict"), ({"model": {1: 2}}, "dict")):
        torch.save(data, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=f"holds a {name}, not a dictionary of named"):
            load(tmp_path / "x.pth")


def test_path_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"must be one of .*'.pkl'.*, got '.npz'"):
        load(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="got ''"):
        save(STATE, tmp_path / "x", DIALECTS["mmcv"])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*x\.pth"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [3, "text", np.float32(3), np.array(["a"]), np.array([{}]), None])
def test_not_a_tensor(value):
    assert to_tensor(value) is None


def test_tensor_has_its_own_memory():
    array = np.zeros((2, 3))[::-1].T
    tensor = to_tensor(array)
    tensor += 1
    assert not array.any()
    assert tensor.is_contiguous()


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        save(STATE, tmp_path / "x.safetensors", DIALECTS["mmcv"])
