"""Measure how much the blocks of a config slow down its detector, in inference or in training.

The detectors with and without blocks have the same random weights, see the same random image, keep
a fixed number of detections, and alternate in one process. The output is the median and quartiles
of the ratios of their times, and the share of the blocks in the time. With ``--of mask``, both have
blocks, and one masks padding (MODEL.NON_LOCAL.MASK_PADDING).

    python dev/benchmark_detector.py
    python dev/benchmark_detector.py --of mask
    python dev/benchmark_detector.py --train --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.config import load_config, without_blocks

CONFIG = (
    Path(__file__).parents[1] / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml"
)


class Stopwatch:
    """Sums up the time of the forward passes of all blocks of a model."""

    def __init__(self, model: nn.Module):
        """Register the hooks."""
        self.seconds = 0.0
        for module in model.modules():
            if isinstance(module, NonLocalBlock):
                module.register_forward_pre_hook(self._start)
                module.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self.seconds -= synchronized_time()

    def _stop(self, *_: Any) -> None:
        self.seconds += synchronized_time()


def synchronized_time() -> float:
    """Return the time after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build_detectors(cfg: CfgNode, of: str) -> tuple[nn.Module, nn.Module]:
    """Build a detector without blocks or mask, and one with, which find as much as possible.

    New blocks are the identity, so both find the same objects; more proposals take more time.
    """
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    cfg.MODEL.NON_LOCAL.MASK_PADDING = True
    without = without_blocks(cfg) if of == "blocks" else cfg.clone()
    without.MODEL.NON_LOCAL.MASK_PADDING = False
    plain, ours = build_model(without), build_model(cfg)
    ours.load_state_dict(plain.state_dict(), strict=False)
    return plain, ours


def make_batch(size: tuple[int, int], objects: int) -> list[dict[str, Any]]:
    """Create a batch of one random image (3, H, W) with objects."""
    torch.manual_seed(0)
    corners = torch.rand(objects, 2) * torch.tensor([size[1] - 99, size[0] - 99])
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.cat([corners, corners + 20 + 70 * torch.rand(objects, 2)], 1))
    instances.gt_classes = torch.zeros(objects, dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.ones(objects, *size, dtype=torch.bool))
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return [{"image": image, "height": size[0], "width": size[1], "instances": instances}]


def time_pass(model: nn.Module, batch: list[dict[str, Any]]) -> float:
    """Run a forward pass, in training also a backward pass; return the seconds."""
    torch.manual_seed(0)  # for the sampling in training
    start = synchronized_time()
    if model.training:
        with EventStorage():
            sum(model(batch).values()).backward()
    else:
        with torch.no_grad():
            model(batch)
    return synchronized_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", type=Path, default=CONFIG)
    parser.add_argument("--image-size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--of", choices=["blocks", "mask"], default="blocks")
    parser.add_argument("--train", action="store_true", help="measure forward and backward passes")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.opts)
    plain, ours = (model.train(args.train) for model in build_detectors(cfg, args.of))
    batch = make_batch(tuple(args.image_size), objects=10)
    time_pass(plain, batch), time_pass(ours, batch)
    plain_blocks, our_blocks = Stopwatch(plain), Stopwatch(ours)
    ratios, shares, block_ratios = [], [], []
    for i in range(args.rounds):
        plain_blocks.seconds = our_blocks.seconds = 0.0
        seconds = time_pass(plain, batch)
        ratios.append(time_pass(ours, batch) / seconds)
        shares.append(our_blocks.seconds / seconds)
        if args.of == "mask":
            block_ratios.append(our_blocks.seconds / plain_blocks.seconds)
        print(f"round {i + 1}: {100 * (ratios[-1] - 1):+.1f} %", flush=True)
    low, median, high = statistics.quantiles(ratios)
    print(
        f"with {args.of} / without: {100 * (median - 1):+.1f} % "
        f"(quartiles {100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}; {args.rounds} rounds); "
        f"forward pass of the blocks: {100 * statistics.median(shares):.1f} % of the time without"
    )
    if block_ratios:
        low, median, high = statistics.quantiles(block_ratios)
        print(
            f"forward pass of the blocks, with mask / without: {100 * (median - 1):+.1f} % "
            f"(quartiles {100 * (low - 1):+.1f}, {100 * (high - 1):+.1f})"
        )


if __name__ == "__main__":
    main()
