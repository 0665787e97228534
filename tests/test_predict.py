"""tools/predict.py on an image, a folder and a video."""

from __future__ import annotations

import contextlib
import io
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from pycocotools.coco import COCO

from nl_detectron.coco_files import register_coco_files
from nl_detectron.config import load_config
from nl_detectron.data_sets import take_numbers
from nl_detectron.engine import Trainer, build_predictor
from tests.running import QUICK, TINY, forget_own_data, load_tool

CONFIG = str(QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml")
OPTIONS = [*TINY, "MODEL.MASK_ON", "True", "TEST.DETECTIONS_PER_IMAGE", "5"]
CLASSES = ["MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model with new weights: its few objects are wrong, but there are some."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    model = build_model(load_config(CONFIG, [*OPTIONS, *CLASSES]))
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture
def predict(weights, own_data):
    main = load_tool("predict").main

    def run(source, *arguments, config=CONFIG, weights=weights, annotations=own_data):
        forget_own_data()  # of a call before, with another folder
        named = {"config-file": config, "weights": weights, "input": source}
        fixed = [word for name, value in named.items() for word in (f"--{name}", value)]
        fixed += ["--annotations", annotations] if annotations else []
        fixed += ["--score-threshold", "0.1"]
        main([str(word) for word in [*fixed, *arguments, *OPTIONS]])

    return run


@pytest.fixture
def images(own_data):
    return own_data.parent / "images"


def read(path):
    return json.loads(path.read_text())


def touched(picture, image, tolerance=0):
    """The share of pixels that are not the image's."""
    assert picture.shape == image.shape
    return (np.abs(picture.astype(int) - image).max(axis=2) > tolerance).mean()


def test_folder_as_evaluated(predict, images, own_data, weights, tmp_path, capsys):
    """The objects are those that detectron2's evaluator finds, and COCO's tools read them."""
    predict(images, "--output", tmp_path / "pictures", "--json", tmp_path / "new/found.json")
    assert "4 images done, 0 skipped" in capsys.readouterr().out
    for image in images.iterdir():
        picture = cv2.imread(str(tmp_path / "pictures" / image.name))
        assert 0.01 < touched(picture, cv2.imread(str(image))) < 0.9

    cfg = load_config(CONFIG, [*OPTIONS, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.1"])
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    register_coco_files("own_test", str(own_data), str(images))
    cfg.DATASETS.TEST = ("own_test",)
    take_numbers(cfg, "own_test")
    model = build_predictor(cfg, str(weights)).model
    Trainer.test(cfg, model)
    found = read(tmp_path / "new/found.json")
    assert found == read(tmp_path / "inference/coco_instances_results.json")
    assert {a["image_id"] for a in found} == {1, 2, 3, 4}
    assert {a["category_id"] for a in found} == {3}
    assert all(len(a["keypoints"]) == 2 * 3 for a in found)
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(str(own_data)).loadRes(found).anns) == len(found)


def test_broken_images_are_named_skipped_and_counted(predict, images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.png").write_bytes((images / "1.png").read_bytes())
    (folder / "2.png").write_bytes((images / "2.png").read_bytes()[:2000])
    (folder / "3.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    (folder / "new.png").write_bytes((images / "1.png").read_bytes())
    predict(folder, "--output", tmp_path / "pictures")
    printed = capsys.readouterr()
    assert "1 images done, 3 skipped" in printed.out
    for name in ("2.png", "3.jpg", "new.png: the annotations do not have it"):
        assert f"skipped {folder / name}" in printed.err
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["1.png"]


@pytest.mark.parametrize(("name", "image_id"), [("000000000139.png", 139), ("cat.png", "cat")])
def test_ids_without_annotations(name, image_id, images, weights, tmp_path):
    image = tmp_path / name
    image.write_bytes((images / "1.png").read_bytes())
    load_tool("predict").main(
        [
            *("--config-file", CONFIG, "--weights", str(weights), "--input", str(image)),
            *("--json", str(tmp_path / "found.json"), "--score-threshold", "0.1"),
            *(*OPTIONS, *CLASSES, "DATASETS.TEST", "()"),
        ]
    )
    found = read(tmp_path / "found.json")
    assert {(a["image_id"], a["category_id"]) for a in found} == {(image_id, 1)}


def test_video(predict, images, tmp_path):
    frames = [cv2.imread(str(images / f"{i}.png")) for i in (1, 2, 3)]
    for frame in frames:
        frame[:, :, 0] = 250  # blue
    writer = cv2.VideoWriter(
        str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (96, 64)
    )
    for frame in frames:
        writer.write(frame)
    writer.release()
    predict(tmp_path / "clip.avi", "--output", tmp_path / "out", "--json", tmp_path / "found.json")
    assert {a["image_id"] for a in read(tmp_path / "found.json")} == {0, 1, 2}

    drawn = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == 5.0
    for frame in frames:
        there, picture = drawn.read()
        assert there
        assert 0.01 < touched(picture, frame, tolerance=60) < 0.9  # the codec changes all a little
    assert not drawn.read()[0]


def test_mistakes(predict, images, weights, own_data, tmp_path):
    def refuse(message, source=images, *options, output=tmp_path / "out", **kwargs):
        with pytest.raises(SystemExit, match=message):
            predict(source, "--output", output, *options, **kwargs)

    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    refuse("lost.png", images / "lost.png")
    refuse("holds no image", empty)
    refuse("text.mp4 is no image .* no video", text)
    refuse("lost.pth not found", weights=tmp_path / "lost.pth")
    refuse("text.mp4: this file does not hold tensors alone", weights=text)
    refuse("lost.yaml' does not exist", config=tmp_path / "lost.yaml")
    refuse("pictures there would replace", output=images)
    seven = ("MODEL.ROI_HEADS.NUM_CLASSES", "7")
    refuse("has 7 classes, but keypoints_coco_2017_val has 1", images, *seven, annotations=None)

    state = torch.load(weights)["model"]
    lost = {name: value for name, value in state.items() if "res4.1" not in name}
    torch.save({"model": lost}, tmp_path / "shallow.pth")
    refuse("lacks .*res4.1.*another depth", weights=tmp_path / "shallow.pth")
    deep = {**state, "backbone.bottom_up.res4.2.conv1.weight": torch.zeros(1)}
    torch.save({"model": deep}, tmp_path / "deep.pth")
    refuse("no place for: .*res4.2.conv1", weights=tmp_path / "deep.pth")
    stock = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    refuse("no place for: .*non_local0", images, *stock)
