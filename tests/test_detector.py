"""A whole detector: its gradients against differences of its loss, and mixed precision."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import AMPTrainer
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nl_detectron.config import without_blocks
from nl_detectron.non_local import NonLocalBlock, find_blocks
from nl_detectron.norm import NORMS
from tests.test_backbone import PRESETS, set_blocks, with_random_statistics

SIZE = (64, 96)
BOXES = [[10.0, 5.0, 70.0, 60.0], [30.0, 20.0, 90.0, 50.0]]


def make_detector(cfg, norm=""):
    """A detector with blocks in backbone and keypoint head that are no longer the identity."""
    cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
    cfg.MODEL.NON_LOCAL.NORM = cfg.MODEL.NON_LOCAL.KEYPOINT_HEAD.NORM = norm
    # Proposals depend on the parameters too, but are not differentiated: here they are given.
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, NonLocalBlock):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=module.in_channels**-0.5)
        elif isinstance(module, _BatchNorm):
            module.momentum = 1.0  # statistics are those of the batch before
    return model


def training_inputs():
    """Two images with one object each, and proposals around it."""
    batch = []
    for box in torch.tensor(BOXES):
        instances, proposals = Instances(SIZE), Instances(SIZE)
        instances.gt_boxes, instances.gt_classes = Boxes(box[None]), torch.tensor([0])
        mask = torch.zeros(1, *SIZE, dtype=torch.bool)
        mask[:, 20:40, 30:60] = True
        instances.gt_masks = BitMasks(mask)
        points = box[:2] + 2 + 25 * torch.rand(1, 5, 2)
        instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((1, 5, 1), 2.0)], dim=2))
        proposals.proposal_boxes = Boxes(box + 5 * torch.randn(12, 4))
        proposals.objectness_logits = torch.zeros(12)
        image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "proposals": proposals})
    return batch


def total_loss(model, batch):
    torch.manual_seed(0)  # proposals are sampled
    with EventStorage():
        losses = model(batch)
    assert "loss_keypoint" in losses
    return sum(losses.values())


def test_detector_is_the_stock_detector_when_new(small_cfg):
    """Losses and predictions, bit by bit, blocks in the backbone and in the keypoint head."""
    small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
    small_cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
    set_blocks(small_cfg, PRESETS[50, 5])
    stock, ours = build_model(without_blocks(small_cfg)), build_model(small_cfg)
    missing, unexpected = ours.load_state_dict(
        with_random_statistics(stock).state_dict(), strict=False
    )
    assert unexpected == []
    assert all(".non_local" in key for key in missing)
    assert len(find_blocks(ours)) == 5 + 4

    batch, results = training_inputs(), []
    for model in (stock, ours):
        torch.manual_seed(1)  # proposals are sampled
        with EventStorage(), torch.no_grad():
            losses = model.train()(batch)
            found = model.eval()(batch)[0]["instances"].get_fields()
        results.append({**losses, **found, "pred_boxes": found["pred_boxes"].tensor})
    expected, got = results
    assert len(expected["scores"]) > 0
    assert set(expected) == set(got)
    named = {"pred_boxes", "pred_masks", "pred_keypoints", "loss_mask", "loss_keypoint"}
    assert named <= set(expected)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_is_the_slope_of_the_loss(norm, small_cfg):
    small_cfg.MODEL.MASK_ON = False  # its loss is in float32
    model, batch = make_detector(small_cfg, norm).double(), training_inputs()
    total_loss(model, batch).backward()
    # All parameters at once, and those of the blocks alone: their part of the sum may be small.
    for part in ("", "non_local"):
        moved = [p for name, p in model.named_parameters() if part in name]
        direction = [torch.randn_like(p) * p.abs().mean() for p in moved]
        expected = sum((p.grad * d).sum().item() for p, d in zip(moved, direction))
        step, values = 1e-8, []
        with torch.no_grad():
            for steps in (1, -2):
                for p, d in zip(moved, direction):
                    p += steps * step * d
                values.append(total_loss(model, batch).item())
            for p, d in zip(moved, direction):
                p += step * d
        slope = (values[0] - values[1]) / (2 * step)
        # A loss of 10 in float64, divided by the step, is known to 1e-7.
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6)


def rounding_error(model, function):
    """Standard deviation of ``function()`` when weights and all results are rounded to bfloat16.

    To first order, a relative error d of a number a changes a function by d * a * (its slope); d is
    anywhere within half a unit in the last place, of which the standard deviation is known.
    """
    results = list(model.parameters())

    def keep(module, args, result):
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.retain_grad()
            results.append(result)

    handles = [module.register_forward_hook(keep) for module in model.modules()]
    value = function()
    value.backward()
    for handle in handles:
        handle.remove()
    effects = [(a * a.grad).square().sum().item() for a in results if a.grad is not None]
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    return value.item(), half_a_unit / 3**0.5 * sum(effects) ** 0.5


def keypoint_loss(model, batch):
    """In evaluation, where the model returns none: of each RoI's heat maps, with a cell of each."""
    features = model.backbone(model.preprocess_image(batch).tensor)
    heads, boxes = model.roi_heads, [inputs["proposals"].proposal_boxes for inputs in batch]
    x = heads.keypoint_pooler([features[name] for name in heads.keypoint_in_features], boxes)
    logits = heads.keypoint_head.layers(x).flatten(0, 1).flatten(1)
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


@pytest.mark.parametrize("loss", [total_loss, keypoint_loss])
@pytest.mark.parametrize("norm", ["", "BN", "GN"])
def test_autocast(norm, loss, small_cfg):
    model, batch = make_detector(small_cfg, norm), training_inputs()
    total_loss(model, batch)  # for the statistics of the norms
    model.train(loss is total_loss)
    exact, deviation = rounding_error(model, lambda: loss(model, batch))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded = loss(model, batch).item()
    assert abs(rounded - exact) < 6 * deviation


@pytest.mark.parametrize("norm", ["", "BN", "GN"])
def test_predictions_under_autocast(norm, small_cfg):
    model, batch = make_detector(small_cfg, norm), training_inputs()
    total_loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model.eval()(batch)
    for image in found:
        instances = image["instances"]
        assert len(instances) > 0
        for name in ("scores", "pred_masks", "pred_keypoints"):
            assert instances.get(name).isfinite().all()
        assert instances.pred_boxes.tensor.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", NORMS)
def test_amp_trainer(norm, small_cfg):
    """In float16; detectron2's trainer takes no other device."""
    small_cfg.MODEL.DEVICE = "cuda"
    model, batches = make_detector(small_cfg, norm), [training_inputs()] * 30
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = AMPTrainer(model, batches, optimizer)
    trainer.train(0, len(batches))
    losses = torch.tensor([loss for loss, _ in trainer.storage.history("total_loss").values()])
    assert losses.isfinite().all()
    assert losses[-5:].mean() < 0.95 * losses[:5].mean()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
