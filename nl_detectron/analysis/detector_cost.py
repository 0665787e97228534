"""Compute the parameters, computation and memory that non-local blocks add to a detector.

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


class Workload(NamedTuple):
    """The sizes that the cost of a detector, or of a network for video, depends on.

    Attributes:
        image_size: height and width of the network's input, before padding.
        proposals: number of RoIs of the box head.
        detections: number of RoIs of the mask and keypoint heads.
        clip_size: frames, height and width, for networks with 3-D convolutions.
    """

    image_size: tuple[int, int] = (800, 1333)
    proposals: int = 1000
    detections: int = 100
    clip_size: tuple[int, int, int] = (32, 224, 224)


def build_meta_model(cfg: CfgNode) -> nn.Module:
    """Build the model of a config on the meta device."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).eval()


def count_parameters_and_gmac(cfg: CfgNode, workload: Workload) -> tuple[int, float]:
    """Return the number of parameters, and the GMAC for one image or clip."""
    model = build_meta_model(cfg)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_networks(model, workload)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, counter.get_total_flops() / 2e9


def run_networks(model: Any, workload: Workload) -> None:
    """Run every network of a model once, those of a detector with fixed numbers of RoIs."""
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        model(torch.empty(1, 3, *workload.clip_size, device="meta"))
        return
    divisor = model.backbone.size_divisibility or 1
    height, width = (-(-size // divisor) * divisor for size in workload.image_size)
    features = model.backbone(torch.empty(1, 3, height, width, device="meta"))
    if hasattr(model, "head"):
        model.head([features[name] for name in model.head_in_features])
        return
    rpn, heads = model.proposal_generator, model.roi_heads
    rpn.rpn_head([features[name] for name in rpn.in_features])
    heads.box_predictor(heads.box_head(roi_features(model, heads.box_pooler, workload.proposals)))
    if heads.mask_on:
        heads.mask_head.layers(roi_features(model, heads.mask_pooler, workload.detections))
    if heads.keypoint_on:
        heads.keypoint_head.layers(roi_features(model, heads.keypoint_pooler, workload.detections))


def roi_features(model: Any, pooler: Any, number: int) -> Tensor:
    """Return RoI features in the shape that the pooler passes to a head."""
    channels = model.backbone.output_shape()[model.roi_heads.in_features[0]].channels
    return torch.empty(number, channels, *pooler.output_size, device="meta")


def model_rows(
    configs: Iterable[tuple[str, CfgNode]], workload: Workload, relative: bool = False
) -> Iterator[str]:
    """Yield the lines of a Markdown table that compares models with and without blocks.

    Args:
        configs: name and config of each model.
        workload: the input.
        relative: also count the weights of convolutions and linear layers alone, as the paper's
            Table 2e does, and compare parameters and GMAC with those of the first model.
    """
    yield "| config | parameters | of the blocks | GMAC | of the blocks | |" + (
        " weights | parameters / first | GMAC / first |" if relative else ""
    )
    yield "|---|---:|---:|---:|---:|---:|" + ("---:|---:|---:|" if relative else "")
    first = None
    for name, cfg in configs:
        parameters, gmac = count_parameters_and_gmac(cfg, workload)
        stock_parameters, stock_gmac = count_parameters_and_gmac(without_blocks(cfg), workload)
        first = first or (parameters, gmac)
        row = (
            f"| {name} | {parameters:,} | {parameters - stock_parameters:,} "
            f"| {gmac:.2f} | {gmac - stock_gmac:.2f} | +{100 * (gmac / stock_gmac - 1):.1f} % |"
        )
        if relative:
            weights = sum(p.numel() for p in build_meta_model(cfg).parameters() if p.dim() > 1)
            row += f" {weights:,} | {parameters / first[0]:.3f} | {gmac / first[1]:.3f} |"
        yield row


def block_rows(cfg: CfgNode, workload: Workload, batch_size: int) -> Iterator[str]:
    """Yield the lines of a Markdown table of a model's blocks, in training on a batch."""
    model = build_meta_model(cfg)
    blocks = find_blocks(model)
    shapes: dict[str, list[int]] = {}
    with ExitStack() as hooks:
        for name, block in blocks.items():

            def record(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                size, *rest = inputs[0].shape
                shapes[name] = [batch_size * size, *rest]

            hooks.enter_context(block.register_forward_pre_hook(record))
        run_networks(model, workload)
    if not shapes:
        yield (
            f"no non-local blocks: MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, "
            f"MODEL.ROI_KEYPOINT_HEAD.NAME is {cfg.MODEL.ROI_KEYPOINT_HEAD.NAME}"
        )
        return
    yield f"each block, {batch_size} image(s) or clip(s) in training; peak includes gradients:"
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
