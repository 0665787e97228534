"""Training on generated videos: what is learned, resumed, evaluated and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import ab
import numpy as np
import pytest
import torch
import train_net
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.testing import assert_close
from video_classification.config import default_video_config
from video_classification.data import write_video
from video_classification.trainer import (
    VideoTrainer,
    read_config,
    warn_of_small_batches,
)

from nl_detectron.config import load_config
from nl_detectron.engine.ablation import score_table
from nl_detectron.engine.step import TrainingStep
from tests.running import ROOT, metrics, words

PROJECT = ROOT / "projects" / "video_classification"
CONFIG = PROJECT / "configs" / "Kinetics" / "c2d_R_50_32x2.yaml"
TINY = """
    MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16
    MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.VIDEO.NUM_BLOCKS (1,1) MODEL.VIDEO.POOLING space
    MODEL.RESNETS.OUT_FEATURES ['res3'] INPUT.CLIP.NUM_FRAMES 4 INPUT.CLIP.STRIDE 1
    INPUT.MIN_SIZE_TRAIN (32,40) INPUT.CROP.SIZE (32,32) INPUT.MIN_SIZE_TEST 32
    TEST.VIEWS.NUM_CLIPS 2 TEST.VIEWS.CROP_SIZE 32 TEST.VIEWS.BATCH_SIZE 4
    SOLVER.IMS_PER_BATCH 6 SOLVER.BASE_LR 0.05 SOLVER.MAX_ITER 12 SOLVER.STEPS ()
    SOLVER.CHECKPOINT_PERIOD 5 TEST.PRECISE_BN.NUM_ITER 3 DATALOADER.NUM_WORKERS 0 SEED 3
""".split()
COLORS = {"blue": (40, 60, 200), "green": (40, 190, 50), "red": (200, 60, 40)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three classes of colored noise; of the seven videos to test on, one is broken."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name, color in COLORS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                frames = np.clip(rng.normal(color, 60, (7, 32, 44, 3)), 0, 255).astype(np.uint8)
                write_video(folder / f"{i}.mp4", frames, 10, crf=0)
    (root / "test" / "red" / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(autouse=True)
def _custom_data_of_one_test():
    yield
    for name in {"custom_train", "custom_test"} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def arguments(*parts):
    return words("--config-file", CONFIG, *parts, *TINY)


def data(videos, *splits):
    return " ".join(f"--{split}-data {videos / split}" for split in splits)


KILLED = """
import os, signal, sys, train_net
from video_classification.trainer import VideoTrainer
step = VideoTrainer.run_step
def run_step(self):
    step(self)
    if self.iter == 7:
        os.kill(os.getpid(), signal.SIGKILL)
VideoTrainer.run_step = run_step
train_net.main(sys.argv[1:])
"""


def test_killed_and_resumed(videos, tmp_path):
    """Bit for bit as without the kill; and the score is what --eval-only finds."""
    flags = data(videos, "train", "test")
    options = "SOLVER.ACCUMULATE 2 TEST.MAX_UNREADABLE 0.2 TEST.EVAL_PERIOD 4"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_net.main(arguments(flags, "OUTPUT_DIR", whole) + options.split())
    path = os.pathsep.join([str(ROOT), str(PROJECT)])
    command = [sys.executable, "-c", KILLED, *arguments(flags, "OUTPUT_DIR", killed)]
    env = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command + options.split(), env=os.environ | env)
    assert done.returncode == -signal.SIGKILL
    assert (killed / "last_checkpoint").read_text() == "model_0000004.pth"
    train_net.main(arguments(flags, "--resume OUTPUT_DIR", killed) + options.split())
    assert "Starting training from iteration 5" in (killed / "log.txt").read_text()

    final = [torch.load(run / "model_final.pth", weights_only=False) for run in (whole, killed)]
    assert final[0]["metadata"] == final[1]["metadata"] == {"classes": ["blue", "green", "red"]}
    assert final[0]["model"].keys() == final[1]["model"].keys()
    for name, tensor in final[0]["model"].items():
        assert torch.equal(tensor, final[1]["model"][name]), name

    results = [result(run) for run in (whole, killed)]
    assert results[0] == results[1]
    assert results[0]["metrics"]["top1"] == 100  # three colors
    assert metrics(whole)[-1]["video/top1"] == 100
    assert results[0]["videos"] == {"total": 7, "scored": 6}
    assert results[0]["unreadable"][0]["file_name"].endswith("red/broken.mp4")

    again = tmp_path / "again"
    again = tmp_path / "again"
    weights = f"MODEL.WEIGHTS {whole / 'model_final.pth'} OUTPUT_DIR {again}"
    train_net.main(arguments(f"--eval-only {data(videos, 'test')}", weights) + options.split())
    assert result(again) == results[0]


def result(output):
    return json.loads((output / "inference" / "custom_test" / "results.json").read_text())


@pytest.fixture
def cfg(videos, tmp_path):
    options = f"OUTPUT_DIR {tmp_path} MODEL.VIDEO.HEAD.DROPOUT 0.0"
    args = train_net.parse_args(arguments(data(videos, "train", "test"), options))
    cfg = read_config(args)
    cfg.defrost()
    return cfg


def test_parameter_groups(cfg):
    """By hand, in the five ways that the parameters of TSM differ."""
    cfg.merge_from_file(str(PROJECT / "configs" / "Base-TSM.yaml"))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3"]
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "build_non_local_resnet3d_backbone", "cpu"
    cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES3, cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES4 = (0,), ()
    model = build_model(cfg)
    optimizer = VideoTrainer.build_optimizer(cfg, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(optimizer.param_groups) == 5
    assert len(found) == len(names) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, (rate, decay) in found.items():
        if ".norm." in name:
            expected = 0.02, 0.0
        elif name.startswith("head"):
            expected = (0.1, 1e-4) if name.endswith("weight") else (0.2, 0.0)
        else:
            expected = (0.02, 1e-4) if name.endswith("weight") else (0.04, 0.0)
        assert (rate, decay) == pytest.approx(expected), name
    assert "backbone.res3.non_local0.theta.bias" in found
    assert "backbone.res3.non_local0.norm.bias" in found
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, False)

    # The gradient is clipped as a whole: a long one moves the weights by no more than 20.
    before = model.head.linear.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.head.linear.weight.grad[0, 0] = 3e4
    optimizer.step()
    assert (before - model.head.linear.weight)[0, 0].item() == pytest.approx(0.1 * 20, rel=1e-3)


def test_paper_decays_all_but_norms(cfg):
    cfg.merge_from_file(str(PROJECT / "configs" / "Base-Video.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.OUT_FEATURES = "cpu", ["res3"]
    optimizer = VideoTrainer.build_optimizer(cfg, build_model(cfg))
    groups = [(g["lr"], g["weight_decay"], g["nesterov"]) for g in optimizer.param_groups]
    assert sorted(groups) == [(0.01, 0.0, True), (0.01, 1e-4, True)]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_accumulated_gradients(mixed, multi_label, cfg, randomize):
    """Those of the whole batch; with batch norm a constant, as it does depend on the parts."""
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.VIDEO.HEAD.MULTI_LABEL = multi_label
    model = randomize(build_model(cfg)).train()
    labels = [(0, 2), (), (1,), (0, 1, 2)] if multi_label else [0, 2, 1, 1]
    clips = torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8)
    batch = [{"video": clip, "label": label} for clip, label in zip(clips, labels)]
    loss = model(batch)["loss_cls"]
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    step = TrainingStep(model, [batch] * 2, optimizer, parts=2, mixed_precision=mixed)
    with EventStorage() as storage:
        for step.iter in range(2):  # from zero every time
            step.run_step()
    tolerance = {"rtol": 0.05, "atol": 0.02} if mixed else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[name], msg=name, **tolerance)
    logged = storage.latest()["total_loss"][0]
    assert logged == pytest.approx(loss.item(), rel=0.02 if mixed else 1e-5)


def test_precise_batch_norm(cfg, tmp_path):
    """The statistics that are saved are those of the first clips, blocks' included."""
    cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet3d_backbone"
    cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES3, cfg.MODEL.NON_LOCAL.AFTER_BLOCKS.RES4 = (0,), ()
    cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST = 2, ()
    trainer = VideoTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]

    inputs = {}
    norms = {
        "backbone.stem.conv1.norm": trainer.model.backbone.stem.conv1.norm,
        "backbone.res3.non_local0.norm": trainer.model.backbone.res3.non_local0.norm,
    }
    for name, norm in norms.items():
        norm.register_forward_pre_hook(
            lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].detach())
        )
    batches = iter(VideoTrainer.build_train_loader(cfg))
    with torch.no_grad():
        for _ in range(3):
            trainer.model.train()(next(batches))
    for name, seen in inputs.items():
        values = torch.cat(seen).transpose(0, 1).flatten(1)
        assert_close(saved[f"{name}.running_mean"], values.mean(1), rtol=1e-4, atol=1e-5)
        variance = values.var(1, unbiased=False)
        assert_close(saved[f"{name}.running_var"], variance, rtol=1e-3, atol=1e-6)


def test_few_clips(cfg, caplog):
    for norm, warns in (("BN", True), ("SyncBN", False), ("FrozenBN", False)):
        cfg.MODEL.RESNETS.NORM, cfg.SOLVER.ACCUMULATE = norm, 2  # of 6
        caplog.clear()
        warn_of_small_batches(cfg, build_model(cfg))
        assert ("sees 3 clips at a time" in caplog.text) == warns
    cfg.MODEL.RESNETS.NORM, cfg.SOLVER.ACCUMULATE = "BN", 1
    caplog.clear()
    warn_of_small_batches(cfg, build_model(cfg))
    assert not caplog.text


def test_with_and_without_blocks(videos, tmp_path, capsys):
    """Same weights, clips and dropout: the losses are equal until the blocks have learned."""
    options = """MODEL.BACKBONE.NAME build_non_local_resnet3d_backbone SOLVER.MAX_ITER 3
        MODEL.NON_LOCAL.AFTER_BLOCKS.RES3 (0,) MODEL.NON_LOCAL.AFTER_BLOCKS.RES4 ()
        TEST.MAX_UNREADABLE 0.2"""
    flags = f"{data(videos, 'train', 'test')} OUTPUT_DIR {tmp_path}"
    ab.main(arguments(flags) + options.split())
    report = json.loads((tmp_path / "ab.json").read_text())
    losses = [report["losses"][variant]["total_loss"] for variant in ("stock", "non_local")]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]
    scores = report["scores"]
    gain = scores["non_local"]["video/top1"] - scores["stock"]["video/top1"]
    assert scores["difference"] == {"video/top1": gain}
    assert capsys.readouterr().out.splitlines()[-7].split() == ["top-1"]
    assert score_table({"stock": {"video/mAP": 5.0}}, VideoTrainer.metrics).split()[0] == "mAP"
    with pytest.raises(SystemExit, match="has no blocks to compare"):
        ab.main(arguments(flags))


def test_schedule_and_loader_are_printed(videos, tmp_path, capsys):
    flags = f"{data(videos, 'train')} --scale-lr --benchmark-loader 0.1 OUTPUT_DIR {tmp_path}"
    options = words("--config-file", CONFIG, flags, *TINY)
    for key in ("SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CHECKPOINT_PERIOD"):
        place = options.index(key)
        del options[place : place + 2]
    train_net.main(options)
    out = capsys.readouterr().out
    assert "| SOLVER.IMS_PER_BATCH | 64 | 6 | given |" in out
    assert "| SOLVER.BASE_LR | 0.01 | 0.0009375 | |" in out  # x 6 / 64
    assert "clips/s with 0 workers" in out
    assert not (tmp_path / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ("", "", r"DATASETS\.TRAIN: .*kinetics400/train: no such folder; give --train-data"),
        ("--train-data {0}/nothing", "", r"--train-data: no such file: .*nothing"),
        (
            "--train-data {0}/train --test-data {0}/other",
            "",
            r"--test-data: .*'pink' is not one",
        ),
        (
            "--train-data {0}/train --classes {0}/classes.txt",
            "",
            r"'green' is not one of the 2",
        ),
        ("--classes {0}/classes.txt", "", r"--classes needs --train-data or --test-data"),
        ("--eval-only", "", r"--eval-only needs weights"),
        ("--train-data {0}/train", "SOLVER.ACCUMULATE 4", r"6, 1 processes\), got 4"),
        ("--train-data {0}/train", "MODEL.VIDEO.HEAD.MULTI_LABEL True", r"must be False for cust"),
        ("--train-data {0}/train", "MODEL.VIDEO.POOLING paperr", r"POOLING\) must be one of"),
        ("--train-data {0}/train --scale-lr", "SOLVER.IMS_PER_BATCH 64", r"differ from .* 64"),
    ],
)
def test_wrong_input(flags, options, message, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (videos / "other" / "pink").mkdir(parents=True, exist_ok=True)
    (videos / "classes.txt").write_text("red\nblue\n")
    with pytest.raises(SystemExit, match=message):
        train_net.main(arguments(flags.format(videos), "OUTPUT_DIR", tmp_path) + options.split())


def test_weights_for_other_classes(cfg, tmp_path):
    """The head starts anew only if it is named; with the backbone alone it always does."""
    cfg.MODEL.VIDEO.HEAD.NUM_CLASSES = 5
    state = build_model(cfg).state_dict()
    cfg.MODEL.VIDEO.HEAD.NUM_CLASSES, cfg.MODEL.WEIGHTS = 3, str(tmp_path / "model.pth")
    torch.save({"model": state}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match=r"head\.linear\.bias.*--allow-missing"):
        VideoTrainer.dry_run(cfg, False)
    for options in ({"allow_missing": ["head"]}, {}):
        model = VideoTrainer.dry_run(cfg, False, **options)
        name = "backbone.stem.conv1.weight"
        assert torch.equal(model.state_dict()[name], state[name])
        backbone = {name: tensor for name, tensor in state.items() if "head" not in name}
        torch.save({"model": backbone}, cfg.MODEL.WEIGHTS)


def test_classes_are_the_models(videos, tmp_path):
    """Names that are stored with weights are kept, and data with other names are refused."""
    weights = tmp_path / "model.pth"
    cfg = load_config(CONFIG, TINY, default_video_config)
    cfg.MODEL.VIDEO.HEAD.NUM_CLASSES = 4
    names = ["black", "blue", "green", "red"]
    torch.save({"model": build_model(cfg).state_dict(), "metadata": {"classes": names}}, weights)
    flags = f"--eval-only {data(videos, 'test')}"
    options = f"MODEL.WEIGHTS {weights} OUTPUT_DIR {tmp_path} TEST.MAX_UNREADABLE 0.2"
    train_net.main(arguments(flags, options))
    table = [(row["class"], row["videos"]) for row in result(tmp_path)["classes"]]
    assert table == [("black", 0), ("blue", 2), ("green", 2), ("red", 2)]
    classes = tmp_path / "classes.txt"
    for lines, message in (
        ("blue\nblack\ngreen\nred", "number 0 is 'blue' there, 'black' in the model"),
        ("blue\ngreen\nred", "has 3 classes, but the model has 4"),
    ):
        classes.write_text(lines)
        with pytest.raises(SystemExit, match=message):
            train_net.main(arguments(f"{flags} --classes {classes}", options))
