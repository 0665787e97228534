"""Find objects in images, a video or what a webcam sees; draw them, and write them as COCO results.

    python tools/predict.py --config-file output/config.yaml --weights output/model_final.pth \\
        --input images/ --output predictions/ --json predictions.json

An image_id in --json is the image's in --annotations; without them the file's name before the
suffix, as a number if it is one (139 for 000000000139.jpg, as in COCO); in videos the number of the
frame, from 0. A category_id is that of --annotations, or else of DATASETS.TEST; where neither is
known, the model's class counted from 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from tqdm import tqdm

from nl_detectron.coco_files import register_coco_files
from nl_detectron.config import load_config
from nl_detectron.data_sets import take_numbers
from nl_detectron.engine import build_predictor
from nl_detectron.frames import Images, Video, open_frames, report_done


def check_classes(cfg: CfgNode, metadata: Metadata) -> None:
    """Refuse names that are not those of the model's classes."""
    node = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    num_classes = cfg.MODEL[node].NUM_CLASSES
    names = metadata.get("thing_classes", ())
    if names and len(names) != num_classes:
        raise ValueError(
            f"the model has {num_classes} classes, but {metadata.name} has {len(names)}: give "
            "--annotations with the model's own, or DATASETS.TEST '()' to see numbers"
        )


def coco_results(found: Instances, image_id: int | str, metadata: Metadata) -> list[dict]:
    """Return objects in COCO's format; moves their keypoints, so it has to come last."""
    category_ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
    by_class = {class_id: category_id for category_id, class_id in category_ids.items()}
    results = instances_to_coco_json(found, image_id)
    for result in results:
        class_id = result["category_id"]
        result["category_id"] = by_class.get(class_id, class_id + 1)
    return results


def prepare(args: argparse.Namespace) -> tuple[DefaultPredictor, Metadata, Images | Video]:
    """Read and check all that the arguments name.

    Raises:
        ValueError, OSError: something of it cannot be used.
    """
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.score_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.score_threshold
    path = Path(args.input)
    folder = path if path.is_dir() else path.parent
    if args.output and args.output.resolve() == folder.resolve():
        raise ValueError(f"--output {args.output}: pictures there would replace what is read")

    known_ids = None
    if args.annotations:
        register_coco_files("own_test", args.annotations, str(folder))
        cfg.DATASETS.TEST = ("own_test",)
        take_numbers(cfg, "own_test")
        records = DatasetCatalog.get(*cfg.DATASETS.TEST)
        known_ids = {Path(record["file_name"]): record["image_id"] for record in records}
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
    check_classes(cfg, metadata)
    frames = open_frames(args.input, metadata, known_ids)
    for target in (args.output, args.json and args.json.parent):
        if target:
            target.mkdir(parents=True, exist_ok=True)
    return build_predictor(cfg, args.weights), metadata, frames


def main(argv: list[str] | None = None) -> None:
    """Predict, and stop early where the user does."""
    args = parse_args(argv)
    try:
        predictor, metadata, frames = prepare(args)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    done = 0
    results: list[dict] = []
    try:
        for frame in tqdm(frames, total=len(frames) or None, unit="image"):
            found = predictor(frame.image)["instances"].to("cpu")
            if args.output:
                frames.draw(frame, found, args.output)
            if args.json:
                results += coco_results(found, frame.image_id, metadata)
            done += 1
    except KeyboardInterrupt:
        print("stopped; what was done so far is kept")
    finally:
        frames.close()
    if args.json and done:
        args.json.write_text(json.dumps(results))
    report_done(args.input, done, frames.skipped)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="YAML config of the model")
    parser.add_argument("--weights", required=True, help="its checkpoint")
    parser.add_argument(
        "--input",
        required=True,
        help="an image, a folder of images, a video, or webcam or webcam:NUMBER, which Ctrl-C ends",
    )
    parser.add_argument(
        "--output", type=Path, help="folder for pictures named as the images, or a NAME.mp4"
    )
    parser.add_argument("--json", type=Path, help="file for the objects in COCO's results format")
    parser.add_argument(
        "--annotations", help="COCO json that knows the classes, and the ids of the images"
    )
    parser.add_argument(
        "--score-threshold", type=float, default=0.5, help="of what is shown and written"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    if not (args.output or args.json):
        parser.error("nothing to do: give --output, --json or both")
    if not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold must be within 0 and 1, got {args.score_threshold}")
    return args


if __name__ == "__main__":
    main()
