"""Train networks to tell whether a video runs forward or in reverse, on real videos.

Every video is there twice, forward and reversed, with the same frames. Networks are tested on the
videos of one group, such as those of one person, after training on all others; every group is the
test set once. Networks that ignore the order of frames score both versions alike, so they are right
for half of the videos: that is checked, not assumed.

    cd projects/video_classification
    python forward_or_reversed.py --videos clips/ --groups groups.csv --output output/direction

The csv has a line for each video: its file name and its group.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path

from nl_detectron_cli.arguments import add_integer, command_parser
from nl_detectron_cli.threads import limit_thread_spinning

NETWORKS = ("I3D", "TSM", "NL-I3D", "C2D", "NL-spacetime")
CLASSES = ("forward", "reversed")
FRAMES, STRIDE, SHORT_SIDE = 8, 4, 48  # the middle of each video
# Larger than the networks of the demo, but still without pooling in time.
OPTIONS = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 16, "MODEL.RESNETS.OUT_FEATURES", ("res5",)),
    *("MODEL.VIDEO.NUM_BLOCKS", (2, 2, 2, 2), "MODEL.VIDEO.POOLING", "space"),
    *("MODEL.NON_LOCAL.AFTER_BLOCKS.RES3", (-2,), "MODEL.NON_LOCAL.AFTER_BLOCKS.RES4", (-2,)),
    *("INPUT.CLIP.NUM_FRAMES", FRAMES, "INPUT.RANDOM_FLIP", "horizontal"),
    *("INPUT.MIN_SIZE_TRAIN", (SHORT_SIDE, SHORT_SIDE), "INPUT.MIN_SIZE_TEST", SHORT_SIDE),
    *("SOLVER.BASE_LR", 0.01),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--videos", type=Path, required=True, help="folder")
    parser.add_argument("--groups", type=Path, required=True, help="csv file")
    parser.add_argument(
        "--output", type=Path, default=Path("output/direction"), help="folder for the results"
    )
    add_integer(parser, "--seeds", 3, "trainings of each network for each group")
    add_integer(parser, "--jobs", os.cpu_count() or 1, "trainings at a time, each in one thread")
    return parser.parse_args(argv)


def read_groups(file: Path, videos: Path) -> dict[str, list[Path]]:
    """Return the videos of each group.

    Raises:
        ValueError: a line is wrong, or there are fewer than two groups.
    """
    groups: dict[str, list[Path]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for number, row in enumerate(csv.reader(lines), start=1):
            if len(row) != 2 or not (videos / row[0]).is_file():
                raise ValueError(
                    f"{file}, line {number}: must be the name of a file in {videos} and its group, "
                    f"got {','.join(row)!r}"
                )
            groups.setdefault(row[1], []).append(videos / row[0])
    if len(groups) < 2:
        raise ValueError(f"{file} must have at least two groups, got {list(groups)}")
    return groups


def write_data_sets(groups: dict[str, list[Path]], folder: Path) -> None:
    """Write the data sets to test on each group, and to train on all others.

    Raises:
        ValueError: a video is too short, or cannot be decoded.
    """
    from video_classification.data import VideoReader, write_video
    from video_classification.data.transforms import resize

    span = (FRAMES - 1) * STRIDE + 1
    for group, videos in groups.items():
        for video in videos:
            reader = VideoReader(video)
            if reader.num_frames < span:
                raise ValueError(f"{video} has {reader.num_frames} frames, fewer than {span}")
            first = (reader.num_frames - span) // 2
            numbers = range(first, first + span, STRIDE)
            frames = reader.read(numbers, lambda image: resize(image, SHORT_SIDE))
            for name, version in zip(CLASSES, (frames, frames[::-1])):
                for tested in groups:
                    split = "test" if tested == group else "train"
                    file = folder / f"{tested}_{split}" / name / f"{video.stem}.mp4"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_video(file, version, fps=15, crf=0)  # lossless


def largest_difference(folder: Path, group: str) -> float:
    """Return how much the scores of the two versions of a video differ at most."""
    text = (folder / "inference" / f"{group}_test" / "results.json").read_text(encoding="utf-8")
    scores: dict[str, list[float]] = {}
    for video in json.loads(text)["predictions"]:
        forward = {guess["class"]: guess["score"] for guess in video["top5"]}[CLASSES[0]]
        scores.setdefault(Path(video["file_name"]).stem, []).append(forward)
    return max(abs(a - b) for a, b in scores.values())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    limit_thread_spinning()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from video_classification.demo.training import Run, run_all

    from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings

    with errors_without_traceback():
        groups = read_groups(args.groups, args.videos)
        write_data_sets(groups, args.output / "data")
    runs = [
        Run(group, network, seed, options=OPTIONS)
        for network in NETWORKS
        for group in groups
        for seed in range(args.seeds)
    ]
    results, differences = {}, {}
    with suppress_detectron2_warnings():
        for run, result in run_all(runs, args.output / "data", args.output, args.jobs):
            results[run] = result
            differences[run] = largest_difference(run.folder(args.output), run.task)
            print(f"[{len(results)}/{len(runs)}] {run}: {result}", flush=True)

    count = sum(len(videos) for videos in groups.values())
    print(f"\n{count} videos of {len(groups)} groups, {args.seeds} seeds, accuracy in percent:\n")
    print("| network | mean | lowest | highest | largest difference of scores |")
    print("|---|---:|---:|---:|---:|")
    for network in NETWORKS:
        means = [
            sum(results[run].accuracy * len(groups[run.task]) for run in mine) / count
            for seed in range(args.seeds)
            if (mine := [run for run in runs if (run.network, run.seed) == (network, seed)])
        ]
        difference = max(differences[run] for run in runs if run.network == network)
        print(
            f"| {network} | {sum(means) / len(means):.1f} | {min(means):.1f} | {max(means):.1f} | "
            f"{difference:.0e} |"
        )


if __name__ == "__main__":
    main()
