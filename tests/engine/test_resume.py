"""A training that was killed and resumed is the training that was not killed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import PreciseBN
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from PIL import Image

from nl_detectron.config import load_config
from nl_detectron.engine.coco.trainer import CocoTrainer
from nl_detectron.engine.history import History, drop_later_lines
from nl_detectron.engine.options import RunOptions
from nl_detectron_cli import train
from tests.generated_coco import write_coco
from tests.running import (
    QUICK,
    ROOT,
    TINY,
    custom_data_arguments,
    forget_custom_data,
    metrics,
    run,
    words,
)

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
OPTIONS = """
    SOLVER.MAX_ITER 10 SOLVER.CHECKPOINT_PERIOD 5 SOLVER.STEPS (6,) SOLVER.WARMUP_ITERS 3
    INPUT.MIN_SIZE_TRAIN (48,56,64) INPUT.RANDOM_FLIP horizontal
    MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 32
    MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32
    MODEL.RESNETS.NORM BN TEST.PRECISE_BN.ENABLED True TEST.PRECISE_BN.NUM_ITER 2 TEST.EVAL_PERIOD 4
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Wide and tall images."""
    folder = tmp_path_factory.mktemp("images")
    category = [{"id": 1, "name": "square"}]
    json_file = write_coco(folder / "images", "a.json", num_images=9, categories=category)
    content = json.loads(json_file.read_text())
    for image, annotation in zip(content["images"], content["annotations"]):
        if image["id"] % 2:
            path = folder / "images" / image["file_name"]
            Image.open(path).transpose(Image.Transpose.TRANSPOSE).save(path)
            image["width"], image["height"] = image["height"], image["width"]
            x, y, width, height = annotation["bbox"]
            annotation["bbox"] = y, x, height, width
            corners = annotation["segmentation"][0]
            corners[::2], corners[1::2] = corners[1::2], corners[::2]
    json_file.write_text(json.dumps(content))
    return json_file


def train_recorded(file, *arguments, kill_in=None):
    """Train, and write to a file what the model sees; SIGKILL in the middle of an iteration."""
    stock, seen = GeneralizedRCNN.preprocess_image, []

    def preprocess_image(model, batch):
        seen.append([[os.path.basename(x["file_name"]), float(x["image"].sum())] for x in batch])
        with open(file, "w") as stream:
            json.dump(seen, stream)
        if len(seen) == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(model, batch)

    GeneralizedRCNN.preprocess_image = preprocess_image
    try:
        train.main(words(*arguments))
    finally:
        GeneralizedRCNN.preprocess_image = stock
        forget_custom_data()
    return seen


def test_killed_and_resumed(images, tmp_path):
    """Bit for bit, with 0 and with 2 workers, and the one like the other."""

    def arguments(name, workers, *flags):
        data = custom_data_arguments(images, "train")
        options = f"OUTPUT_DIR {tmp_path / name} DATALOADER.NUM_WORKERS {workers}"
        return words("--config-file", CONFIG, *data, *flags, *TINY, OPTIONS, options)

    whole = train_recorded(tmp_path / "seen", *arguments("whole", 0))
    assert len(whole) == 10 + 3 * 2  # those of precise batch norm
    shapes = {name: int(name.split(".")[0]) % 2 for batch in whole for name, _ in batch}
    assert set(shapes.values()) == {0, 1}
    assert all(shapes[first[0]] == shapes[second[0]] for first, second in whole)

    code = "import sys; from tests.engine.test_resume import train_recorded as f; f(*sys.argv[1:], "
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code + "kill_in=10)", tmp_path / "killed_seen"]
    done = subprocess.run([*command, *arguments("killed", 2)], env=env, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "killed_seen").read_text()) == whole[:10]
    shutil.copytree(tmp_path / "killed", tmp_path / "killed_0")
    shutil.move(tmp_path / "killed", tmp_path / "killed_2")

    expected = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    for workers in (0, 2):
        name = f"killed_{workers}"
        resumed = train_recorded(tmp_path / "seen", *arguments(name, workers, "--resume"))
        assert resumed == whole[7:]  # iteration 5 on
        found = torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        assert_same(found["model"], expected["model"])
        for state in (found, expected):
            for name in ("time", "data_time", "rank_data_time", "eta_seconds"):
                state["trainer"]["hooks"]["History"].pop(name, None)
        assert_same(found["trainer"], expected["trainer"])
    losses = expected["trainer"]["hooks"]["History"]["total_loss"]
    assert losses["iteration"].tolist() == list(range(10))


def test_retinanet_resumed(images, tmp_path):
    """The mean by which it divides its losses is kept, too."""

    def arguments(name, *flags):
        config = QUICK / "retinanet_R_50_NL_FPN_instant_test.yaml"
        data = custom_data_arguments(images, "train")
        options = f"SOLVER.MAX_ITER 4 SOLVER.CHECKPOINT_PERIOD 2 OUTPUT_DIR {tmp_path / name}"
        return words("--config-file", config, *data, *flags, *TINY, options)

    train.main(arguments("whole"))
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000001.pth", tmp_path / "resumed")
    forget_custom_data()
    train.main(arguments("resumed", "--resume"))
    models = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("resumed", "whole")
    ]
    assert_same(*models)


def assert_same(found, expected, path=""):
    """Equal, bit for bit, in every part."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for name, value in expected.items():
            assert_same(found[name], value, f"{path}/{name}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def test_loaders_go_by_the_seed_of_the_run(custom_data_name, tmp_path):
    """Which was drawn, and is in the checkpoint."""
    cfg = load_config(CONFIG, words(*TINY, OPTIONS, "SEED -1 OUTPUT_DIR", tmp_path))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (custom_data_name,), ()
    trainer = CocoTrainer(cfg, RunOptions(max_bad_images=0.3))
    trainer.load_state_dict({**trainer.state_dict(), "seed": 11})
    trainer.storage = EventStorage()
    trainer.before_train()
    (statistics,) = (hook for hook in trainer._hooks if isinstance(hook, PreciseBN))
    cfg.SEED = 11
    expected = names(CocoTrainer.build_train_loader(cfg))
    for loader in (trainer.data_loader, statistics._data_loader):
        assert names(loader) == expected
        assert loader.max_unreadable == 0.3


def names(loader):
    return [[x["file_name"] for x in batch] for batch in itertools.islice(loader, 9)]


def test_history_ends_where_the_training_goes_on():
    """Iteration 2 failed, so the state of iteration 1 was saved."""
    first, second = TrainerBase(), TrainerBase()
    for trainer in (first, second):
        trainer.storage = EventStorage()
        trainer.register_hooks([History()])
    for first.storage.iter, loss in enumerate((0.1, float("nan"), 3.0)):
        first.storage.put_scalar("loss", loss)
    first.iter = 1
    second.load_state_dict(first.state_dict())
    second.before_train()
    (value, iteration), (not_a_number, _) = second.storage.history("loss").values()
    assert (value, iteration) == (0.1, 0)
    assert not_a_number != not_a_number
    assert second.storage.latest() == {}  # writers have written these


def test_metrics_of_later_iterations_are_dropped(tmp_path):
    file = tmp_path / "metrics.json"
    lines = [json.dumps({"iteration": i, "total_loss": 1.0}) + "\n" for i in (19, 39, 30, 59, 40)]
    with file.open("a") as writer:  # as detectron2's has it open
        writer.write("".join(lines) + '{"iteration": 39, "tot')
        writer.flush()
        drop_later_lines(file, 40)
        assert file.read_text() == "".join(lines[:3])
        writer.write(lines[4])
        writer.flush()
        assert file.read_text() == "".join([*lines[:3], lines[4]])
    file.write_text("".join(lines) + lines[0].strip())  # killed between text and end of line
    drop_later_lines(file, 60)
    assert file.read_text() == "".join(lines)
    drop_later_lines(tmp_path / "none.json", 0)
    assert not (tmp_path / "none.json").exists()


def killed_when(exists, *command):
    """Run a command, and kill it and all its children when a file exists."""
    env = {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], env=os.environ | env, cwd=ROOT, start_new_session=True
    )
    while not exists.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_two_processes_killed_and_resumed(images, tmp_path):
    def command(name):
        data = custom_data_arguments(images, "train")
        options = f"--num-processes 2 --dist-url auto --config-file {CONFIG}"
        output = f"DATALOADER.NUM_WORKERS 1 OUTPUT_DIR {tmp_path / name}"
        return words("tools/train_net.py", options, *data, "--resume", *TINY, OPTIONS, output)

    run(*command("whole"))
    killed_when(tmp_path / "killed" / "model_0000004.pth", *command("killed"))
    assert not (tmp_path / "killed" / "model_final.pth").exists()
    done = run(*command("killed"))
    assert "Starting training from iteration 5" in done.stdout + done.stderr
    whole, killed = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("whole", "killed")
    )
    assert_same(killed["model"], whole["model"])
    assert_same(killed["trainer"]["_trainer"], whole["trainer"]["_trainer"])


@pytest.mark.slow
def test_comparison_killed_and_resumed(images, tmp_path):
    """In the second training: the first is not repeated."""

    def command(name):
        data = custom_data_arguments(images, "train", "test")
        options = words(*TINY, OPTIONS, "TEST.EVAL_PERIOD 0 OUTPUT_DIR", tmp_path / name)
        return words("tools/ab.py --config-file", CONFIG, *data, "--resume", *options)

    run(*command("whole"))
    final = tmp_path / "killed" / "stock" / "model_final.pth"
    killed_when(tmp_path / "killed" / "non_local" / "model_0000004.pth", *command("killed"))
    written = final.stat().st_mtime_ns
    done = run(*command("killed"))
    assert "Starting training from iteration 10" in done.stdout + done.stderr
    assert "Starting training from iteration 5" in done.stdout + done.stderr
    assert final.stat().st_mtime_ns == written
    reports = [
        json.loads((tmp_path / name / "ab.json").read_text()) for name in ("whole", "killed")
    ]
    assert reports[0] == reports[1]
    assert len(reports[0]["losses"]["stock"]["total_loss"]) == 10
    for name in ("stock", "non_local"):
        iterations = [line["iteration"] for line in metrics(tmp_path / "killed" / name)]
        assert len(iterations) == len(set(iterations))
