"""Gradients of a whole detector in one, two and three processes, against plain autograd.

It has masks and keypoints, and blocks in the backbone and in the keypoint head.
"""

from __future__ import annotations

import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

from nl_detectron.analysis.health import BlockHealthHook
from nl_detectron.config import load_config
from nl_detectron.engine.coco.files import register_coco_files
from nl_detectron.engine.coco.trainer import CocoTrainer
from nl_detectron.non_local import find_blocks
from tests.generated_coco import write_coco
from tests.running import QUICK, TINY, forked, metrics, words

CONFIG = QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml"
NAME = "six_bars"
# The losses are means over what is sampled in a process. They are those of the whole batch, too, if
# each image has as many samples: all anchors and proposals, with the ground truth alone in front.
OPTIONS = """
    SOLVER.IMS_PER_BATCH 6 SOLVER.MAX_ITER 1 SOLVER.CLIP_GRADIENTS.ENABLED False MODEL.DEVICE cpu
    INPUT.RANDOM_FLIP none MODEL.ROI_HEADS.NUM_CLASSES 1 MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 2
    MODEL.RPN.BATCH_SIZE_PER_IMAGE 100000 MODEL.RPN.NMS_THRESH 1.0
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 100000 MODEL.RPN.POST_NMS_TOPK_TRAIN 100000
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 100000 MODEL.ROI_HEADS.IOU_THRESHOLDS [0.999]
    INPUT.MIN_SIZE_TRAIN (48,) MODEL.MASK_ON True MODEL.ROI_BOX_HEAD.FC_DIM 32
    MODEL.ROI_MASK_HEAD.CONV_DIM 16 MODEL.ROI_MASK_HEAD.NORM ''
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    names = ["left_end", "right_end"]
    categories = [{"id": 1, "name": "bar", "keypoints": names, "skeleton": []}]
    images = tmp_path_factory.mktemp("six") / "images"
    file = write_coco(images, "bars.json", num_images=6, categories=categories, keypoints=2)
    register_coco_files(NAME, str(file), str(images))
    yield NAME
    DatasetCatalog.remove(NAME)


def distance(found, expected):
    """Relative to the norm of all as one vector."""
    found, expected = (torch.cat([part.flatten() for part in parts]) for parts in (found, expected))
    return (found - expected).norm() / expected.norm()


def test_gradients_of_processes(data, tmp_path):
    """In the first step, momentum is the gradient."""
    weights = tmp_path / "weights.pth"

    def config_of(processes):
        output = tmp_path / str(processes)
        output.mkdir(exist_ok=True)
        options = words(*TINY, OPTIONS, "OUTPUT_DIR", output, "MODEL.WEIGHTS", weights)
        cfg = load_config(CONFIG, options)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (data,), ()
        return cfg

    cfg = config_of(0)
    model = build_model(cfg)
    for block in find_blocks(model).values():  # none is idle
        nn.init.normal_(block.conv_out.weight, std=0.1)
    torch.save({"model": model.state_dict()}, weights)
    batch = next(iter(build_detection_train_loader(cfg)))
    assert len({image["file_name"] for image in batch}) == 6
    with EventStorage():
        sum(model(batch).values()).backward()
    groups = build_optimizer(cfg, model).param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    expected = [parameter.grad for parameter in parameters]
    in_blocks = {p for block in find_blocks(model).values() for p in block.parameters()}
    blocks = [i for i, parameter in enumerate(parameters) if parameter in in_blocks]
    assert sum(bool(gradient.count_nonzero()) for gradient in expected) == len(expected)

    def train(processes):
        trainer = CocoTrainer(config_of(processes))
        trainer.register_hooks([BlockHealthHook(1, trainer.model)])
        trainer.resume_or_load(resume=False)
        trainer.train()

    for processes in (1, 2, 3):
        forked(lambda *_: train(processes), processes, tmp_path)  # noqa: B023
        file = tmp_path / str(processes) / "model_final.pth"
        state = torch.load(file, weights_only=False)["trainer"]["_trainer"]["optimizer"]["state"]
        found = [state[i]["momentum_buffer"] for i in range(len(state))]
        assert len(found) == len(expected)
        assert distance(found, expected) < 1e-5
        assert distance([found[i] for i in blocks], [expected[i] for i in blocks]) < 1e-5
        (logged,) = metrics(tmp_path / str(processes))  # by one of the processes
        assert 0 < logged["non_local/backbone.bottom_up.res4.non_local0/entropy"] <= 1
