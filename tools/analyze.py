"""Print what non-local blocks add to the parameters and the computation of a model.

Every config is compared with its stock twin, the same config without the blocks. The network is
built on the meta device, so nothing is computed or downloaded. GMAC is what detectron2 and fvcore
print as GFLOPs: a multiply and an add count as one.

    python tools/analyze.py
    python tools/analyze.py --config-file configs/COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron import add_non_local_config

CONFIGS = Path(__file__).parent.parent / "configs"


def load_config(path: Path) -> CfgNode:
    """Read a YAML config of this package."""
    cfg = get_cfg()
    add_non_local_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "meta"
    return cfg


def stock_twin(cfg: CfgNode) -> CfgNode:
    """Return the same config without the blocks."""
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("non_local_", "")
    if cfg.MODEL.ROI_KEYPOINT_HEAD.NAME == "NonLocalKeypointHead":
        cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "KRCNNConvDeconvUpsampleHead"
    return cfg


def count(cfg: CfgNode, args: argparse.Namespace) -> tuple[int, float]:
    """Return the number of parameters, and the GMAC of one image of the given size."""
    with torch.device("meta"):
        model = build_model(cfg).eval()
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


def rows(paths: list[Path], args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| config | parameters | of the blocks | GMAC | of the blocks | |"
    yield "|---|---:|---:|---:|---:|---:|"
    for path in paths:
        cfg = load_config(path)
        (parameters, gmac), (stock_parameters, stock_gmac) = (
            count(cfg, args),
            count(stock_twin(cfg), args),
        )
        yield (
            f"| {path.stem} | {parameters:,} | {parameters - stock_parameters:,} "
            f"| {gmac:.1f} | {gmac - stock_gmac:.1f} | +{100 * (gmac / stock_gmac - 1):.1f} % |"
        )


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", type=Path, nargs="+", help="YAML configs; default: all full ones"
    )
    parser.add_argument("--image-size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--proposals", type=int, default=1000, help="RoIs of the box head")
    parser.add_argument("--detections", type=int, default=100, help="RoIs of the other heads")
    args = parser.parse_args()
    for line in rows(args.config_file or sorted(CONFIGS.glob("COCO-*/[!B]*.yaml")), args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
