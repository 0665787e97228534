"""The check of data as a command, and before a training."""

from __future__ import annotations

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from nl_detectron.engine.coco.findings import KINDS
from nl_detectron_cli import ab, check_data
from nl_detectron_cli import train as train_command
from tests.running import QUICK, custom_data_arguments, launched, words

MASKS = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"


@pytest.fixture
def json_file(custom_data, tmp_path):
    """A copy with two errors and two warnings."""
    shutil.copytree(custom_data.parent / "images", tmp_path / "images")
    content = json.loads(custom_data.read_text())
    content["annotations"][0]["bbox"] = [0, 0, float("nan"), 2]
    content["annotations"][1]["image_id"] = 9
    content["annotations"][2]["bbox"][2] = 0
    file = tmp_path / "bars.json"
    file.write_text(json.dumps(content))
    (tmp_path / "images" / "4.png").write_bytes(b"")
    return file


def test_report(json_file, capsys):
    with pytest.raises(SystemExit, match="^2 errors$"):
        check_data.main(words(*custom_data_arguments(json_file, "train")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [str(json_file), "  4 images, 4 annotations", "  4 image files checked"]
    assert [line.split(" (1): ")[0] for line in lines[3:11:2]] == [
        *("  error box", "  error image-empty", "  warning unknown-image", "  warning box-empty")
    ]
    assert lines[4] == "    annotation 1 of image 1 (1.png): its bbox is [0, 0, nan, 2]"


def test_treat(json_file, capsys):
    arguments = [*custom_data_arguments(json_file, "test"), "--treat box=warning"]
    check_data.main(words(*arguments, "--treat image-empty=off --treat unknown-image=off"))
    output = capsys.readouterr().out
    assert "warning box (1)" in output
    assert "image-empty" not in output
    with pytest.raises(SystemExit, match="^--treat no-images=off: no-images is always an error"):
        check_data.main(words(*arguments, "--treat no-images=off"))


def test_what_a_model_needs(json_file, capsys):
    content = json.loads(json_file.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    json_file.write_text(json.dumps(content))
    for config, number in (([], 2), (["--config-file", MASKS], 6)):
        with pytest.raises(SystemExit, match=f"^{number} errors$"):
            check_data.main(words(*config, *custom_data_arguments(json_file, "train")))


def test_kinds(capsys):
    check_data.main(["--kinds"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(KINDS)


@pytest.mark.parametrize("arguments", ["", "--train-json a.json", "--test-json a --test-images b"])
def test_arguments(arguments):
    with pytest.raises(SystemExit):
        check_data.main([*arguments.split()])


class TestBeforeTraining:
    @pytest.fixture
    def start(self, tmp_path):
        """Start to train, and stop before the first iteration."""

        def start(json_file, *arguments, command=train_command, splits=("train",)):
            started = []
            data = custom_data_arguments(json_file, *splits)
            options = [*arguments, "OUTPUT_DIR", tmp_path / "out"]
            launched(command, started.append, "--config-file", MASKS, *data, *options)
            assert started

        return start

    @pytest.mark.parametrize("command", [train_command, ab])
    def test_errors_end_it(self, command, json_file, start):
        sentence = (
            r"bars.json: box \(1\): annotation 1 of image 1 \(1.png\): its bbox is \[0, 0, nan, 2\]"
            r"; image-empty \(1\): .*; `nl-detectron check-data` lists .* --treat box=warning acc"
        )
        with pytest.raises(SystemExit, match=sentence):
            start(json_file, command=command)

    def test_registered_data(self, json_file, start):
        """A data set that detectron2 knows by its name, as it knows COCO."""
        register_coco_instances("mine", {}, str(json_file), str(json_file.parent / "images"))
        try:
            MetadataCatalog.get("mine").thing_classes = ["thing"] * 80
            options = "DATASETS.TRAIN ('mine',) DATASETS.TEST ()"
            with pytest.raises(SystemExit, match=r"box \(1\).*; image-empty \(1\)"):
                start(json_file, options, splits=())
        finally:
            DatasetCatalog.remove("mine")
            MetadataCatalog.remove("mine")

    def test_accepted(self, json_file, start, caplog):
        start(json_file, "--treat box=warning --treat image-empty=off")
        assert "box (1): annotation 1 of image 1" in caplog.text
        assert "image-empty" not in caplog.text

    @pytest.mark.parametrize(("share", "ends"), [(0.3, False), (0.2, True)])
    def test_images_to_skip(self, share, ends, json_file, start):
        """One of four images is empty."""
        options = f"--treat box=off --bad-images skip --max-bad-images {share}"
        if ends:
            with pytest.raises(SystemExit, match="image-empty"):
                start(json_file, options)
        else:
            start(json_file, options)

    def test_images_to_test_on_are_not_skipped(self, json_file, custom_data, start):
        data = list(custom_data_arguments(json_file, "test"))
        with pytest.raises(SystemExit, match="bars.json: image-empty"):
            start(custom_data, *data, "--treat box=off --bad-images skip --max-bad-images 1")
