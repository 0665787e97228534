"""Draw the attention of a pixel, or of a keypoint, in the non-local blocks of a trained model.

Every query yields two figures for a paper, a heat map and arrows like those of the paper's Figure
3, and the raw map as .npz (weights, boxes of the keys in the image, query). With several queries,
blocks or images, grid.png shows them side by side.

Colors are on a logarithmic scale. The heat map is interpolated on that scale between the centers of
the keys, unless --cells is given. Arrows go to the strongest keys until they hold 90% of the
weight, at most 20; the larger a key's share, the wider and more opaque its arrow.

    nl-detectron attention --config-file my.yaml --weights model_final.pth \\
        --input image.jpg --query 320,240 --block res4.non_local4 --output attention
    nl-detectron attention --config-file my_keypoints.yaml --weights model_final.pth \\
        --input images/ --joint left_wrist --block 'keypoint_head.*' --output attention
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nl_detectron_cli.arguments import (
    add_model_and_images,
    add_opts,
    add_score_threshold,
    command_parser,
)

if TYPE_CHECKING:
    from nl_detectron.analysis.queries import QueryResult
    from nl_detectron.engine.frames import Frame

MAX_PAIRS = 12  # in grid.png


def point(text: str) -> tuple[int, int]:
    """Argparse type: X,Y."""
    x, comma, y = text.partition(",")
    if not (comma and x.isdecimal() and y.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"must be X,Y, two non-negative integers such as 320,240, got {text!r}"
        )
    return int(x), int(y)


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
    from nl_detectron.engine.frames import Images, make_output_folder, print_summary
    from nl_detectron.engine.predictor import Predictor
    from nl_detectron.non_local import find_blocks

    with errors_without_traceback():
        cfg = load_config(args.config_file, args.opts)
        metadata = model_metadata(cfg, args.weights)
        joints = joint_indices(args.joint, cfg, metadata)
        queries = QuerySpec(args.query, joints, args.block, args.score_threshold)
        images = Images(args.input)
        make_output_folder(args.output)
        predictor = Predictor(cfg, args.weights)
        find_blocks(predictor.model, *(args.block or "*"))  # raises for unknown blocks

    files: list[Path] = []
    with suppress_detectron2_warnings():
        for frame in tqdm(images, unit="image"):
            try:
                for result in query_attention(queries, predictor, metadata, frame.image):
                    files += save_figures(
                        result, frame, args.output / images.stem(frame), args.cells
                    )
                    tqdm.write(
                        f"{frame.name}, {result.block}: from {result.query} {result.summary}"
                    )
            except (OSError, ValueError) as error:
                images.skip(frame.name, error)
    print_summary(args.input, len(images) - images.skipped, images.skipped)
    shown = files[: 2 * MAX_PAIRS]
    if len(shown) > 2:
        save_image_grid(args.output / "grid.png", shown, grid_columns(len(shown)))
        print(f"{args.output / 'grid.png'} shows {len(shown)} of {len(files)} figures")


def grid_columns(figures: int) -> int:
    """Return the number of columns, 2, 4 or 6, that leaves no cell of the grid empty."""
    return max(n for n in (2, 4, 6) if figures % n == 0)


def save_figures(result: QueryResult, frame: Frame, stem: Path, cells: bool) -> list[Path]:
    """Write the two figures of a query and the raw map; return the figures' files."""
    import numpy as np

    from nl_detectron.analysis.drawing.canvas import FigureData
    from nl_detectron.analysis.drawing.figures import draw_arrows, draw_heat_map

    block = ".".join(result.block.split(".")[-2:])
    title = f"{block}, {result.title}\n{frame.name}"
    data = FigureData(
        [frame.image[:, :, ::-1]], result.attention, title, result.detection, result.crop
    )
    figures = {"heat": draw_heat_map(data, smooth=not cells), "arrows": draw_arrows(data)}
    files = [Path(f"{stem}.{block}.{result.query}.{kind}.png") for kind in figures]
    for file, figure in zip(files, figures.values()):
        figure.savefig(file)
    np.savez(
        f"{stem}.{block}.{result.query}.npz",
        weights=result.attention.weights,
        boxes=result.attention.boxes,
        query=np.array(result.attention.query),
    )
    return files
