"""Random damage to configs and checkpoints, good and malicious: refused soon, or harmless."""

from __future__ import annotations

import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nl_detectron.config import load_config
from nl_detectron.safety.checkpoints import read
from tests.malicious import write_code_configs, write_code_weights, write_memory_weights
from tests.running import ROOT

pytestmark = pytest.mark.slow
MUTATIONS = 2000
PIECES = [
    *(bytes([code]) for code in pickle.__dict__.values() if isinstance(code, int) and code < 256),
    *(value for value in pickle.__dict__.values() if isinstance(value, bytes) and len(value) == 1),
    *(b"cos\nmkdir\n", b"cbuiltins\neval\n", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 8),
    *(b"*a", b"&a ", b"[", b"{", b"!!python/object/apply:os.mkdir ", b"<<: ", b"_BASE_: ", b"\n"),
]


def mutate(content, rng):
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 4, 20, 200)))
        change = rng.randrange(5)
        if change == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif change == 1:
            del data[start:end]
        elif change == 2:
            data[start:start] = rng.choice(PIECES)
        elif change == 3:
            data[start : start + 1] = rng.choice(PIECES)
        else:
            data[start:start] = data[rng.randrange(len(data) + 1) :][: end - start]
    return bytes(data)


def resident():
    """Bytes that this process has had at most since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def check(folder, name, contents, load):
    rng = random.Random(0)
    refused, before = 0, resident()
    before = resident()
    for number in range(MUTATIONS):
        content = mutate(rng.choice(contents), rng)
        file = folder / name
        file.write_bytes(content)
        start = time.monotonic()
        try:
            load(file)
        except (ValueError, OSError) as error:
            refused += bool(str(error))
        assert time.monotonic() - start < 10, number
        assert resident() - before < 1e9, number
        assert not (folder / "trace").exists(), number
    assert refused > MUTATIONS / 10


def test_configs(tmp_path):
    files = [*write_code_configs(tmp_path, tmp_path / "trace").values()]
    files += ROOT.glob("configs/**/*NL_FPN_1x.yaml")
    check(tmp_path, "x.yaml", [file.read_bytes() for file in files], load_config)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_weights(suffix, tmp_path):
    state = {"a": torch.rand(4, 3), "b": torch.arange(3), "c": torch.rand(3, 2).t().half()}
    arrays = {name: value.numpy() for name, value in state.items()}
    content = {"model": state, "__author__": "x", "best": np.float64(3), "list": [1, (2, None)]}
    for legacy in (False, True):
        torch.save(content, tmp_path / f"{legacy}.pth", _use_new_zipfile_serialization=not legacy)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        dumped = pickle.dumps({**content, "model": arrays}, protocol)
        (tmp_path / f"{protocol}.pkl").write_bytes(dumped)
    write_code_weights(tmp_path, tmp_path / "trace")
    write_memory_weights(tmp_path)
    files = [file for file in tmp_path.glob(f"*{suffix}") if file.stat().st_size < 10**5]
    assert len(files) >= 5
    check(tmp_path, f"x{suffix}", [file.read_bytes() for file in files], read)
