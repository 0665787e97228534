"""Which data sets a run uses, and which it refuses, before anything starts."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from nl_detectron.engine.coco.data_sets import data_set_notes
from nl_detectron.engine.coco.trainer import read_config
from nl_detectron_cli import train as train_command
from tests.running import QUICK

MASKS = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
KEYPOINTS = QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml"
SIGMAS = "TEST.KEYPOINT_OKS_SIGMAS (0.1,0.1)"
FLIP = "INPUT.RANDOM_FLIP horizontal"


@pytest.fixture
def write(custom_data, tmp_path):
    """Write ``custom_data`` with other names, or without what its annotations need."""

    def write(split, names="bar", keypoints=None, without=None):
        data = json.loads(custom_data.read_text())
        category = data["categories"][0]
        category["keypoints"] = keypoints or category["keypoints"]
        named = enumerate(names.split(), start=category["id"])
        data["categories"] = [{**category, "id": i, "name": name} for i, name in named]
        for annotation in data["annotations"]:
            annotation.pop(without, None)
        file = tmp_path / f"{split}.json"
        file.write_text(json.dumps(data))
        return file

    return write


@pytest.fixture
def read(write, custom_data, tmp_path):
    """Read the config of a run on data with these class names, or as ``write`` takes them."""

    def read(flags="", train=None, test=None, options="", config=MASKS, images=None):
        words = ["--config-file", config, *flags.split()]
        for split, content in (("train", train), ("test", test)):
            if content:
                content = content if isinstance(content, dict) else {"names": content}
                words += [f"--{split}-json", write(split, **content)]
                words += [f"--{split}-images", images or custom_data.parent / "images"]
        words += [*options.split(), "OUTPUT_DIR", tmp_path / "out"]
        return read_config(train_command.parse_args([str(word) for word in words]))

    return read


@pytest.fixture
def coco(monkeypatch, custom_data):
    """Let detectron2's COCO 2017 seem to be there."""
    for name in ("coco_2017_train", "coco_2017_val"):
        monkeypatch.setitem(vars(MetadataCatalog.get(name)), "json_file", str(custom_data))


class TestTraining:
    def test_numbers_are_those_of_the_training_data(self, read):
        cfg = read(train="cat dog", test="cat dog")
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("custom_train",), ("custom_test",))
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2
        cfg = read(train="bar", test="bar", options=SIGMAS, config=KEYPOINTS)
        assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 2

    def test_nothing_to_test_on(self, read):
        cfg = read(train="cat dog cow", config=KEYPOINTS)  # nor is a sigma needed
        assert cfg.DATASETS.TEST == ()  # not the config's coco_2017_val
        assert "No evaluation" in data_set_notes(cfg)[0]

    @pytest.mark.usefixtures("coco")
    @pytest.mark.parametrize(
        ("train", "test", "config", "options", "message"),
        [
            (
                "cat dog",
                "cat",
                MASKS,
                "",
                "--test-json .* 1 classes, .* 2, which is trained on --train",
            ),
            ("cat dog", "dog cat", MASKS, "", "of --test-json .* 1 is 'dog' there, 'cat' in"),
            (None, "bar", MASKS, "", "--test-json .*has 1 classes, but the model has 80"),
            (
                *("cat dog cow", None, MASKS, "DATASETS.TEST ('coco_2017_val',)"),
                "coco_2017_val .*TEST has 80 classes, .* model has 3",
            ),
            (
                *("bar", {"keypoints": ["left_end", "middle"]}, KEYPOINTS, SIGMAS),
                "keypoints of --test-json .* number 2 is 'middle'",
            ),
            ("bar", "bar", KEYPOINTS, "", "SIGMAS has 17 values, but the model has 2 keypoints"),
            (None, None, MASKS, "DATASETS.TRAIN ()", "TRAIN is empty: give --train-json"),
        ],
    )
    def test_refused(self, train, test, config, options, message, read):
        with pytest.raises(ValueError, match=message):
            read(train=train, test=test, config=config, options=options)
        if "keypoints" in message:  # no matter to a model without
            read(train=train, test=test)

    def test_files(self, read, write):
        with pytest.raises(ValueError, match="--train-json and --train-images must be given"):
            read(f"--train-json {write('train')}")


@pytest.mark.parametrize(
    ("names", "options", "config", "flip", "sentence"),
    [
        ("LEnd REnd", FLIP, KEYPOINTS, "horizontal", "when an image is flipped: LEnd and REnd."),
        ("nose tail", FLIP, KEYPOINTS, "horizontal", "when an image is flipped: none."),
        ("left_eye tail", FLIP, KEYPOINTS, "none", "(INPUT.RANDOM_FLIP none).*: left_eye."),
        ("left_eye tail", "INPUT.RANDOM_FLIP vertical", KEYPOINTS, "vertical", ""),
        ("left_eye tail", FLIP, MASKS, "horizontal", ""),
    ],
)
def test_flipping(names, options, config, flip, sentence, read):
    cfg = read(train={"keypoints": names.split()}, options=options, config=config)
    assert cfg.INPUT.RANDOM_FLIP == flip
    start, _, end = sentence.rpartition(".*")
    assert start in data_set_notes(cfg)[-1]
    assert data_set_notes(cfg)[-1].endswith(end)


class TestTrainedModel:
    """Its names are in the checkpoint."""

    @pytest.fixture
    def weights(self, tmp_path):
        (tmp_path / "out").mkdir()

        def weights(**metadata):
            path = tmp_path / "out" / "model_final.pth"
            torch.save({"model": {}, "metadata": metadata, "iteration": 1}, path)
            return f"MODEL.WEIGHTS {path} "

        return weights

    def test_evaluated_on_its_classes(self, weights, read):
        options = weights(thing_classes=["cat", "dog"])
        cfg = read("--eval-only", test="cat dog", options=options)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
        assert cfg.DATASETS.TEST == ("custom_test",)

    def test_sigmas(self, weights, read):
        names = ["left_end", "right_end"]
        given = weights(keypoint_names=names, keypoint_oks_sigmas=[0.25, 0.5])
        for options, sigmas in ((given, [0.25, 0.5]), (given + SIGMAS, [0.1, 0.1])):
            cfg = read("--eval-only", test="bar", options=options, config=KEYPOINTS)
            assert list(cfg.TEST.KEYPOINT_OKS_SIGMAS) == sigmas

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"thing_classes": ["dog", "cat"]}, "number 1 is 'cat' there, 'dog' in the model"),
            ({"keypoint_names": ["right_end", "left_end"]}, "points of .* 1 is 'left_end' there"),
        ],
    )
    @pytest.mark.parametrize("flags", ["--eval-only", "--resume"])
    def test_other_names(self, metadata, message, flags, weights, read):
        options, train = weights(**metadata) + SIGMAS, "cat dog" if flags == "--resume" else None
        with pytest.raises(ValueError, match=message):
            read(flags, train=train, test="cat dog", options=options, config=KEYPOINTS)
        read(train="cat dog", test="cat dog", options=options, config=KEYPOINTS)  # another training

    @pytest.mark.usefixtures("coco")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("MODEL.WEIGHTS ''", "--eval-only needs weights, but MODEL.WEIGHTS is empty"),
            ("DATASETS.TEST ()", "DATASETS.TEST is empty: give --test-json"),
            ("", "coco_2017_val in .* has 80 classes, .* model has 2"),
        ],
    )
    def test_nothing_to_evaluate(self, options, message, weights, read):
        given = weights(thing_classes=["cat", "dog"])
        with pytest.raises(ValueError, match=message):
            read("--eval-only", options=given + options)

    def test_training_data_do_not_matter(self, weights, read):
        """The config.yaml of a training names custom_train, which a new process does not know."""
        options = f"{weights()} {SIGMAS} DATASETS.TRAIN ('custom_train',)"
        cfg = read("--eval-only", test="cat", options=options, config=KEYPOINTS)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
        assert data_set_notes(cfg) == []


class TestRegistered:
    """Data sets that someone's code has registered."""

    MINE = "DATASETS.TRAIN ('mine',) DATASETS.TEST ()"

    @pytest.fixture
    def register(self):
        def register(**metadata):
            DatasetCatalog.register("mine", list)
            MetadataCatalog.get("mine").set(**metadata)

        yield register
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")

    @pytest.mark.parametrize("metadata", [{}, {"evaluator_type": "lvis"}])
    def test_of_another_type(self, metadata, register, read):
        register(thing_classes=["bar"], **metadata)
        given = metadata.get("evaluator_type")
        with pytest.raises(ValueError, match=f"type of 'mine' must be 'coco', got {given!r}"):
            read(train="bar", options="DATASETS.TEST ('mine',)")

    def test_to_train_on(self, register, read):
        """detectron2 needs no evaluator_type there."""
        register(thing_classes=["thing"] * 80)
        assert read(options=self.MINE).DATASETS.TRAIN == ("mine",)

    def test_names_are_not_known_yet(self, register, custom_data, read):
        """detectron2 learns them when it loads."""
        register_coco_instances("mine", {}, str(custom_data), "images")
        read(options="DATASETS.TRAIN ('mine',) DATASETS.TEST ('mine',)")

    def test_keypoints(self, register, read):
        register(thing_classes=["person"])
        with pytest.raises(ValueError, match="KEYPOINT_ON is True, but mine in DATASETS.TRAIN"):
            read(options=self.MINE, config=KEYPOINTS)
