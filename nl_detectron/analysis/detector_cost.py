"""What non-local blocks add to the parameters, the computation and the memory of a detector.

Networks are built on the meta device, so nothing is computed or downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron.analysis.cost import block_cost
from nl_detectron.config import without_blocks
from nl_detectron.non_local import find_blocks


class Load(NamedTuple):
    """What a detector has to do, where its cost depends on it.

    Attributes:
        image_size: height and width of an image as the network gets it, before padding.
        proposals: RoIs of the box head.
        detections: RoIs of the other heads.
    """

    image_size: tuple[int, int] = (800, 1333)
    proposals: int = 1000
    detections: int = 100


def build(cfg: CfgNode) -> nn.Module:
    """Build the model of a config without data."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).eval()


def count(cfg: CfgNode, load: Load) -> tuple[int, float]:
    """Return the number of parameters, and the GMAC of one image."""
    model = build(cfg)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_networks(model, load)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, counter.get_total_flops() / 2e9


def run_networks(model: Any, load: Load) -> None:
    """Run every network of a detector once, with a fixed number of RoIs instead of detections."""
    divisor = model.backbone.size_divisibility or 1
    height, width = (-(-size // divisor) * divisor for size in load.image_size)
    features = model.backbone(torch.empty(1, 3, height, width, device="meta"))
    if hasattr(model, "head"):
        model.head([features[name] for name in model.head_in_features])
        return
    rpn, heads = model.proposal_generator, model.roi_heads
    rpn.rpn_head([features[name] for name in rpn.in_features])
    heads.box_predictor(heads.box_head(roi_features(model, heads.box_pooler, load.proposals)))
    if heads.mask_on:
        heads.mask_head.layers(roi_features(model, heads.mask_pooler, load.detections))
    if heads.keypoint_on:
        heads.keypoint_head.layers(roi_features(model, heads.keypoint_pooler, load.detections))


def roi_features(model: Any, pooler: Any, number: int) -> Tensor:
    """Return features of RoIs in the shape in which the pooler gives them to a head."""
    channels = model.backbone.output_shape()[model.roi_heads.in_features[0]].channels
    return torch.empty(number, channels, *pooler.output_size, device="meta")


def model_rows(configs: Iterable[tuple[str, CfgNode]], load: Load) -> Iterator[str]:
    """Yield the lines of a Markdown table of models."""
    yield "| config | parameters | of the blocks | GMAC | of the blocks | |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, cfg in configs:
        parameters, gmac = count(cfg, load)
        stock_parameters, stock_gmac = count(without_blocks(cfg), load)
        yield (
            f"| {name} | {parameters:,} | {parameters - stock_parameters:,} "
            f"| {gmac:.1f} | {gmac - stock_gmac:.1f} | +{100 * (gmac / stock_gmac - 1):.1f} % |"
        )


def block_rows(cfg: CfgNode, load: Load, batch_size: int) -> Iterator[str]:
    """Yield the lines of a Markdown table of the blocks of a model, in training on a batch."""
    model = build(cfg)
    blocks = find_blocks(model)
    shapes: dict[str, list[int]] = {}
    with ExitStack() as hooks:
        for name, block in blocks.items():

            def record(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                size, *rest = inputs[0].shape
                shapes[name] = [batch_size * size, *rest]

            hooks.enter_context(block.register_forward_pre_hook(record))
        run_networks(model, load)
    if not shapes:
        yield (
            f"No non-local blocks: MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, "
            f"MODEL.ROI_KEYPOINT_HEAD.NAME is {cfg.MODEL.ROI_KEYPOINT_HEAD.NAME}"
        )
        return
    yield f"Each block, {batch_size} image(s) in training; peak includes gradients:"
    yield ""
    yield "| block | input | path | parameters | GMAC | naive | saved for backward | peak |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for name, shape in shapes.items():
        cost = block_cost(blocks[name], shape, "cuda" if torch.cuda.is_available() else "cpu")
        yield (
            f"| {name} | {' x '.join(map(str, shape))} | {cost.path} | {cost.parameters:,} "
            f"| {cost.macs / 1e9:.1f} | {cost.naive_macs / 1e9:.1f} "
            f"| {cost.saved_bytes / 2**20:.1f} MB | {cost.peak_bytes / 2**20:.1f} MB |"
        )
