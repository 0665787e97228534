"""tools/predict.py on an image, a folder and a video."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import threading
import time

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from pycocotools.coco import COCO

from nl_detectron.config import PREDICTORS, load_config
from nl_detectron.engine.coco.data_sets import set_num_classes
from nl_detectron.engine.coco.files import register_coco_files
from nl_detectron.engine.coco.trainer import CocoTrainer
from nl_detectron.engine.predictor import Predictor, build_predictor
from nl_detectron_cli import train
from nl_detectron_cli.predict import main
from tests.generated_coco import write_video
from tests.running import QUICK, TINY, forget_custom_data

CONFIG = str(QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml")
CLASSES = ["MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2"]
OPTIONS = [*TINY, *CLASSES, "MODEL.MASK_ON", "True", "TEST.DETECTIONS_PER_IMAGE", "5"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model with new weights: its few objects are wrong, but there are some."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    model = build_model(load_config(CONFIG, OPTIONS))
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture
def predict(weights, custom_data):

    def run(source, *arguments, config=CONFIG, weights=weights, annotations=custom_data):
        forget_custom_data()  # of a call before, with another folder
        named = {"config-file": config, "weights": weights, "input": source}
        fixed = [word for name, value in named.items() for word in (f"--{name}", value)]
        fixed += ["--annotations", annotations] if annotations else []
        fixed += ["--score-threshold", "0.1"]
        main([str(word) for word in [*fixed, *arguments, *OPTIONS]])

    return run


@pytest.fixture
def images(custom_data):
    return custom_data.parent / "images"


def read(path):
    return json.loads(path.read_text())


def touched(picture, image, tolerance=0):
    """The share of pixels that are not the image's."""
    assert picture.shape == image.shape
    return (np.abs(picture.astype(int) - image).max(axis=2) > tolerance).mean()


def test_folder_as_evaluated(predict, images, custom_data, weights, tmp_path, capsys):
    """The objects are those that detectron2's evaluator finds, and COCO's tools read them."""
    predict(images, "--output", tmp_path / "pictures", "--json", tmp_path / "new/found.json")
    assert "4 images done, 0 skipped" in capsys.readouterr().out
    for image in images.iterdir():
        picture = cv2.imread(str(tmp_path / "pictures" / image.name))
        assert 0.01 < touched(picture, cv2.imread(str(image))) < 0.9

    cfg = load_config(CONFIG, [*OPTIONS, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.1"])
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    register_coco_files("custom_test", str(custom_data), str(images))
    cfg.DATASETS.TEST = ("custom_test",)
    set_num_classes(cfg, "custom_test")
    model = Predictor(cfg, str(weights)).model
    CocoTrainer.test(cfg, model)
    found = read(tmp_path / "new/found.json")
    assert found == read(tmp_path / "inference/coco_instances_results.json")
    assert {a["image_id"] for a in found} == {1, 2, 3, 4}
    assert {a["category_id"] for a in found} == {3}
    assert all(len(a["keypoints"]) == 2 * 3 for a in found)
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(str(custom_data)).loadRes(found).anns) == len(found)


@pytest.mark.parametrize(("fast", "tolerance"), [("--fast", 1e-3), ("--fast=bf16", 0.05)])
def test_fast(fast, tolerance, predict, images, tmp_path):
    """The same objects, up to rounding, which tells that the model is another one."""
    for name, options in (("stock", []), ("fast", [fast])):
        predict(images / "1.png", *options, "--json", tmp_path / f"{name}.json")
    expected, found = read(tmp_path / "stock.json"), read(tmp_path / "fast.json")
    best, other = (max(a, key=lambda o: o["score"]) for a in (expected, found))
    assert other["score"] == pytest.approx(best["score"], abs=tolerance)
    assert other["bbox"] == pytest.approx(best["bbox"], abs=64 * tolerance)
    assert [o["score"] for o in found] != [o["score"] for o in expected]


def test_images_that_fail_are_named_skipped_and_counted(predict, images, tmp_path, capsys):
    """In the decoder, in the network (too flat to be resized) and when the picture is written."""
    folder, pictures = tmp_path / "images", tmp_path / "pictures"
    (pictures / "6.png").mkdir(parents=True)
    folder.mkdir()
    whole = (images / "1.png").read_bytes()
    for name in ("1.png", "6.png", "new.png"):
        (folder / name).write_bytes(whole)
    (folder / "2.png").write_bytes(whole[:2000])
    (folder / "3.jpg").write_text("no image")
    cv2.imwrite(str(folder / "4.png"), np.zeros((1, 4000, 3), dtype=np.uint8))
    predict(folder, "--output", pictures, "--json", tmp_path / "found.json")
    printed = capsys.readouterr()
    assert "2 images done, 4 skipped" in printed.out
    for name in ("2.png", "3.jpg", "4.png", "6.png: OpenCV cannot write"):
        assert f"skipped {folder / name}" in printed.err
    assert {path.name for path in pictures.iterdir() if path.is_file()} == {"1.png", "new.png"}
    # The annotations do not have new.png.
    assert {result["image_id"] for result in read(tmp_path / "found.json")} == {1, "new"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_keeps_what_is_done(predict, images, tmp_path, capsys, number):
    folder, pictures, found = tmp_path / "images", tmp_path / "pictures", tmp_path / "found.json"
    folder.mkdir()
    for i in range(99):
        (folder / f"{i:02d}.png").write_bytes((images / "1.png").read_bytes())

    def stop_at_the_third():
        while not (pictures / "02.png").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    def not_handled(*_):
        raise AssertionError("the signal reached the test")

    previous = signal.signal(signal.SIGTERM, not_handled)
    # A process that a script starts in the background ignores SIGINT from the beginning.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=stop_at_the_third, daemon=True).start()
        with pytest.raises(SystemExit, match="stopped before the end; the results so far are kept"):
            predict(folder, "--output", pictures, "--json", found)
        assert signal.getsignal(signal.SIGTERM) is not_handled
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.signal(signal.SIGINT, interrupt)
    done = {result["image_id"] for result in read(found)}
    assert done == set(range(len(done)))
    assert 2 <= len(done) < 99
    assert len(list(pictures.iterdir())) == len(done)
    assert f"{len(done)} images done, 0 skipped" in capsys.readouterr().out


def test_images_of_one_id(predict, images, tmp_path, capsys):
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes((images / "1.png").read_bytes())
    predict(tmp_path, "--output", tmp_path / "out")
    assert "2 images done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unique id .* both have the id 'a'"):
        predict(tmp_path, "--json", tmp_path / "found.json")


@pytest.fixture
def named(weights, tmp_path):
    """The same with the name of its class; the process knows no data set of that name."""
    names = {"keypoint_names": ["left_end", "right_end"]}
    metadata = {"thing_classes": ["bar"], "category_ids": [999], **names}
    torch.save({**torch.load(weights), "metadata": metadata}, tmp_path / "named.pth")
    return tmp_path / "named.pth"


@pytest.mark.parametrize(
    ("checkpoint", "annotations", "name", "found"),
    [
        ("weights", None, "000000000139.png", (139, 1)),
        ("weights", None, "cat.png", ("cat", 1)),
        ("named", None, "1.png", (1, 999)),
        ("named", "custom_data", "1.png", (1, 999)),  # there, the category is 3
    ],
)
def test_ids(checkpoint, annotations, name, found, predict, images, tmp_path, request):
    image, results = tmp_path / name, tmp_path / "found.json"
    image.write_bytes((images / "1.png").read_bytes())
    options = "--json", results, "DATASETS.TEST", "('custom_test',)"
    annotations = annotations and request.getfixturevalue(annotations)
    weights = request.getfixturevalue(checkpoint)
    predict(image, *options, weights=weights, annotations=annotations)
    assert {(a["image_id"], a["category_id"]) for a in read(results)} == {found}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rod"], "rods.json do not .*'rod' there, 'bar' in the model"),
        (["bar", "rod"], "rods.json has 2 classes, but the model has 1"),
    ],
)
def test_annotations_of_other_classes(names, message, predict, images, named, tmp_path):
    content = read(images.parent / "bars.json")
    (category,) = content["categories"]
    content["categories"] = [{**category, "id": 3 + i, "name": n} for i, n in enumerate(names)]
    rods = tmp_path / "rods.json"
    rods.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        predict(images, "--json", tmp_path / "found.json", weights=named, annotations=rods)
    if len(names) == 1:  # nothing is known with the weights
        predict(images, "--json", tmp_path / "found.json", annotations=rods)


def test_video(predict, images, tmp_path):
    frames = [cv2.imread(str(images / f"{i}.png")) for i in (1, 2, 3)]
    for frame in frames:
        frame[:, :, 0] = 250  # blue
    clip, video = write_video(tmp_path / "clip.avi", frames), tmp_path / "out.mp4"
    predict(clip, "--output", video, "--json", tmp_path / "found.json")
    assert {a["image_id"] for a in read(tmp_path / "found.json")} == {0, 1, 2}

    drawn = cv2.VideoCapture(str(video))
    assert drawn.get(cv2.CAP_PROP_FPS) == 5.0
    for frame in frames:
        there, picture = drawn.read()
        assert there
        assert 0.01 < touched(picture, frame, tolerance=60) < 0.9  # the codec changes all a little
    assert not drawn.read()[0]


def test_mistakes(predict, images, weights, custom_data, tmp_path, monkeypatch):
    def refuse(message, source=images, *options, output=tmp_path / "out", **kwargs):
        with pytest.raises(SystemExit, match=message):
            predict(source, "--output", output, *options, **kwargs)

    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    checkpoint = torch.load(weights, weights_only=True)
    next(value for name, value in checkpoint["model"].items() if "roi_heads" in name)[0] = math.nan
    not_finite = tmp_path / "bad.pth"
    torch.save(checkpoint, not_finite)
    refuse("lost.png", images / "lost.png")
    refuse("contains no image", empty)
    refuse("--input must be an image .* a video .*text.mp4", text)
    refuse("lost.pth not found", weights=tmp_path / "lost.pth")
    refuse("text.mp4: it is damaged, or another kind of file", weights=text)
    refuse("bad.pth: the weights are not finite: roi_heads", weights=not_finite)
    refuse("lost.yaml is neither a file nor in", config=tmp_path / "lost.yaml")
    refuse("would overwrite the input", output=images)
    refuse("--output must be a folder .*out.mp4", output=tmp_path / "out.mp4")
    refuse("folder .*text.mp4 cannot be created: File exists", images, "--json", text / "x.json")
    refuse("cannot be written: Is a directory", images, "--json", empty)
    refuse("lost.json does not exist", annotations=tmp_path / "lost.json")
    stock = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    refuse("does not have: .*non_local0", images, *stock)
    monkeypatch.setitem(PREDICTORS, "GeneralizedRCNN", None)  # as projects do for their models
    refuse("META_ARCHITECTURE GeneralizedRCNN is not a detector")
    with pytest.raises(SystemExit, match="META_ARCHITECTURE GeneralizedRCNN is not a detector"):
        train.main(["--config-file", CONFIG])
    monkeypatch.setitem(PREDICTORS, "GeneralizedRCNN", Predictor)
    with pytest.raises(ValueError, match="only detectors can be fast, got GeneralizedRCNN"):
        build_predictor(load_config(CONFIG), str(weights), "fp32")
