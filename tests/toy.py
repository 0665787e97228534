"""A task that is not detection, as small as it gets: a classifier with a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.engine.trainer import StrictTrainer

IMAGES = torch.randn(8, 3, 5, 7, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES.mean((1, 2, 3)) > 0).long()


@META_ARCH_REGISTRY.register()
class ToyClassifier(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("conv", nn.Conv2d(3, 6, 3))
        if cfg.MODEL.BACKBONE.NAME == "toy_non_local":
            self.backbone.add_module("non_local0", NonLocalBlock(6))
        self.head = nn.Linear(6, 2)

    def forward(self, batch):
        images, labels = batch
        logits = self.head(self.backbone(images).mean((2, 3)))
        return {"loss_cls": F.cross_entropy(logits, labels)} if self.training else logits


class Accuracy(DatasetEvaluator):
    def reset(self):
        self.right = []

    def process(self, inputs, outputs):
        self.right += (outputs.argmax(1) == inputs[1]).tolist()

    def evaluate(self):
        return {"toy": {"accuracy": 100 * sum(self.right) / len(self.right)}}


class ToyTrainer(StrictTrainer):
    metrics = {"toy/accuracy": "accuracy"}

    @classmethod
    def backbone_prefix(cls, model):
        return "backbone."

    @classmethod
    def build_train_loader(cls, cfg):
        while True:
            chosen = torch.randint(len(IMAGES), (4,))
            yield IMAGES[chosen], LABELS[chosen]

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return list(zip(IMAGES.split(4), LABELS.split(4)))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return Accuracy()


def make_toy(cfg, output):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "ToyClassifier", "toy_non_local"
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.SEED = "", str(output), 3
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy",), ("toy",)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 3, (), 0
    return cfg
