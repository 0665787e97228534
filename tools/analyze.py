"""Print what non-local blocks add to the parameters, the computation and the memory of a model.

Every config is compared with its stock twin, the same config without the blocks; for a config that
is named, each block is listed as well. Networks are built on the meta device, so nothing is
computed or downloaded. GMAC is what detectron2 and fvcore print as GFLOPs: a multiply and an add
count as one. (Their own counters miss fused attention: see nl_detectron/flops.py.)

    python tools/analyze.py
    python tools/analyze.py --config-file configs/COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml \\
        --batch-size 2 MODEL.NON_LOCAL.PAIRWISE dot_product
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron import NonLocalBlock
from nl_detectron.config import load_config, stock_twin
from nl_detectron.cost import block_cost

CONFIGS = Path(__file__).parent.parent / "configs"


def build(cfg: CfgNode) -> nn.Module:
    """Build a model without data."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).eval()


def count(cfg: CfgNode, args: argparse.Namespace) -> tuple[int, float]:
    """Return the number of parameters, and the GMAC of one image of the given size."""
    model = build(cfg)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_networks(model, args)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, counter.get_total_flops() / 2e9


def run_networks(model: Any, args: argparse.Namespace) -> None:
    """Run every network of a detector once, with a fixed number of RoIs instead of detections."""
    divisor = model.backbone.size_divisibility or 1
    height, width = (-(-size // divisor) * divisor for size in args.image_size)
    features = model.backbone(torch.empty(1, 3, height, width, device="meta"))
    if hasattr(model, "head"):
        model.head([features[name] for name in model.head_in_features])
        return
    rpn, heads = model.proposal_generator, model.roi_heads
    rpn.rpn_head([features[name] for name in rpn.in_features])
    heads.box_predictor(heads.box_head(roi_features(model, heads.box_pooler, args.proposals)))
    if heads.mask_on:
        heads.mask_head.layers(roi_features(model, heads.mask_pooler, args.detections))
    if heads.keypoint_on:
        heads.keypoint_head.layers(roi_features(model, heads.keypoint_pooler, args.detections))


def roi_features(model: Any, pooler: Any, number: int) -> torch.Tensor:
    """Return features of RoIs in the shape in which the pooler gives them to a head."""
    channels = model.backbone.output_shape()[model.roi_heads.in_features[0]].channels
    return torch.empty(number, channels, *pooler.output_size, device="meta")


def model_rows(configs: list[tuple[str, CfgNode]], args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a Markdown table of models."""
    yield "| config | parameters | of the blocks | GMAC | of the blocks | |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, cfg in configs:
        parameters, gmac = count(cfg, args)
        stock_parameters, stock_gmac = count(stock_twin(cfg), args)
        yield (
            f"| {name} | {parameters:,} | {parameters - stock_parameters:,} "
            f"| {gmac:.1f} | {gmac - stock_gmac:.1f} | +{100 * (gmac / stock_gmac - 1):.1f} % |"
        )


def block_rows(cfg: CfgNode, args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a Markdown table of the blocks of a model, in training."""
    yield "| block | input | path | parameters | GMAC | textbook | saved for backward | peak |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    model = build(cfg)
    shapes: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, NonLocalBlock):

            def record(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                size, *rest = inputs[0].shape
                shapes[name] = [args.batch_size * size, *rest]

            module.register_forward_pre_hook(record)
    run_networks(model, args)
    for name, shape in shapes.items():
        block: Any = model.get_submodule(name)
        cost = block_cost(block, shape, "cuda" if torch.cuda.is_available() else "cpu")
        yield (
            f"| {name} | {' x '.join(map(str, shape))} | {cost.path} | {cost.parameters:,} "
            f"| {cost.macs / 1e9:.1f} | {cost.textbook_macs / 1e9:.1f} "
            f"| {cost.saved_bytes / 2**20:.1f} MB | {cost.peak_bytes / 2**20:.1f} MB |"
        )


def main() -> None:
    """Parse the arguments and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", type=Path, help="YAML config; default: all full ones")
    parser.add_argument("--image-size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--proposals", type=int, default=1000, help="RoIs of the box head")
    parser.add_argument("--detections", type=int, default=100, help="RoIs of the other heads")
    parser.add_argument("--batch-size", type=int, default=1, help="images, for each block's cost")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    paths = [args.config_file] if args.config_file else sorted(CONFIGS.glob("COCO-*/[!B]*.yaml"))
    try:
        configs = [(path.stem, load_config(path, args.opts)) for path in paths]
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for line in model_rows(configs, args):
        print(line, flush=True)
    if args.config_file:
        print(f"\nEach block, {args.batch_size} image(s) in training; peak includes gradients:\n")
        for line in block_rows(configs[0][1], args):
            print(line, flush=True)


if __name__ == "__main__":
    main()
