"""Compare whole detectors: stock, with the blocks of a config, and optimized for inference.

All have the same random weights, see the same random image, and find as much as possible: in
inference, up to 1000 proposals and 100 objects. They take turns in one process. A row of the table
shows the median of the ratios of the time to that of the first one, with quartiles, and the memory:
the increase at the peak of a pass, in a separate process; on a CPU, of resident memory.

    python dev/benchmark_detector.py                                # three detectors, ten minutes
    python dev/benchmark_detector.py --rounds 15 --config-file C    # one
    python dev/benchmark_detector.py --of mask                      # what masking padding costs
    python dev/benchmark_detector.py --train --rounds 5             # forward and backward passes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from measure import in_new_process, increase_at_peak, return_freed_memory
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.config import load_config, without_blocks
from nl_detectron.engine.optimize import optimize_for_inference

CONFIGS = [
    Path(__file__).parents[1] / "configs" / name
    for name in (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_NL_FPN_NLhead_1x.yaml",
        "COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml",
    )
]


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


def build_detectors(
    cfg: CfgNode, of: str, train: bool, batch: list[dict[str, Any]]
) -> dict[str, nn.Module]:
    """Build the detectors to compare, by name; the first one is what the others are compared to."""
    cfg = cfg.clone()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    without_mask = cfg.clone()
    without_mask.MODEL.NON_LOCAL.MASK_PADDING = False
    torch.manual_seed(0)
    first = build_model(without_mask if of == "mask" else without_blocks(cfg)).train(train)
    calibrate(first, batch)
    blocks = build_model(cfg).train(train)
    blocks.load_state_dict(first.state_dict(), strict=False)  # new blocks are the identity
    if of == "mask":
        return {"without mask": first, "with mask": blocks}
    if train:
        return {"stock": first, "blocks": blocks}
    fast = {"fp32": None, "bf16": torch.bfloat16}
    return {
        "stock": first,
        "blocks": blocks,
        **{
            f"blocks, fast {name}": optimize_for_inference(blocks, dtype)
            for name, dtype in fast.items()
        },
    }


def calibrate(model: Any, batch: list[dict[str, Any]]) -> None:
    """Set constant norms to the statistics of a batch: without, random weights predict no boxes."""

    def measure(norm: Any, args: tuple[torch.Tensor]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(args[0], dim=(0, 2, 3))

    handles = [
        module.register_forward_pre_hook(measure)
        for module in model.modules()
        if isinstance(module, FrozenBatchNorm2d)
    ]
    with torch.no_grad():
        model.backbone(model.preprocess_image(batch).tensor)
    for handle in handles:
        handle.remove()


def make_batch(size: tuple[int, int], objects: int) -> list[dict[str, Any]]:
    """Create a batch of one random image (3, H, W) with objects."""
    torch.manual_seed(0)
    corners = torch.rand(objects, 2) * torch.tensor([size[1] - 99, size[0] - 99])
    boxes = torch.cat([corners, corners + 20 + 70 * torch.rand(objects, 2)], 1)
    instances = Instances(size)
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.zeros(objects, dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.ones(objects, *size, dtype=torch.bool))
    points = (corners + 10)[:, None].expand(-1, 17, -1)
    instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((objects, 17, 1), 2.0)], 2))
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return [{"image": image, "height": size[0], "width": size[1], "instances": instances}]


def run_pass(model: nn.Module, batch: list[dict[str, Any]]) -> float:
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


def time_rounds(
    build: Callable[[], dict[str, nn.Module]], batch: list[dict[str, Any]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Time the detectors in turns; return the seconds of each pass and of its blocks, by name."""
    models = build()
    watches = {name: Stopwatch(model) for name, model in models.items()}
    for model in models.values():
        run_pass(model, batch)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            watches[name].seconds = 0.0
            seconds = run_pass(model, batch)
            times[name].append((seconds, watches[name].seconds))
    return times


def peak_memory(
    build: Callable[[], dict[str, nn.Module]], batch: list[dict[str, Any]], name: str
) -> int:
    """Return the peak memory of the second pass in bytes, without the model."""
    return_freed_memory()
    model = build()[name]
    run_pass(model, batch)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_pass(model, batch)
        return torch.cuda.max_memory_allocated() - before
    return increase_at_peak(lambda: run_pass(model, batch))


def table_rows(times: dict[str, list[tuple[float, float]]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each detector, and the cells that its times fill."""
    stock = [seconds for seconds, _ in next(iter(times.values()))]
    for name, series in times.items():
        low, median, high = statistics.quantiles([a / b for (a, _), b in zip(series, stock)])
        share = statistics.median(block / b for (_, block), b in zip(series, stock))
        seconds = statistics.median(a for a, _ in series)
        yield (
            name,
            [f"{median:.3f} ({low:.3f}, {high:.3f})", f"{share:.3f}", f"{1000 * seconds:.0f} ms"],
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", type=Path, nargs="+", default=CONFIGS)
    parser.add_argument("--image-size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--of", choices=["blocks", "mask"], default="blocks")
    parser.add_argument("--train", action="store_true", help="measure forward and backward passes")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    header = ("config", "detector", "time (quartiles)", "of it blocks", "median", "memory")
    print("", *header, "", sep=" | ")
    print("", *["---"] * len(header), "", sep="|", flush=True)
    for config in args.config_file:
        cfg = load_config(config, args.opts)

        def measure(function: Callable[..., Any], *more: Any, cfg: CfgNode = cfg) -> Any:
            def run() -> Any:
                batch = make_batch(tuple(args.image_size), objects=10)
                return function(
                    lambda: build_detectors(cfg, args.of, args.train, batch), batch, *more
                )

            return in_new_process(run)

        for name, cells in table_rows(measure(time_rounds, args.rounds)):
            memory = f"{measure(peak_memory, name) / 2**20:.0f} MB"
            print("", config.stem, name, *cells, memory, "", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
