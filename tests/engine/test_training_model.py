"""A model that is prepared for a fast training computes what detectron2's own does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from nl_detectron.config import load_config
from nl_detectron.engine.coco.trainer import CocoTrainer
from nl_detectron.engine.options import RunOptions
from nl_detectron.engine.training_model import fold_frozen_norms, to_channels_last
from nl_detectron_cli.arguments import run_options, training_parser
from tests.running import QUICK, TINY, words

CONFIG = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
OPTIONS = "MODEL.RESNETS.NORM FrozenBN MODEL.BACKBONE.FREEZE_AT 2 MODEL.DEVICE cpu".split()
CHOICES = [
    {"fold_norms": True},
    {"channels_last": True},
    {"fold_norms": True, "channels_last": True},
]


def randomize_norms(model):
    for norm in model.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.running_var.uniform_(0.5, 1.5)
            for buffer in (norm.bias, norm.running_mean):
                buffer.normal_(std=0.3)


def make_trainer(custom_data_name, folder, iterations=1, **options):
    """A trainer whose frozen norms are not the identity, and the config."""
    cfg = load_config(CONFIG, words(*TINY, *OPTIONS, "OUTPUT_DIR", folder))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (custom_data_name,), ()
    cfg.SOLVER.MAX_ITER = iterations
    torch.manual_seed(1)
    trainer = CocoTrainer(cfg, RunOptions(**options))
    randomize_norms(trainer.model)
    return trainer, cfg


@pytest.mark.parametrize("size", [(5, 7), (1, 6), (6, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_convolution(size, layout, bias):
    conv = Conv2d(3, 5, 3, padding=1, bias=bias, norm=FrozenBatchNorm2d(5), activation=F.relu)
    model = nn.Sequential(conv).double()
    randomize_norms(model)
    x = torch.randn(2, 3, *size).double()
    found = []
    for fold in (False, True):
        if fold:
            fold_frozen_norms(model)
        model.zero_grad()
        # A plain sum of products in one layout, then a map in the other
        map = x.clone().contiguous(memory_format=layout if fold else torch.contiguous_format)
        y = model(map.requires_grad_())
        (y * torch.arange(5.0).double().view(5, 1, 1)).square().sum().backward()
        found.append([y.detach(), map.grad, *(p.grad for p in model.parameters())])
    assert_close(found[1], found[0])
    assert any(value.abs().max() > 1 for value in found[0])


@pytest.mark.parametrize("options", CHOICES)
def test_gradients_of_a_detector(options, custom_data_name, tmp_path):
    trainer, cfg = make_trainer(custom_data_name, tmp_path, **options)
    batch = next(iter(CocoTrainer.build_train_loader(cfg)))  # the same in every run
    reference = build_model(cfg)
    reference.load_state_dict(trainer.model.state_dict())
    gradients = []
    for model in (reference, trainer.model):
        torch.manual_seed(5)
        with EventStorage():
            sum(model(batch).values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    # In float32, in which NMS computes; a norm after a convolution leaves it a tiny gradient.
    largest = max(gradient.norm() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        error = (gradients[1][name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-5 * largest, name
    weight = trainer.model.backbone.bottom_up.res3[0].conv1.weight
    last = weight.is_contiguous(memory_format=torch.channels_last)
    assert last == options.get("channels_last", False) != weight.is_contiguous()


@pytest.mark.parametrize("resumed", [{}, CHOICES[-1]])
def test_checkpoint_is_that_of_the_config(resumed, custom_data_name, tmp_path):
    """It loads in stock detectron2, and the training goes on with other options."""
    trainer, cfg = make_trainer(custom_data_name, tmp_path, 1, **CHOICES[-1])
    trainer.train()
    state = copy.deepcopy(trainer.model.state_dict())
    stock = build_model(cfg)
    assert state.keys() == stock.state_dict().keys()
    DetectionCheckpointer(stock).load(str(tmp_path / "model_final.pth"))
    for name, value in stock.state_dict().items():
        assert torch.equal(value, state[name]), name

    trainer, _ = make_trainer(custom_data_name, tmp_path, 3, **resumed)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    trainer.train()
    assert trainer.iter == 3
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_options_that_would_change_nothing_are_errors():
    with pytest.raises(ValueError, match="no frozen batch norm"):
        fold_frozen_norms(nn.Sequential(Conv2d(3, 5, 1, norm=nn.BatchNorm2d(5))))
    with pytest.raises(ValueError, match="no convolutions"):
        to_channels_last(nn.Linear(3, 5))


def test_weights_of_clips():
    conv = nn.Conv3d(3, 5, 3)
    weight = conv.weight.detach().clone()
    to_channels_last(conv)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(conv.weight, weight)


def test_arguments():
    parse = training_parser("").parse_args
    config = ["--config-file", str(CONFIG)]
    assert run_options(parse(config)) == RunOptions()
    both = run_options(parse([*config, "--fold-norms", "--channels-last"]))
    assert both == RunOptions(fold_norms=True, channels_last=True)
