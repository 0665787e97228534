"""Which data sets a run uses, and which it refuses, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from nl_detectron.engine.coco.data_sets import data_set_notes
from nl_detectron.engine.coco.trainer import read_config
from nl_detectron_cli import train
from tests.running import QUICK

MASKS = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
KEYPOINTS = QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml"
SIGMAS = ["TEST.KEYPOINT_OKS_SIGMAS", "(0.1,0.1)"]


@pytest.fixture
def changed(custom_data, tmp_path):
    """Write ``custom_data`` with other categories, and return its arguments."""

    def changed(split, *categories, keypoints=None, without=()):
        data = json.loads(custom_data.read_text())
        if keypoints:
            data["categories"][0]["keypoints"] = keypoints
        if categories:
            data["categories"] = [
                {**data["categories"][0], "id": i, "name": name}
                for i, name in enumerate(categories, start=3)
            ]
        for annotation in data["annotations"]:
            for key in without:
                del annotation[key]
        file = tmp_path / f"{split}.json"
        file.write_text(json.dumps(data))
        return [f"--{split}-json", file, f"--{split}-images", custom_data.parent / "images"]

    return changed


@pytest.fixture
def read(tmp_path):
    def read(*arguments, config=MASKS):
        words = ["--config-file", config, *arguments, "OUTPUT_DIR", tmp_path / "out"]
        args = train.parse_args([str(word) for word in words])
        return read_config(args)

    return read


@pytest.fixture
def coco(monkeypatch, custom_data):
    """Let detectron2's COCO 2017 seem to be there."""
    for name in ("coco_2017_train", "coco_2017_val"):
        monkeypatch.setattr(
            MetadataCatalog.get(name), "__dict__", dict(vars(MetadataCatalog.get(name)))
        )
        vars(MetadataCatalog.get(name))["json_file"] = str(custom_data)


class TestTraining:
    def test_numbers_are_those_of_the_training_data(self, changed, read):
        cfg = read(*changed("train", "cat", "dog"), *changed("test", "cat", "dog"), *SIGMAS)
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("custom_train",), ("custom_test",))
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2

    def test_numbers_of_keypoints(self, changed, read):
        data = [*changed("train"), *changed("test")]
        assert read(*data, *SIGMAS, config=KEYPOINTS).MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 2
        with pytest.raises(ValueError, match="SIGMAS has 17 values, but the model has 2 keypoints"):
            read(*data, config=KEYPOINTS)
        read(*data[:4], config=KEYPOINTS)  # they are for evaluation alone

    @pytest.mark.parametrize(
        ("test", "message"),
        [
            (["cat"], "--test-json .*test.json has 1 classes, but the model has 2"),
            (["dog", "cat"], "classes of --test-json .* number 1 is 'dog' there, 'cat' in"),
        ],
    )
    def test_other_classes_to_test_on(self, test, message, changed, read):
        with pytest.raises(ValueError, match=message):
            read(*changed("train", "cat", "dog"), *changed("test", *test))

    def test_other_keypoints_to_test_on(self, changed, read):
        data = [*changed("train"), *changed("test", keypoints=["left_end", "middle"])]
        with pytest.raises(ValueError, match="keypoints of --test-json .* number 2 is 'middle'"):
            read(*data, *SIGMAS, config=KEYPOINTS)
        read(*data)  # no matter to a model without

    def test_custom_test_data_for_coco(self, coco, changed, read):
        """Its 80 classes used to be overwritten by those of --test-json."""
        with pytest.raises(ValueError, match=r"--test-json .*has 1 classes, but the model has 80"):
            read(*changed("test", "bar"))

    def test_nothing_to_test_on(self, changed, read):
        cfg = read(*changed("train", "cat", "dog", "cow"))
        assert cfg.DATASETS.TEST == ()  # not the config's coco_2017_val
        assert "No evaluation" in data_set_notes(cfg)[0]

    def test_test_data_of_the_options(self, coco, changed, read):
        coco_2017_val = ["DATASETS.TEST", "('coco_2017_val',)"]
        with pytest.raises(ValueError, match="coco_2017_val .*TEST has 80 classes, .* model has 3"):
            read(*changed("train", "cat", "dog", "cow"), *coco_2017_val)

    @pytest.mark.parametrize(
        ("split", "config", "key"),
        [
            ("train", MASKS, "segmentation"),
            ("train", KEYPOINTS, "keypoints"),
            ("test", MASKS, "area"),
            ("test", MASKS, "iscrowd"),
            ("test", KEYPOINTS, "num_keypoints"),
        ],
    )
    def test_what_annotations_need(self, split, config, key, changed, read):
        """pycocotools stops with a KeyError, after the training."""
        data = {s: changed(s, without=[key] * (s == split)) for s in ("train", "test")}
        with pytest.raises(ValueError, match=f"{split}.json has no '{key}' in annotation number 1"):
            read(*data["train"], *data["test"], *SIGMAS, config=config)

    def test_other_folder(self, changed, read):
        data = changed("train")
        with pytest.raises(ValueError, match="lists the image 1.png, which is not in .*tests"):
            read(*data[:3], Path(__file__).parent)

    def test_half_of_it(self, changed, read):
        with pytest.raises(ValueError, match="--train-json and --train-images must be given"):
            read(*changed("train")[:2])

    def test_none(self, read):
        with pytest.raises(ValueError, match="DATASETS.TRAIN is empty: give --train-json"):
            read("DATASETS.TRAIN", "()")


class TestFlipping:
    FLIP = ["INPUT.RANDOM_FLIP", "horizontal"]

    @pytest.mark.parametrize(
        ("names", "swapped"), [(["LEnd", "REnd"], "LEnd and REnd"), (["nose", "tail"], "none")]
    )
    def test_sides(self, names, swapped, changed, read):
        cfg = read(*changed("train", keypoints=names), *self.FLIP, config=KEYPOINTS)
        assert cfg.INPUT.RANDOM_FLIP == "horizontal"
        sentence = f"Keypoints swapped when an image is flipped: {swapped}."
        assert data_set_notes(cfg)[-1] == sentence

    def test_one_side(self, changed, read):
        data = changed("train", keypoints=["left_eye", "tail"])
        cfg = read(*data, *self.FLIP, config=KEYPOINTS)
        assert cfg.INPUT.RANDOM_FLIP == "none"
        assert "not flipped (INPUT.RANDOM_FLIP none)" in data_set_notes(cfg)[-1]
        assert data_set_notes(cfg)[-1].endswith(": left_eye.")
        cfg = read(*data, "INPUT.RANDOM_FLIP", "vertical", config=KEYPOINTS)
        assert cfg.INPUT.RANDOM_FLIP == "vertical"

    def test_boxes_alone(self, changed, read):
        cfg = read(*changed("train", keypoints=["left_eye", "tail"]), *self.FLIP)
        assert cfg.INPUT.RANDOM_FLIP == "horizontal"


class TestTrainedModel:
    """Its names are in the checkpoint."""

    @pytest.fixture
    def weights(self, tmp_path):
        (tmp_path / "out").mkdir()

        def weights(**metadata):
            path = tmp_path / "out" / "model_final.pth"
            torch.save({"model": {}, "metadata": metadata}, path)
            path.with_name("last_checkpoint").write_text(path.name)
            return ["MODEL.WEIGHTS", path]

        return weights

    def test_evaluated_on_its_classes(self, weights, changed, read):
        weights = weights(thing_classes=["cat", "dog"])
        cfg = read("--eval-only", *changed("test", "cat", "dog"), *weights)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
        assert cfg.DATASETS.TEST == ("custom_test",)

    def test_sigmas(self, weights, changed, read):
        names = {"keypoint_names": ["left_end", "right_end"], "keypoint_oks_sigmas": [0.25, 0.5]}
        arguments = ["--eval-only", *changed("test"), *weights(**names)]
        assert read(*arguments, config=KEYPOINTS).TEST.KEYPOINT_OKS_SIGMAS == [0.25, 0.5]
        assert (
            list(read(*arguments, *SIGMAS, config=KEYPOINTS).TEST.KEYPOINT_OKS_SIGMAS) == [0.1] * 2
        )

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"thing_classes": ["dog", "cat"]}, "number 1 is 'cat' there, 'dog' in the model"),
            (
                {"keypoint_names": ["right_end", "left_end"]},
                "keypoints of .* 1 is 'left_end' there",
            ),
        ],
    )
    @pytest.mark.parametrize("resume", [False, True])
    def test_other_names(self, metadata, message, resume, weights, changed, read):
        weights = weights(**metadata)
        data = changed("test", "cat", "dog")
        arguments = ["--resume", *changed("train", "cat", "dog")] if resume else ["--eval-only"]
        with pytest.raises(ValueError, match=message):
            read(*arguments, *data, *weights, *SIGMAS, config=KEYPOINTS)

    def test_another_training_from_it(self, weights, changed, read):
        weights = weights(thing_classes=["dog", "cat"])
        read(*changed("train", "cat", "dog"), *weights)

    def test_coco_for_a_custom_model(self, coco, weights, read):
        with pytest.raises(ValueError, match="coco_2017_val in .* has 80 classes, .* model has 2"):
            read("--eval-only", *weights(thing_classes=["cat", "dog"]))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["MODEL.WEIGHTS", ""], "--eval-only needs weights, but MODEL.WEIGHTS is empty"),
            (["DATASETS.TEST", "()"], "DATASETS.TEST is empty: give --test-json"),
        ],
    )
    def test_nothing_to_evaluate(self, options, message, weights, read):
        with pytest.raises(ValueError, match=message):
            read("--eval-only", *weights(), *options)

    def test_training_data_do_not_matter(self, weights, changed, read):
        """The config.yaml of a training names custom_train, which a new process does not know."""
        options = [*weights(), *SIGMAS, "DATASETS.TRAIN", "('custom_train',)"]
        cfg = read("--eval-only", *changed("test", "cat"), *options, config=KEYPOINTS)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
        assert data_set_notes(cfg) == []


class TestRegistered:
    """Data sets that someone's code has registered."""

    @pytest.fixture
    def register(self, custom_data):
        def register(name, **metadata):
            DatasetCatalog.register(name, list)
            MetadataCatalog.get(name).set(**metadata)
            return name

        yield register
        if "mine" in DatasetCatalog.list():
            DatasetCatalog.remove("mine")
            MetadataCatalog.remove("mine")

    @pytest.mark.parametrize("metadata", [{}, {"evaluator_type": "lvis"}])
    def test_of_another_type(self, metadata, register, changed, read):
        register("mine", thing_classes=["bar"], **metadata)
        given = metadata.get("evaluator_type")
        with pytest.raises(
            ValueError, match=f"evaluator_type of 'mine' must be 'coco', got {given!r}"
        ):
            read(*changed("train"), "DATASETS.TEST", "('mine',)")

    def test_to_train_on(self, register, read):
        """detectron2 needs no evaluator_type there."""
        register("mine", thing_classes=["thing"] * 80)
        assert read("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()").DATASETS.TRAIN == (
            "mine",
        )

    def test_names_are_not_known_yet(self, register, custom_data, read):
        """detectron2 learns them when it loads."""
        register_coco_instances("mine", {}, str(custom_data), "images")
        read("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)")

    def test_keypoints(self, register, read):
        register("mine", thing_classes=["person"])
        with pytest.raises(ValueError, match="KEYPOINT_ON is True, but mine in DATASETS.TRAIN"):
            read("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()", config=KEYPOINTS)
