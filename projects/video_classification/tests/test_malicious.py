"""The scripts, given files that run code and links that lead elsewhere: they refuse them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from video_classification.data import write_video

from tests.malicious import write_code_configs, write_code_weights
from tests.running import words

PROJECT = Path(__file__).parents[1]
TRAINING = "--config-file {config} --train-data {data} MODEL.WEIGHTS {weights} OUTPUT_DIR {out}"
SCRIPTS = {
    "train_net": TRAINING,
    "ab": TRAINING,
    "predict_video": "--config-file {config} --weights {weights} --input {data}/a --output {out} "
    "--json {out}/x.json",
    "inflate_weights": "--config-file {config} --input {weights} --output {out}/x.pth "
    "--from detectron2",
}


@pytest.fixture
def refused(video_cfg, tmp_path):
    """Runs a script, which must end with an error; returns the message."""
    video_cfg.SOLVER.IMS_PER_BATCH = 2
    (tmp_path / "config.yaml").write_text(video_cfg.dump())
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        write_video(tmp_path / "data" / name / "x.mp4", np.zeros((9, 48, 64, 3), np.uint8), 10)

    def run(script, config="config.yaml", weights="lost.pth"):
        spec = importlib.util.spec_from_file_location(script, PROJECT / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = {"config": config, "weights": weights, "data": "data", "out": "out"}
        files = {key: tmp_path / name for key, name in names.items()}
        with pytest.raises(SystemExit) as exit:
            module.main(words(SCRIPTS[script].format(**files)))
        assert isinstance(exit.value.code, str), exit.value.code
        assert len(exit.value.code.splitlines()) == 1
        assert not (tmp_path / "trace").exists()
        return exit.value.code

    yield run
    for name in {"custom_train", "custom_test"} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_configs(script, refused, tmp_path):
    for file in write_code_configs(tmp_path, tmp_path / "trace").values():
        assert "could run code" in refused(script, config=file)
    (tmp_path / "remote.yaml").write_text("_BASE_: http://127.0.0.1:9/x.yaml\n")
    assert "--allow-remote" in refused(script, config="remote.yaml")


@pytest.mark.parametrize(
    ("script", "kind"),
    [*zip(SCRIPTS, ("detectron2.pkl", "model.pth", "caffe2.pkl", "pycls.pyth"))],
)
def test_weights(script, kind, refused, tmp_path):
    file = write_code_weights(tmp_path, tmp_path / "trace")[kind]
    assert f"{kind}: it contains posix.mkdir" in refused(script, weights=file)


@pytest.mark.parametrize(
    ("script", "name"),
    [("train_net", "log.txt"), ("ab", "stock"), ("predict_video", "x.png")]
    + [("predict_video", "x.json")],
)
def test_links(script, name, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").mkdir()
    target = tmp_path / "mine" if name == "stock" else tmp_path / "mine" / "file"
    (tmp_path / "out" / name).symlink_to(target)
    assert f"{name} is a symbolic link" in refused(script)
    assert not list((tmp_path / "mine").iterdir())
