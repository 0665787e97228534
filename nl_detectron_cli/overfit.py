"""Test whether a model can overfit a few images of a data set.

Selects the first images of a COCO json that have objects (for keypoint models: with labelled
keypoints), trains on them like `nl-detectron train`, and evaluates on the same images. A correct
setup reaches a high AP; one with wrong labels, boxes or weights does not.

    nl-detectron overfit \\
        --config-file quick_schedules/mask_rcnn_R_18_NL_FPN_overfit.yaml \\
        --json datasets/coco/annotations/instances_train2017.json \\
        --images datasets/coco/train2017 OUTPUT_DIR output/overfit
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from nl_detectron_cli import train
from nl_detectron_cli.arguments import add_config_file, add_integer, add_opts, command_parser


def first_images(data: dict[str, Any], count: int, max_objects: int) -> dict[str, Any]:
    """Select the first images of a COCO data set with 1 to ``max_objects`` labelled objects."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not data.get(key):
            raise ValueError(f"the file has no {key}")
    keypoints = any("keypoints" in category for category in data["categories"])
    objects = Counter(a["image_id"] for a in data["annotations"])
    unusable = {a["image_id"] for a in data["annotations"] if a.get("iscrowd")}
    if keypoints:
        unusable |= {a["image_id"] for a in data["annotations"] if not a.get("num_keypoints")}
    usable = [
        image
        for image in data["images"]
        if 1 <= objects[image["id"]] <= max_objects and image["id"] not in unusable
    ]
    if len(usable) < count:
        raise ValueError(
            f"--count must be at most {len(usable)}, the number of images with 1 to {max_objects} "
            f"objects, got {count}"
        )
    chosen = {image["id"] for image in usable[:count]}
    annotations = [a for a in data["annotations"] if a["image_id"] in chosen]
    return {**data, "images": usable[:count], "annotations": annotations}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = command_parser(__doc__)
    add_config_file(parser)
    parser.add_argument("--json", type=Path, required=True, help="COCO annotations")
    parser.add_argument("--images", required=True, help="image folder of --json")
    add_integer(parser, "--count", 8, "number of images")
    add_integer(parser, "--max-objects", 10, "skip images with more objects")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    add_opts(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the subset, and train on it."""
    args = parse_args(argv)
    try:
        subset = first_images(json.loads(args.json.read_bytes()), args.count, args.max_objects)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--json {args.json}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subset.json"
        path.write_text(json.dumps(subset))
        flags = {"--resume": args.resume, "--allow-remote": args.allow_remote}
        arguments = ["--config-file", args.config_file, *[flag for flag in flags if flags[flag]]]
        for split in ("train", "test"):
            arguments += [f"--{split}-json", str(path), f"--{split}-images", args.images]
        train.main(arguments + args.opts)
