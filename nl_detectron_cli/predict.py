"""Find objects in images, a video or what a webcam sees; draw them, and write them as COCO results.

    nl-detectron predict --config-file output/config.yaml --weights output/model_final.pth \\
        --input images/ --output predictions/ --json predictions.json

Names and ids of classes are those that the model was trained with: its checkpoint has them, or else
--annotations does; where nothing is known, the model's classes are counted from 1. An image_id in
--json is the image's in --annotations; without them, and for other images, the file's name before
the suffix, as a number if it is one (139 for 000000000139.jpg, as in COCO); in videos the number of
the frame, from 0. Results are written image by image: Ctrl-C keeps what is done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from nl_detectron_cli.arguments import add_config_file

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from detectron2.data import Metadata


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_file(parser, "config.yaml of the training's OUTPUT_DIR, or a name in the model zoo")
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint")
    parser.add_argument(
        "--input",
        required=True,
        help="an image, a folder of images, a video, or webcam or webcam:NUMBER, which Ctrl-C ends",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for pictures named as the images, or for a NAME.mp4; for a video, also an "
        ".mp4 file",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="file for the objects in COCO's results format",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO json with the model's classes, and ids of images",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        help="of what is drawn and written (default: %(default)s)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(argv)
    if not (args.output or args.json):
        parser.error("nothing to do: give --output, --json or both")
    if not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold must be within 0 and 1, got {args.score_threshold}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Predict, and stop early where the user does."""
    args = parse_args(argv)

    from tqdm import tqdm

    from nl_detectron.config import load_config
    from nl_detectron.engine.coco.results import ResultsFile, painter
    from nl_detectron.engine.console import mistakes_in_one_sentence, quiet_detectron2
    from nl_detectron.engine.frames import Images, make_folder, open_frames, report_done
    from nl_detectron.engine.predictor import Predictor

    done, stopped = 0, False
    with contextlib.ExitStack() as files:
        files.enter_context(quiet_detectron2())
        with mistakes_in_one_sentence():
            cfg = load_config(args.config_file, args.opts)
            cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.score_threshold
            cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.score_threshold
            metadata, known_ids = read_metadata(cfg, args)
            frames = open_frames(args.input, args.output, known_ids)
            draw = painter(metadata, video=not isinstance(frames, Images))
            files.callback(frames.close)
            if args.json and isinstance(frames, Images):
                frames.check_ids()
            predictor = Predictor(cfg, args.weights)
            if args.json:
                make_folder(args.json.parent)
                results = files.enter_context(ResultsFile(args.json, metadata))
        # Until files are closed, the end that `kill` asks for is the one that Ctrl-C asks for.
        files.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for frame in tqdm(frames, total=len(frames) or None, unit="image"):
                try:
                    found = predictor(frame.image)["instances"].to("cpu")
                    if args.output:
                        frames.write(frame, draw(frame.image, found))
                except Exception as error:  # of one image among thousands, whatever it is
                    frames.skip(frame.name, error)
                    continue
                if args.json:
                    results.add(found, frame.image_id)
                done += 1
        except KeyboardInterrupt:
            stopped = True
    report_done(args.input, done, frames.skipped)
    if stopped and not frames.endless:
        raise SystemExit("stopped before the end; what was done is kept")


def read_metadata(cfg: CfgNode, args: argparse.Namespace) -> tuple[Metadata, dict[Path, int]]:
    """Names of the model's classes and keypoints, and the known ids of images."""
    from detectron2.data import MetadataCatalog

    from nl_detectron.engine.coco.data_sets import take_numbers
    from nl_detectron.engine.coco.files import register_coco_files
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
        take_numbers(cfg, "custom_test")
    images = json.loads(Path(args.annotations).read_bytes()).get("images", ())
    known_ids = {folder / image["file_name"]: image["id"] for image in images}
    return metadata if stored else named, known_ids
