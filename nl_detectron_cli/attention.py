"""Draw the attention of a pixel, or of a keypoint, in the non-local blocks of a trained model.

The model is a detector, or one of a project, such as video_classification.

Every query yields two figures for a paper, a heat map and arrows like those of the paper's Figure
3, and the raw map as .npz (weights, boxes of the keys in the image, query). With several queries,
blocks or images, grid.png shows them side by side.

Colors are on a logarithmic scale. The heat map is interpolated on that scale between the centers of
the keys, unless --cells is given. Arrows go to the strongest keys until they hold 90% of the
weight, at most 20; the larger a key's share, the wider and more opaque its arrow.

A model for videos sees the clip around the query's --frame. Frames are counted from 0, in the video
as it is on disk, and drawn side by side, one for each of the positions that the block's map has in
time, or for five of them. Their weights are drawn on it.

    nl-detectron attention --config-file my.yaml --weights model_final.pth \\
        --input image.jpg --query 320,240 --block res4.non_local4 --output attention
    nl-detectron attention --config-file my_keypoints.yaml --weights model_final.pth \\
        --input images/ --joint left_wrist --block 'keypoint_head.*' --output attention
    DETECTRON2_ENV_MODULE=video_classification.env nl-detectron attention \\
        --config-file i3d_R_50_NL5_32x2.yaml --weights i3d.pth --input clip.mp4 \\
        --query 320,240 --frame 30 --frames 10,50 --output attention
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nl_detectron_cli.arguments import (
    add_fast,
    add_model_and_images,
    add_opts,
    add_score_threshold,
    at_least,
    command_parser,
)

if TYPE_CHECKING:
    from nl_detectron.analysis.queries import QueryResult
    from nl_detectron.engine.predictor import Sample

MAX_PAIRS = 12  # in grid.png


def point(text: str) -> tuple[int, int]:
    """Argparse type: X,Y."""
    x, comma, y = text.partition(",")
    if not (comma and x.isdecimal() and y.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"must be X,Y, two non-negative integers such as 320,240, got {text!r}"
        )
    return int(x), int(y)


def frame_numbers(text: str) -> list[int]:
    """Argparse type: N,N,..."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"must be non-negative integers with commas, such as 0,16,32, got {text!r}"
        )
    return [int(part) for part in parts]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = command_parser(__doc__)
    add_model_and_images(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    parser.add_argument(
        "--query",
        type=point,
        action="append",
        default=[],
        metavar="X,Y",
        help="pixel to query; repeatable",
    )
    parser.add_argument(
        "--frame",
        type=at_least(0),
        metavar="N",
        help="frame of the video to query (default: in the middle)",
    )
    parser.add_argument(
        "--frames",
        type=frame_numbers,
        default=[],
        metavar="N,...",
        help="frames to draw besides the query's, out of those that the model sees (default: up to "
        "five, evenly spread)",
    )
    parser.add_argument(
        "--joint",
        action="append",
        default=[],
        help="keypoint of the best detection to query, by name or 0-based index; repeatable",
    )
    parser.add_argument(
        "--block",
        action="append",
        default=[],
        metavar="NAME",
        help="end of a block's name, may contain * and ?; repeatable (default: all blocks)",
    )
    add_score_threshold(
        parser,
        "minimum score of a detection, to take joints from it, or to query the keypoint head in it",
    )
    add_fast(parser)
    parser.add_argument(
        "--cells", action="store_true", help="draw one rectangle per key, without interpolation"
    )
    add_opts(parser)
    arguments: list[str] = []
    for argument in sys.argv[1:] if argv is None else argv:
        if arguments and arguments[-1] == "--query":  # argparse would parse -5,20 as an option
            arguments[-1] += f"={argument}"
        else:
            arguments.append(argument)
    args = parser.parse_args(arguments)
    if not args.query and not args.joint:
        parser.error("give at least one --query or --joint")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw the figures."""
    args = parse_args(argv)

    from tqdm import tqdm

    from nl_detectron.analysis.drawing.figures import save_image_grid
    from nl_detectron.analysis.queries import QuerySpec, joint_indices, query_attention
    from nl_detectron.config import load_config
    from nl_detectron.engine.coco.metadata import model_metadata
    from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings
    from nl_detectron.engine.frames import make_output_folder, print_summary
    from nl_detectron.engine.predictor import build_predictor
    from nl_detectron.non_local import find_blocks
    from nl_detectron.safety.folders import check_output_folder

    with errors_without_traceback():
        check_output_folder(args.output)
        cfg = load_config(args.config_file, args.opts, allow_remote=args.allow_remote)
        metadata = model_metadata(cfg, args.weights)
        joints = joint_indices(args.joint, cfg, metadata)
        queries = QuerySpec(args.query, joints, args.block, args.score_threshold)
        predictor = build_predictor(cfg, args.weights, args.fast)
        find_blocks(predictor.model, *(args.block or "*"))  # raises for unknown blocks
        inputs = predictor.open(args.input)
        if inputs.kind != "video" and (args.frame is not None or args.frames):
            raise ValueError(
                "--frame and --frames are for models of videos; MODEL.META_ARCHITECTURE "
                f"{cfg.MODEL.META_ARCHITECTURE} takes images"
            )
        make_output_folder(args.output)
    options = {} if args.frame is None else {"frame": args.frame}

    files: list[Path] = []
    with suppress_detectron2_warnings():
        for file in tqdm(inputs, unit=inputs.kind):
            try:
                sample = predictor.sample(file, **options)
                for result in query_attention(queries, predictor, metadata, sample):
                    stem = args.output / inputs.stem(file)
                    files += save_figures(result, sample, stem, args.frames, args.cells)
                    tqdm.write(f"{file.name}, {result.block}: from {result.query} {result.summary}")
            except (OSError, ValueError) as error:
                inputs.skip(file.name, error)
    print_summary(args.input, len(inputs) - inputs.skipped, inputs.skipped, inputs.kind)
    shown = files[: 2 * MAX_PAIRS]
    if len(shown) > 2:
        columns = 2 if inputs.kind == "video" else grid_columns(len(shown))
        save_image_grid(args.output / "grid.png", shown, columns)
        print(f"{args.output / 'grid.png'} shows {len(shown)} of {len(files)} figures")


def grid_columns(figures: int) -> int:
    """Return the number of columns, 2, 4 or 6, that leaves no cell of the grid empty."""
    return max(n for n in (2, 4, 6) if figures % n == 0)


def save_figures(
    result: QueryResult, sample: Sample, stem: Path, frames: list[int], cells: bool
) -> list[Path]:
    """Write the two figures of a query and the raw map; return the figures' files."""
    import numpy as np

    from nl_detectron.analysis.drawing.canvas import FigureData
    from nl_detectron.analysis.drawing.figures import draw_arrows, draw_heat_map
    from nl_detectron.analysis.drawing.strip import choose_frames

    block = ".".join(result.block.split(".")[-2:])
    clip, attention = sample.clip or [0], result.attention
    positions = len(attention.weights)
    chosen = choose_frames(positions, result.stride, clip, sample.frame, frames)
    title = f"{block}, {result.title}\n{sample.title}"
    if result.stride > 1:
        title += f"; each key covers {result.stride} of them"
    data = FigureData(
        sample.pictures([*chosen.values()]),
        attention.select([*chosen]),
        title,
        result.detection,
        result.crop,
        [f"frame {clip[i]}" for i in chosen.values()],
    )
    figures = {"heat": draw_heat_map(data, smooth=not cells), "arrows": draw_arrows(data)}
    files = [Path(f"{stem}.{block}.{result.query}.{kind}.png") for kind in figures]
    for file, figure in zip(files, figures.values()):
        figure.savefig(file)
    arrays: dict[str, Any] = {"weights": attention.weights, "boxes": attention.boxes}
    if sample.clip:
        arrays["frames"] = clip
        arrays["positions"] = np.minimum(np.arange(len(clip)) // result.stride, positions - 1)
    query = np.array(attention.query)
    np.savez(f"{stem}.{block}.{result.query}.npz", **arrays, query=query)
    return files
