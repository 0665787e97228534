"""Every tool, given files that run code or fill the memory: it refuses them, and says why."""

from __future__ import annotations

import importlib
import itertools
import json
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron.config import load_config
from nl_detectron.engine.checkpoint import StrictCheckpointer, stored_metadata
from nl_detectron_cli import COMMANDS, convert, predict
from tests.malicious import MakeFolder, write_code_configs, write_code_weights, write_memory_weights
from tests.running import QUICK, TINY, words

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
TRAINING = "--config-file {config} --train-json {json} --train-images {images}"
MODEL = "--config-file {config} --weights {weights}"
OPTIONS = "MODEL.WEIGHTS {weights} OUTPUT_DIR {out}"
TOOLS = {
    "train": f"{TRAINING} {OPTIONS}",
    "train --eval-only": "--eval-only --config-file {config} --test-json {json} "
    f"--test-images {{images}} {OPTIONS}",
    "ab": f"{TRAINING} {OPTIONS}",
    "overfit": "--config-file {config} --count 2 --json {json} --images {images} " + OPTIONS,
    "predict": f"{MODEL} --input {{images}} --output {{out}}",
    "attention": f"{MODEL} --input {{images}} --query 1,1 --output {{out}}",
    "health": f"{MODEL} --input {{images}}",
    "convert": "{weights} {out}.pth --from nl_detectron --to mmcv --config-file {config}",
    "analyze": "--config-file {config} OUTPUT_DIR {out}",
    "check-data": TRAINING,
    "export": f"{MODEL} --input {{images}}/1.png --output {{out}}.pt2",
}
WITH_WEIGHTS = [tool for tool, arguments in TOOLS.items() if "{weights}" in arguments]
CODE = ["detectron2.pkl", "caffe2.pkl", "protocol0.pkl", "model.pth", "pycls.pyth", "legacy.pth"]
MEMORY = ["expanded.pth", "compressed.pth", "shape.pkl", "numbered.pkl", "nested.pkl"]


@pytest.fixture(scope="module")
def good_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    cfg = load_config(CONFIG, TINY)
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return path


@pytest.fixture
def refused(custom_data, good_weights, tmp_path):
    """Runs a tool, which must end with an error; returns the message."""

    def run(tool, config=CONFIG, weights=good_weights, options=()):
        files = {"config": config, "weights": weights, "json": custom_data}
        files |= {"images": custom_data.parent / "images", "out": tmp_path / "out"}
        command, *flags = tool.split()
        module = importlib.import_module(f"nl_detectron_cli.{command.replace('-', '_')}")
        known = [*TINY, *options] if "OUTPUT_DIR" in TOOLS[tool] else []
        with pytest.raises(SystemExit) as exit:
            module.main([*words(TOOLS[tool].format(**files)), *known])
        assert isinstance(exit.value.code, str), exit.value.code
        assert len(exit.value.code.splitlines()) == 1
        assert not (tmp_path / "trace").exists()
        return exit.value.code

    return run


def test_all_tools_are_here():
    assert {tool.split()[0] for tool in TOOLS} | {"doctor"} == set(COMMANDS)


@pytest.mark.parametrize("tool", TOOLS)
def test_configs_with_code(tool, refused, tmp_path):
    for file in write_code_configs(tmp_path, tmp_path / "trace").values():
        assert "could run code" in refused(tool, config=file)
    (tmp_path / "lazy.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    assert "which is code" in refused(tool, config=tmp_path / "lazy.py")
    (tmp_path / "remote.yaml").write_text("_BASE_: http://127.0.0.1:9/x.yaml\n")
    assert "--allow-remote" in refused(tool, config=tmp_path / "remote.yaml")


@pytest.mark.parametrize(("tool", "kind"), [*zip(WITH_WEIGHTS, itertools.cycle([*CODE, *MEMORY]))])
def test_weights(tool, kind, refused, tmp_path):
    check_weights(tool, kind, refused, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CODE, *MEMORY])
@pytest.mark.parametrize("tool", WITH_WEIGHTS)
def test_all_weights(tool, kind, refused, tmp_path):
    check_weights(tool, kind, refused, tmp_path)


def check_weights(tool, kind, refused, folder):
    files = write_code_weights(folder, folder / "trace") | write_memory_weights(folder)
    message = refused(tool, weights=files[kind])
    assert files[kind].name in message
    if kind in CODE:
        assert "it contains posix.mkdir; only tensors, arrays" in message


@pytest.mark.parametrize("tool", ["train", "train --eval-only", "ab", "overfit"])
def test_proposals(tool, refused, tmp_path):
    file = tmp_path / "proposals.pkl"
    file.write_bytes(pickle.dumps({"ids": [], "boxes": MakeFolder(tmp_path / "trace")}))
    options = ["MODEL.LOAD_PROPOSALS", "True"]
    for split in ("TRAIN", "TEST"):
        options += [f"DATASETS.PROPOSAL_FILES_{split}", f"('{file}',)"]
    assert "proposals.pkl: it contains posix.mkdir" in refused(tool, options=options)


LINKED = ["train", "train --eval-only", "ab", "overfit", "predict", "attention"]


@pytest.mark.parametrize("tool", LINKED)
def test_links(tool, refused, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / "inference").mkdir(parents=True)
    (tmp_path / "out" / "log.txt").symlink_to(tmp_path / "mine")
    assert "log.txt is a symbolic link" in refused(tool)
    assert (tmp_path / "mine").read_text() == "mine"


def test_link_for_a_config(good_weights, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / "i3d.yaml").symlink_to(tmp_path / "mine")
    files = f"{good_weights} {tmp_path}/i3d.pth --write-config {tmp_path}/out/i3d.yaml"
    with pytest.raises(SystemExit, match=r"i3d\.yaml is a symbolic link"):
        convert.main(words(files, "--from slowfast --to nl_detectron"))
    assert (tmp_path / "mine").read_text() == "mine"


def png(width, height):
    """A picture with next to nothing of its pixels."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def test_huge_picture(good_weights, tmp_path, capsys):
    (tmp_path / "huge.png").write_bytes(png(40_000, 40_000))
    given = MODEL.format(config=CONFIG, weights=good_weights)
    with pytest.raises(SystemExit, match="no image of .* could be processed"):
        predict.main([*words(given, "--input", tmp_path, "--output", tmp_path / "o"), *TINY])
    assert "huge.png: DecompressionBombError: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"model": [1]},
        {"model": {1: 2}},
        {"model": {"x": "text"}},
        {"model": {"x": None}},
        {"model": {"x": torch.zeros(2, 2).to_sparse()}},
        "text",
    ],
)
def test_other_content(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth: (it |Unsupported type)"):
        StrictCheckpointer(torch.nn.Linear(2, 3)).load(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    "metadata",
    [
        [1],
        {"thing_classes": 3},
        {"thing_classes": [[1]]},
        {"keypoint_flip_map": [["a"]]},
        {"keypoint_connection_rules": [1]},
        {"category_ids": 7},
        {"keypoint_oks_sigmas": ["x"]},
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_metadata_of_strangers(metadata, beside, tmp_path):
    if beside:
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    torch.save({"model": {}} | ({} if beside else {"metadata": metadata}), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: the metadata stored with them"):
        stored_metadata(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{"])
def test_damaged_metadata(text, refused, good_weights, tmp_path):
    shutil.copy(good_weights, tmp_path / "model.pth")
    (tmp_path / "metadata.json").write_text(text)
    assert "metadata.json is not JSON" in refused("predict", weights=tmp_path / "model.pth")


def test_weights_of_the_model_zoos(tmp_path):
    """What the libraries write is loaded by the same reader."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3)})
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    extra = {"scale": np.float32(0.5)}
    files = {
        "zoo.pkl": pickle.dumps({"model": arrays, "__author__": "Detectron2"}),
        "c2.pkl": pickle.dumps({"blobs": {"a_w": 1 + arrays["a.weight"], "a_b": arrays["a.bias"]}}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"model": model.state_dict(), "iteration": 3, **extra}, tmp_path / "native.pth")
    torch.save({"model_state": model.state_dict()}, tmp_path / "pycls.pyth")
    for name in ("zoo.pkl", "native.pth", "pycls.pyth"):
        other = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3)})
        StrictCheckpointer(other, complete=True).load(str(tmp_path / name))
        torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    c2 = StrictCheckpointer(other)._load_file(str(tmp_path / "c2.pkl"))
    assert c2.pop("model").keys() == {"a_w", "a_b"}
    assert c2 == {"__author__": "Caffe2", "matching_heuristics": True}
