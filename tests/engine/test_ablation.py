"""With and without blocks: nothing else tells the two trainings apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from matplotlib.image import imread

from nl_detectron.config import load_config, without_blocks
from nl_detectron.engine.ablation import draw_losses, score_table, train_and_evaluate
from nl_detectron.engine.coco.trainer import CocoTrainer, PairedCocoTrainer
from tests.running import QUICK, TINY


class RecordingTrainer(PairedCocoTrainer):
    """Keeps what the model is trained on; draws more random numbers for a larger model."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        count = len(list(model.parameters()))
        torch.rand(count), np.random.rand(count)
        return super().build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return cls.recorded(super().build_train_loader(cfg))

    @classmethod
    def recorded(cls, loader):
        cls.seen = []
        for batch in loader:
            cls.seen += [(data["file_name"], data["image"]) for data in batch]
            yield batch


@pytest.fixture
def overfit_cfg(custom_data_name, tmp_path):
    """Blocks in the backbone and in the keypoint head; images are flipped at random."""
    cfg = load_config(QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml", TINY)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (custom_data_name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 2
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    cfg.TEST.EVAL_PERIOD = 0
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.SOLVER.MAX_ITER = 4
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


@pytest.mark.parametrize("workers", [0, 2])
def test_only_the_blocks_tell_the_models_apart(workers, overfit_cfg):
    overfit_cfg.DATALOADER.NUM_WORKERS = workers
    runs, seen = [], []
    for cfg in (without_blocks(overfit_cfg), overfit_cfg):
        cfg.OUTPUT_DIR += f"/{len(runs)}"
        runs.append(train_and_evaluate(cfg, RecordingTrainer))
        seen.append(RecordingTrainer.seen)

    for (name, image), (other_name, other_image) in zip(*seen):
        assert name == other_name
        assert torch.equal(image, other_image)
    assert len(seen[0]) == len(seen[1]) == 4 * 2

    stock, non_local = (run.losses for run in runs)
    names = "total_loss loss_cls loss_box_reg loss_keypoint loss_rpn_cls loss_rpn_loc"
    assert set(stock) == set(names.split())
    for name, (first, *later) in stock.items():
        assert first == non_local[name][0], name
        assert len(later) == 3
        assert later != non_local[name][1:], name
    assert set(runs[0].scores) == set(runs[1].scores) == {"bbox/AP", "keypoints/AP"}


def test_starts_as_stock_detectron2_does(overfit_cfg):
    seed_all_rng(overfit_cfg.SEED)
    stock = build_model(without_blocks(overfit_cfg)).state_dict()
    first, second = (PairedCocoTrainer.build_model(overfit_cfg).state_dict() for _ in range(2))
    blocks = {name for name in first if ".non_local" in name}
    assert first.keys() - blocks == stock.keys()
    for name, value in stock.items():
        assert torch.equal(first[name], value), name
    for name in blocks:
        assert torch.equal(first[name], second[name]), name


def test_random_seed_is_refused(overfit_cfg):
    overfit_cfg.SEED = -1
    with pytest.raises(ValueError, match="SEED must be at least 0.* got -1"):
        PairedCocoTrainer(overfit_cfg)


def test_table():
    results = {
        "stock": {"a/bbox/AP": 33.04, "a/segm/AP": 36.0, "long_name/keypoints/AP": float("nan")},
        "non-local": {"a/bbox/AP": 32.0, "a/segm/AP": 89.66, "long_name/keypoints/AP": 2.0},
    }
    assert score_table(results, CocoTrainer.metrics) == (
        "                 a box AP    a mask AP  long_name keypoint AP\n"
        "stock                33.0         36.0                    nan\n"
        "non-local            32.0         89.7                    2.0\n"
        "difference           -1.0        +53.7                   +nan"
    )
    assert len(score_table({"stock": {"bbox/AP": 1.0}}, CocoTrainer.metrics).splitlines()) == 2


def test_picture(tmp_path):
    draw_losses(tmp_path / "a.png", {"stock": [3.0, 2.0, 1.0], "non-local": [3.0, 1.0, 0.5]})
    pixels = imread(tmp_path / "a.png")[..., :3]
    for colour in ("1f77b4", "ff7f0e"):  # matplotlib's first two
        wanted = torch.tensor([*bytes.fromhex(colour)]) / 255
        assert ((torch.from_numpy(pixels) - wanted).abs().amax(-1) < 0.01).sum() > 100
