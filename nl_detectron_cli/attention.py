"""Draw where a pixel, or a person's joint, looks through the non-local blocks of a trained model.

Every query gives two figures for a paper, a heat map and the arrows of the paper's Figure 3, and
the raw map as .npz (weights, boxes of the keys in the image, query). Where there are several
queries, blocks or images, grid.png shows them side by side.

Colours are on a logarithmic scale. The heat map interpolates places on that scale between the
centres of the keys (--cells does not); arrows go to the strongest keys until these hold 90% of the
weight, to 20 at most, and are the wider and the more opaque the larger a key's share is.

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

from nl_detectron_cli.arguments import add_config_file

if TYPE_CHECKING:
    from nl_detectron.analysis.queries import Answer
    from nl_detectron.engine.frames import Frame

GRID = 12  # pairs of pictures in grid.png, at most


def point(text: str) -> tuple[int, int]:
    """Parse X,Y."""
    x, comma, y = text.partition(",")
    if not (comma and x.isdecimal() and y.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no X,Y, two whole numbers from 0 such as 320,240"
        )
    return int(x), int(y)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_file(parser)
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (default: the config's)")
    parser.add_argument("--input", type=Path, required=True, help="image, or folder of images")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--query",
        type=point,
        action="append",
        default=[],
        metavar="X,Y",
        help="a pixel to look from; may be given several times",
    )
    parser.add_argument(
        "--joint",
        action="append",
        default=[],
        help="a joint of the best detection to look from, by name or by index from 0; likewise",
    )
    parser.add_argument(
        "--block",
        action="append",
        default=[],
        metavar="NAME",
        help="end of a block's name, * and ? allowed; likewise (default: all blocks)",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        help="of the detections that joints are taken from, and that a query for a block of the "
        "keypoint head must be in (default: %(default)s)",
    )
    parser.add_argument(
        "--cells", action="store_true", help="heat map: one rectangle per key, no interpolation"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if words and words[-1] == "--query":  # argparse would take -5,20 for an option
            words[-1] += f"={word}"
        else:
            words.append(word)
    args = parser.parse_args(words)
    if not args.query and not args.joint:
        parser.error("give at least one --query or --joint")
    if not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold must be within 0 and 1, got {args.score_threshold}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw."""
    args = parse_args(argv)

    from tqdm import tqdm

    from nl_detectron.analysis.drawing.figures import save_grid
    from nl_detectron.analysis.queries import Queries, answer, joint_indices
    from nl_detectron.config import load_config
    from nl_detectron.engine.coco.metadata import model_metadata
    from nl_detectron.engine.console import mistakes_in_one_sentence, quiet_detectron2
    from nl_detectron.engine.frames import Images, make_folder, report_done
    from nl_detectron.engine.predictor import Predictor
    from nl_detectron.non_local import find_blocks

    with mistakes_in_one_sentence():
        cfg = load_config(args.config_file, args.opts)
        metadata = model_metadata(cfg, args.weights)
        joints = joint_indices(args.joint, cfg, metadata)
        queries = Queries(args.query, joints, args.block, args.score_threshold)
        images = Images(args.input)
        make_folder(args.output)
        predictor = Predictor(cfg, args.weights)
        find_blocks(predictor.model, *(args.block or "*"))  # refuses unknown ones now

    pictures: list[Path] = []
    with quiet_detectron2():
        for frame in tqdm(images, unit="image"):
            try:
                for found in answer(queries, predictor, metadata, frame.image):
                    pictures += save(found, frame, args.output / images.stem(frame), args.cells)
                    tqdm.write(f"{frame.name}, {found.block}: from {found.query} {found.in_words}")
            except (OSError, ValueError) as error:
                images.skip(frame.name, error)
    report_done(args.input, len(images) - images.skipped, images.skipped)
    shown = pictures[: 2 * GRID]
    if len(shown) > 2:
        save_grid(args.output / "grid.png", shown, columns(len(shown)))
        print(f"{args.output / 'grid.png'} shows {len(shown)} of {len(pictures)} pictures")


def columns(pictures: int) -> int:
    """Columns of a grid of pairs of pictures, up to three pairs, that leave no place empty."""
    return max(n for n in (2, 4, 6) if pictures % n == 0)


def save(found: Answer, frame: Frame, stem: Path, cells: bool) -> list[Path]:
    """Write the two pictures of a query, which are returned, and the raw map."""
    import numpy as np

    from nl_detectron.analysis.drawing.canvas import Subject
    from nl_detectron.analysis.drawing.figures import draw_arrows, draw_heat_map

    block = ".".join(found.block.split(".")[-2:])
    title = f"{block}, {found.title}\n{frame.name}"
    subject = Subject(
        [frame.image[:, :, ::-1]], found.attention, title, found.detection, found.view
    )
    figures = {"heat": draw_heat_map(subject, smooth=not cells), "arrows": draw_arrows(subject)}
    files = [Path(f"{stem}.{block}.{found.query}.{kind}.png") for kind in figures]
    for file, figure in zip(files, figures.values()):
        figure.savefig(file)
    np.savez(
        f"{stem}.{block}.{found.query}.npz",
        weights=found.attention.weights,
        boxes=found.attention.boxes,
        query=np.array(found.attention.query),
    )
    return files
