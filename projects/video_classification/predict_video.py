"""Classify videos: a file, a folder, parts of long videos, or a webcam.

Each video is classified as in the evaluation, on the views of TEST.VIEWS. With --window, each part
of so many seconds is, as if it were a video. Names of the classes come from the checkpoint, or else
from --classes.

    cd projects/video_classification
    python predict_video.py --config-file output/config.yaml --weights output/model_final.pth \\
        --input videos/ --output pictures/ --json predictions.json --features features.npz
    python predict_video.py --config-file output/config.yaml --weights output/model_final.pth \\
        --input film.mp4 --window 4 --step 2 --output films/ --json predictions.json

--output receives a picture of each video's frames and scores (.png), or with --window the video
with the scores of its windows (.mp4).
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nl_detectron_cli.arguments import add_config_file, add_opts, command_parser

if TYPE_CHECKING:
    import numpy as np
    from detectron2.config import CfgNode
    from video_classification.predictor import VideoPredictor
    from video_classification.results import Results, Top


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text!r}")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_config_file(parser, "config.yaml in the training's OUTPUT_DIR, or another YAML config")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint")
    parser.add_argument(
        "--input", required=True, help="video, folder of videos, or webcam[:N], which Ctrl-C ends"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for pictures or videos")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the top classes")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="write what the linear layer gets from each view, or on average from those of each "
        "window (.npz)",
    )
    parser.add_argument(
        "--window", type=seconds, metavar="SECONDS", help="classify windows of this length"
    )
    parser.add_argument(
        "--step",
        type=seconds,
        metavar="SECONDS",
        help="from one window to the next (default: --window)",
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of the classes, one on each line"
    )
    add_opts(parser)
    args = parser.parse_args(argv)
    if args.step and not args.window:
        parser.error("--step needs --window")
    if is_webcam(args.input) and (not args.window or args.output):
        parser.error("a webcam needs --window, and has no --output: its classes are printed")
    if args.features and args.features.suffix != ".npz":
        parser.error(f"--features must end with .npz, got {args.features}")
    return args


def is_webcam(source: str) -> bool:
    return source.partition(":")[0] == "webcam"


def class_names(cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    from video_classification.data.annotations import read_classes

    from nl_detectron.engine.checkpoint import stored_metadata

    number = cfg.MODEL.VIDEO.HEAD.NUM_CLASSES
    stored = stored_metadata(args.weights).get("classes")
    names = read_classes(args.classes) if args.classes else stored
    if names and len(names) != number:
        raise ValueError(
            f"{args.classes or args.weights} has {len(names)} names of classes, but "
            f"MODEL.VIDEO.HEAD.NUM_CLASSES is {number}"
        )
    return names or [f"class {k}" for k in range(number)]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from tqdm import tqdm
    from video_classification.config import default_video_config
    from video_classification.predictor import VideoPredictor
    from video_classification.results import Results
    from video_classification.windows import camera_frames

    from nl_detectron.config import load_config
    from nl_detectron.engine.console import errors_without_traceback
    from nl_detectron.engine.frames import Video, Videos, make_output_folder, print_summary
    from nl_detectron.safety.folders import check_output_file, check_output_folder

    with errors_without_traceback():
        remote = args.allow_remote
        cfg = load_config(args.config_file, args.opts, default_video_config, allow_remote=remote)
        names = class_names(cfg, args)
        videos = Video(args.input) if is_webcam(args.input) else Videos(Path(args.input))
        source = Path(args.input)
        folder = source if source.is_dir() else source.parent
        if args.window and args.output and args.output.resolve() == folder.resolve():
            raise ValueError(f"--output {args.output} would overwrite the input")
        for folder in (args.output, *(file.parent for file in (args.json, args.features) if file)):
            if folder:
                make_output_folder(folder)
        for file in (args.json, args.features):
            if file:
                check_output_file(file)
        if args.output:
            check_output_folder(args.output)
        predictor = VideoPredictor(cfg, args.weights)
    done, stopped = 0, False
    with Results(names, args.json, args.features) as results, stop_on_sigterm():
        try:
            if isinstance(videos, Video):
                classify_windows(predictor, results, args, args.input, camera_frames(videos))
            else:
                for file in tqdm(videos, unit="video"):
                    try:
                        classify_file(predictor, results, args, file, videos.stem(file))
                        done += 1
                    except (OSError, ValueError) as error:
                        results.add_error(str(file), error)
                        videos.skip(file.name, error)
        except KeyboardInterrupt:
            stopped = True
    if isinstance(videos, Videos):
        if stopped:
            raise SystemExit(f"stopped after {done} videos; the results so far are kept")
        print_summary(args.input, done, videos.skipped, "video")


def classify_file(
    predictor: VideoPredictor, results: Results, args: argparse.Namespace, file: Path, stem: str
) -> None:
    import numpy as np
    from video_classification.data import VideoReader, iter_frames, write_video
    from video_classification.drawing import draw_strip, overlay

    video = VideoReader(file)
    if args.window:
        windows = classify_windows(predictor, results, args, str(file), iter_frames(file))
        if args.output:
            drawn = overlay(iter_frames(file), windows)
            write_video(args.output / f"{stem}.mp4", drawn, video.fps)
        return
    found = predictor(file)
    top = results.add(str(file), found)
    show(file.name, top)
    if args.output:
        seen = np.unique(found.frames)
        shown = seen[np.linspace(0, len(seen) - 1, 4).round().astype(int)]
        title = f"{file.name}, {video.times[-1]:.1f} s, views: {len(found.features)}"
        figure = draw_strip(list(video.read(shown)), video.times[shown], top, title)
        figure.savefig(args.output / f"{stem}.png")


def classify_windows(
    predictor: VideoPredictor,
    results: Results,
    args: argparse.Namespace,
    name: str,
    frames: Iterator[tuple[float, np.ndarray]],
) -> list[tuple[float, float, Top]]:
    windows = []
    for start, end, found in predictor.windows(frames, args.window, args.step or args.window):
        top = results.add(name, found, (start, end))
        windows.append((start, end, top))
        show(f"{Path(name).name}, {start:.1f} to {end:.1f} s", top)
    return windows


def show(where: str, top: Top) -> None:
    from tqdm import tqdm

    tqdm.write(f"{where}: " + ", ".join(f"{name} {score:.1%}" for name, score in top))


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that results are written."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
