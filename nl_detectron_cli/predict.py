"""Detect objects in images, videos or a webcam; draw them, and write them in COCO's format.

    nl-detectron predict --config-file output/config.yaml --weights output/model_final.pth \\
        --input images/ --output predictions/ --json predictions.json

Names and ids of classes come from the checkpoint, or else from --annotations; otherwise classes are
numbered from 1. The image_id in --json comes from --annotations; for other images it is the file
name without its suffix, as a number if it is one (139 for 000000000139.jpg, as in COCO), and for
videos the number of the frame, from 0. Results are written after every image, so Ctrl-C keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nl_detectron_cli.arguments import (
    add_config_file,
    add_fast,
    add_opts,
    add_score_threshold,
    command_parser,
)

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from detectron2.data import Metadata


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = command_parser(__doc__)
    add_config_file(parser, "config.yaml in the training's OUTPUT_DIR, or a name in the model zoo")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint")
    parser.add_argument(
        "--input",
        required=True,
        help="image, folder of images, video, or webcam[:NUMBER], which Ctrl-C ends",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the drawn images or video, which keep their names; for a video, also an "
        ".mp4 file",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the detections to this file, in COCO's results format",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO json with the model's classes and the image ids",
    )
    add_score_threshold(parser, "minimum score of a detection")
    add_fast(parser)
    add_opts(parser)
    args = parser.parse_args(argv)
    if not (args.output or args.json):
        parser.error("nothing to do: give --output, --json or both")
    return args


def main(argv: list[str] | None = None) -> None:
    """Predict until the input ends or the user stops."""
    args = parse_args(argv)

    from tqdm import tqdm

    from nl_detectron.config import load_config
    from nl_detectron.engine.coco.data_sets import check_is_detector
    from nl_detectron.engine.coco.results import ResultsFile, build_visualizer
    from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings
    from nl_detectron.engine.frames import Images, make_output_folder, open_frames, print_summary
    from nl_detectron.engine.predictor import Predictor

    done, stopped = 0, False
    with contextlib.ExitStack() as files:
        files.enter_context(suppress_detectron2_warnings())
        with errors_without_traceback():
            cfg = load_config(args.config_file, args.opts, allow_remote=args.allow_remote)
            check_is_detector(cfg)
            cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.score_threshold
            cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.score_threshold
            metadata, image_ids = read_metadata(cfg, args)
            frames = open_frames(args.input, args.output, image_ids)
            draw = build_visualizer(metadata, video=not isinstance(frames, Images))
            files.callback(frames.close)
            if args.json and isinstance(frames, Images):
                frames.check_ids()
            predictor = Predictor(cfg, args.weights, args.fast)
            if args.json:
                make_output_folder(args.json.parent)
                results = files.enter_context(ResultsFile(args.json, metadata))
        previous = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def stop(*_: Any) -> None:
            nonlocal stopped
            stopped = True  # after this image; a second signal is not held back
            for number, handler in previous.items():
                signal.signal(number, handler)

        for number, handler in previous.items():
            files.callback(signal.signal, number, handler)
            signal.signal(number, stop)
        for frame in tqdm(frames, total=len(frames) or None, unit="image"):
            try:
                found = predictor(frame.image)["instances"].to("cpu")
                if args.output:
                    frames.write(frame, draw(frame.image, found))
            except Exception as error:  # do not stop for one image among thousands
                frames.skip(frame.name, error)
            else:
                if args.json:
                    results.add(found, frame.image_id)
                done += 1
            if stopped:
                break
    print_summary(args.input, done, frames.skipped)
    if stopped and not frames.endless:
        raise SystemExit("stopped before the end; the results so far are kept")


def read_metadata(cfg: CfgNode, args: argparse.Namespace) -> tuple[Metadata, dict[Path, int]]:
    """Return the metadata of the model's classes and keypoints, and the known image ids."""
    from detectron2.data import MetadataCatalog

    from nl_detectron.engine.coco.annotations import check_images
    from nl_detectron.engine.coco.data_sets import set_num_classes
    from nl_detectron.engine.coco.files import read_coco_json, register_coco_files
    from nl_detectron.engine.coco.findings import Findings
    from nl_detectron.engine.coco.metadata import check_names, model_metadata, stored_metadata

    metadata = model_metadata(cfg, args.weights)
    if not args.annotations:
        return metadata, {}
    path = Path(args.input)
    folder = path if path.is_dir() else path.parent
    register_coco_files("custom_test", args.annotations, str(folder))
    named = MetadataCatalog.get("custom_test")
    stored = stored_metadata(args.weights)
    if stored:
        check_names(cfg, named, f"--annotations {args.annotations}", stored)
    else:
        set_num_classes(cfg, "custom_test")
    findings = Findings(f"--annotations {args.annotations}")
    images = check_images(read_coco_json(args.annotations).get("images", []), findings)
    if findings.examples.keys() & {"missing-key", "image-record"}:
        raise ValueError(findings.sentence(findings.examples))
    image_ids = {folder / image["file_name"]: image["id"] for image in images}
    return metadata if stored else named, image_ids
