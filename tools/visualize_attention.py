"""Draw where a pixel, or a person's joint, looks through the non-local blocks of a trained model.

Every query gives two pictures, a heat map and the arrows of the paper's Figure 3, and the raw map
as .npz (weights, boxes of the keys in the image, query). A folder gives grid.png as well.

    python tools/visualize_attention.py --config-file my.yaml --weights model_final.pth \\
        --input image.jpg --query 320,240 --block res4.non_local4 --output attention
    python tools/visualize_attention.py --config-file my_keypoints.yaml --weights model_final.pth \\
        --input images/ --joint left_wrist --block 'keypoint_head.*' --output attention
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor

from nl_detectron.attention import (
    Recording,
    attention_map,
    find_blocks,
    record_attention,
    stride_of,
)
from nl_detectron.cells import AttentionMap, CellGrid
from nl_detectron.config import load_config
from nl_detectron.engine import build_predictor, network_input
from nl_detectron.frames import Frame, Images, report_done
from nl_detectron.pictures import draw_arrows, draw_heat_map, save_grid

GRID = 64  # pictures in grid.png, at most


class Visualizer:
    """Makes the pictures of one image after another."""

    def __init__(self, predictor: DefaultPredictor, args: argparse.Namespace):
        self.predictor, self.model, self.args = predictor, predictor.model, args
        self.pictures: list[Path] = []

    def __call__(self, frame: Frame) -> None:
        """Make the pictures of an image; ``ValueError`` where a query has no place in it."""
        size = frame.image.shape[:2]
        for x, y in self.args.query:
            if not (0 <= x < size[1] and 0 <= y < size[0]):
                raise ValueError(f"query {x},{y} is outside the image of {size[1]} x {size[0]}")
        inputs = network_input(self.predictor, frame.image)
        scale = np.array([size[1] / inputs["image"].shape[2], size[0] / inputs["image"].shape[1]])
        with torch.no_grad(), record_attention(self.model, *self.args.block) as recordings:
            boxes, joints = self.detect(inputs)
        boxes, joints = boxes * np.tile(scale, 2), joints * scale
        for recording in recordings.values():
            for label, x, y in self.points(joints):
                if recording.name.startswith("backbone."):
                    stride = stride_of(self.model.backbone, recording.block)
                    grid = CellGrid.of_stage(stride, size, inputs["image"].shape[1:])
                    attention, view = attention_map(recording, grid, size, x, y), None
                else:
                    roi = first_holding(boxes, x, y)
                    grid = CellGrid.of_roi(boxes[roi], recording.last_input.shape[2:])
                    attention = attention_map(recording, grid, size, x, y, sample=roi)
                    view = with_margin(boxes[roi], size)
                self.save(frame, recording, label, attention, view)

    def detect(self, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Run the model; boxes (R, 4) and joints (R, J, 2) of its detections, the best first."""
        if not hasattr(self.model, "roi_heads"):
            self.model([inputs])
            return np.zeros((0, 4)), np.zeros((0, 0, 2))
        # Before postprocessing, which drops detections: these are the RoIs of the heads.
        (found,) = self.model.inference([inputs], do_postprocess=False)
        boxes = found.pred_boxes.tensor.cpu().numpy()
        joints = found.pred_keypoints.cpu().numpy() if found.has("pred_keypoints") else boxes[:, :0]
        return boxes, joints.reshape(len(boxes), -1, 3)[..., :2]

    def points(self, joints: np.ndarray) -> Iterator[tuple[str, float, float]]:
        """Name and coordinates of what to look from."""
        for x, y in self.args.query:
            yield f"{x}_{y}", x + 0.5, y + 0.5
        for joint in self.args.joint:
            if not len(joints):
                raise ValueError("the model detects nothing in the image")
            yield (joint, *joints[0, self.joint_index(joint, joints.shape[1])].tolist())

    def joint_index(self, joint: str, number: int) -> int:
        """Index of a joint that is given by name or by index."""
        names = [str(i) for i in range(number)]
        for dataset in self.predictor.cfg.DATASETS.TEST[:1]:
            known = MetadataCatalog.get(dataset).get("keypoint_names", ())
            if len(known) == number:
                names = [*known, *names]
        if joint not in names:
            raise ValueError(f"no joint {joint!r}; the model has {', '.join(names) or 'none'}")
        return names.index(joint) % number

    def save(
        self,
        frame: Frame,
        recording: Recording,
        label: str,
        attention: AttentionMap,
        view: tuple[float, float, float, float] | None,
    ) -> None:
        """Write two pictures and the raw map, and say in a line what they show."""
        block = ".".join(recording.name.split(".")[-2:])
        stem = f"{self.args.output / Path(frame.name).stem}.{block}.{label}"
        for kind, draw in (("heat", draw_heat_map), ("arrows", draw_arrows)):
            file = Path(f"{stem}.{kind}.png")
            draw([frame.image[:, :, ::-1]], attention, view).savefig(file)
            self.pictures.append(file)
        np.savez(
            f"{stem}.npz",
            weights=attention.weights,
            boxes=attention.boxes,
            query=np.array(attention.query),
        )
        x, y, _, weight = attention.strongest(1)[0]
        padding = attention.weights[:, ~attention.in_image].sum()
        print(
            f"{frame.name}, {recording.name}: from {label} most to ({x:.0f}, {y:.0f}), weight "
            f"{weight:.3f} of {attention.weights.sum():.3f}, padding {padding:.3f}",
            flush=True,
        )


def first_holding(boxes: np.ndarray, x: float, y: float) -> int:
    """Index of the first box that the point is in."""
    holding = (boxes[:, :2] <= [x, y]).all(axis=1) & ([x, y] < boxes[:, 2:]).all(axis=1)
    if not holding.any():
        raise ValueError(f"query {x:.0f},{y:.0f} is in none of the {len(boxes)} detected boxes")
    return int(holding.argmax())


def with_margin(box: np.ndarray, image_size: Sequence[int]) -> tuple[float, float, float, float]:
    """The box and a tenth of its size around it, as far as the image goes."""
    x0, y0, x1, y1 = box.tolist()
    margin = 0.1 * max(x1 - x0, y1 - y0)
    height, width = image_size
    return (
        max(x0 - margin, 0),
        max(y0 - margin, 0),
        min(x1 + margin, width),
        min(y1 + margin, height),
    )


def point(text: str) -> tuple[int, int]:
    x, y = text.split(",")
    return int(x), int(y)


def main() -> None:
    """Parse the arguments and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", help="checkpoint; default: the config's")
    parser.add_argument("--input", type=Path, required=True, help="image, or folder of images")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--query", type=point, action="append", default=[], metavar="X,Y", help="a pixel"
    )
    parser.add_argument(
        "--joint", action="append", default=[], help="of the best detection, by name or index"
    )
    parser.add_argument(
        "--block",
        action="append",
        default=[],
        metavar="NAME",
        help="end of a block's name, * and ? allowed; default: all blocks",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    if not args.query and not args.joint:
        parser.error("give at least one --query or --joint")
    try:
        images = Images(args.input)
        predictor = build_predictor(load_config(args.config_file, args.opts), args.weights)
        find_blocks(predictor.model, *args.block)  # an unknown one is said before any image is read
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    visualizer = Visualizer(predictor, args)
    for frame in images:
        try:
            visualizer(frame)
        except (OSError, ValueError) as error:
            images.skip(frame.name, error)
    report_done(args.input, len(images) - images.skipped, images.skipped)
    if args.input.is_dir():
        pictures = visualizer.pictures[:GRID]
        columns = min(len(pictures), max(4, 2 * len(args.query + args.joint)))
        save_grid(args.output / "grid.png", pictures, columns)


if __name__ == "__main__":
    main()
