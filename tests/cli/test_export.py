"""The command that exports: what it writes, refuses, and runs without this package."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch.testing import assert_close

from nl_detectron.config import load_config
from nl_detectron.engine import export
from nl_detectron.model_zoo import get_config_file
from nl_detectron_cli import export as command
from tests.conftest import SMALL
from tests.engine.test_export import DETECTOR, active, stock
from tests.running import run, words

RETINANET = "COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml"
# Runs a program on pictures, and saves what it returns, as a user would without this package.
LOAD = """
import json, sys
import numpy as np
file, pictures, outputs = sys.argv[1:]
if file.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    run = lambda image: dict(zip(names, session.run(None, {"images": image[None]})))
else:
    import torch, torchvision
    torch.set_grad_enabled(False)
    if file.endswith(".pt2"):
        program = torch.export.load(file).module()
        run = lambda image: program(torch.from_numpy(image))
    else:
        extra = {"outputs.json": ""}
        traced = torch.jit.load(file, _extra_files=extra)
        names = json.loads(extra["outputs.json"])
        run = lambda image: dict(zip(names, traced(torch.from_numpy(image))))
results = {}
for number, image in np.load(pictures).items():
    results.update((number + name, np.asarray(value)) for name, value in run(image).items())
assert not {"nl_detectron", "detectron2"} & sys.modules.keys()
np.savez(outputs, **results)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a config, weights and an image, and the model."""
    folder = tmp_path_factory.mktemp("trained")
    options = [*SMALL, *DETECTOR, "INPUT.MIN_SIZE_TEST", 96, "MODEL.WEIGHTS", ""]
    cfg = load_config(get_config_file("Base-RCNN-NL-FPN.yaml"), options)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(5)
    model = active(build_model(cfg))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    noise = np.random.default_rng(0).integers(0, 255, (96, 130, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "image.png"), noise)
    return folder, model


def arguments(folder, output, *options):
    files = f"--config-file {folder}/config.yaml --weights {folder}/model.pth"
    return words(files, f"--input {folder}/image.png --output {output}", *options)


def test_backbone(trained, tmp_path, capsys):
    output = tmp_path / "new" / "backbone.ts"
    command.main(arguments(trained[0], output, "--part backbone --format torchscript"))
    *sizes, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {output}"
    starts = ["96 x 130, batch of 1: ", "68 x 92, batch of 2: ", "65 x 69, batch of 3: "]
    for line, start in zip(sizes, starts, strict=True):
        assert line.startswith(f"{start}agrees to ")
    assert [path.name for path in output.parent.iterdir()] == ["backbone.ts"]


@pytest.mark.parametrize("fast", ["fp32", "bf16"])
def test_fast(fast, trained, tmp_path):
    """The weights are in the file, so half precision halves it."""
    sizes = []
    for option in ("", f"--fast={fast}"):
        output = tmp_path / "backbone.ts"
        options = f"--part backbone --format torchscript {option}"
        command.main(arguments(trained[0], output, options))
        sizes.append(output.stat().st_size)
    assert sizes[1] / sizes[0] == pytest.approx({"fp32": 1, "bf16": 0.5}[fast], abs=0.15)


def test_file_that_differs_is_not_kept(trained, tmp_path, monkeypatch):
    output = tmp_path / "backbone.ts"
    output.write_text("an earlier one")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="must agree with the model to -1.0, but at 96 x 130"):
        command.main(arguments(trained[0], output, "--part backbone --format torchscript"))
    assert output.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("a.onnx", "", "--output must end in .pt2 with --format torch, got a.onnx"),
        ("a.onnx", "--format onnx", "--format onnx exports backbones only: add --part backbone"),
        ("a.pt2", "--format onnx", "--output must end in .onnx with --format onnx, got a.pt2"),
        ("a.pt2", "--fast=bf16", "--fast=bf16 is for --format torchscript, got torch"),
    ],
)
def test_arguments_that_contradict(output, options, message, capsys):
    files = f"--config-file {RETINANET} --weights a.pth --input a.png --output {output}"
    with pytest.raises(SystemExit, match="2"):
        command.parse_args(words(files, options))
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_model_that_only_its_backbone_is_exported_of(trained, tmp_path):
    files = f"--config-file {RETINANET} --input {trained[0]}/image.png --output {tmp_path}/a.pt2"
    with pytest.raises(SystemExit, match="META_ARCHITECTURE GeneralizedRCNN, got RetinaNet; "):
        command.main([*words(files), "--weights", "", "MODEL.DEVICE", "cpu"])


def test_input_without_an_image(trained, tmp_path):
    (tmp_path / "image.png").write_bytes(b"no image")
    given = arguments(trained[0], tmp_path / "a.pt2", f"--input {tmp_path}/image.png")
    with pytest.raises(SystemExit, match="--input .*image.png has no image that can be read"):
        command.main(given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "file_format"), [("model", "torch"), ("model", "torchscript"), ("backbone", "onnx")]
)
def test_runs_without_this_package(part, file_format, trained, tmp_path):
    folder, model = trained
    file = tmp_path / f"a{command.SUFFIXES[file_format]}"
    run("tools/export.py", *arguments(folder, file, f"--part {part} --format {file_format}"))
    images = [torch.rand(3, *size) * 255 for size in [(65, 133), (230, 131), (96, 128)]]
    pictures, outputs = tmp_path / "pictures.npz", tmp_path / "outputs.npz"
    np.savez(pictures, **{str(number): image.numpy() for number, image in enumerate(images)})
    subprocess.run([sys.executable, "-I", "-c", LOAD, file, pictures, outputs], check=True)
    got = np.load(outputs)
    for number, image in enumerate(images):
        if part == "model":
            expected = stock(model, image)
        else:
            with torch.no_grad():
                padded = model.preprocess_image([{"image": image}]).tensor
                expected = model.backbone(padded)
        assert {name[1:] for name in got if name[0] == str(number)} == expected.keys()
        for name, value in expected.items():
            atol = 1e-4 * max(value.abs().max().item(), 1)
            assert_close(torch.from_numpy(got[f"{number}{name}"]), value, rtol=0, atol=atol)
