"""detectron2's own scripts, with nothing but the hook."""

from __future__ import annotations

import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, COCO_PERSON_KEYPOINT_NAMES

from tests.generated_coco import write_coco
from tests.running import QUICK, TINY, metrics, run

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Generated pictures under the names and categories of COCO 2017: a DETECTRON2_DATASETS."""
    root = tmp_path_factory.mktemp("datasets")
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    person = [{**things[0], "keypoints": COCO_PERSON_KEYPOINT_NAMES, "skeleton": []}]
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        images = root / "coco" / split
        for kind, categories in (("instances", things), ("person_keypoints", person)):
            keypoints = 17 * (kind == "person_keypoints")
            name = f"annotations/{kind}_{split}.json"
            write_coco(images, name, num_images=2, categories=categories, keypoints=keypoints)
    return root


@pytest.fixture
def train(coco, tmp_path):
    def train(script, config, flags="", options=""):
        options = "MODEL.DEVICE cpu OUTPUT_DIR", tmp_path, *TINY, options
        done = run("-m", script, "--config-file", config, flags, *options, hook=True, datasets=coco)
        return done.stdout + done.stderr

    return train


def test_train_net_trains_resumes_and_evaluates(train, tmp_path):
    train("tools.train_net", CONFIG)
    assert {"bbox/AP", "segm/AP"} <= set(metrics(tmp_path)[-1])
    output = train("tools.train_net", CONFIG, "--resume", "SOLVER.MAX_ITER 3")
    assert "Starting training from iteration 2" in output
    assert (tmp_path / "model_final.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_net", "plain_train_net"])
def test_keypoints(script, train):
    config = QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml"
    assert "keypoints" in train(f"tools.{script}", config)


@pytest.mark.slow
def test_lazyconfig_train_net(coco, tmp_path):
    config = QUICK / "mask_rcnn_R_50_NL_FPN_instant_test.py"
    options = f"train.device=cpu train.output_dir={tmp_path} train.max_iter=2"
    command = "-m tools.lazyconfig_train_net --config-file", config, options
    run(*command, hook=True, datasets=coco)
    assert {"bbox/AP", "segm/AP"} <= set(metrics(tmp_path)[-1])


@pytest.mark.slow
def test_analyze_model():
    command = "-m tools.analyze_model --tasks parameter structure --config-file"
    done = run(command, CONFIG, "MODEL.DEVICE cpu", hook=True)
    assert "(non_local0): NonLocalBlock(" in done.stdout + done.stderr
