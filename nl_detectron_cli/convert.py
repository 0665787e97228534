"""Convert weights between this package, detectron2, and other libraries with ResNets or blocks.

Files are .pth, .pt, .pyth, .pkl or .safetensors. Settings that the weights do not determine, such
as the subsampling of a block, come from --config-file or from --block and --pooling. Put the
settings printed at the end into the config, or let --write-config do it for a network for video.

    nl-detectron convert resnet50.pth R-50.pkl --from torchvision --to detectron2
    nl-detectron convert I3D_8x8_R50.pyth i3d.pth --from pytorchvideo --to nl_detectron \\
        --write-config i3d.yaml
    nl-detectron convert i3d_nl.pth blocks.pth --from mmcv --to nl_detectron --dim 2 --blocks-only
    nl-detectron convert model_final.pth mmcv.pth --from nl_detectron --to mmcv \\
        --block subsample=2 subsample_position=after_conv
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

from nl_detectron_cli.arguments import add_config_file, command_parser

LIBRARIES = (
    *("nl_detectron", "detectron2", "mmcv", "mmaction2_tsm", "tsm", "pytorchvideo", "slowfast"),
    *("alexhex7", "timm", "torchvision", "caffe2"),
)
"""Names of ``nl_detectron.weights.DIALECTS``."""


def block_option(text: str) -> tuple[str, Any]:
    """Argparse type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments, without slow imports."""
    parser = command_parser(__doc__)
    parser.add_argument("input", help="checkpoint to read")
    parser.add_argument("output", help="checkpoint to write")
    parser.add_argument("--from", required=True, choices=LIBRARIES, dest="source")
    parser.add_argument("--to", required=True, choices=LIBRARIES, dest="target")
    parser.add_argument(
        "--dim",
        type=int,
        choices=(1, 2, 3),
        help="dimensions of the blocks: 2 for images, 3 for video",
    )
    parser.add_argument(
        "--blocks-only",
        action="store_true",
        help="leave out everything but the non-local blocks",
    )
    parser.add_argument(
        "--block",
        type=block_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of NonLocalBlock, applied to all blocks",
    )
    parser.add_argument(
        "--pooling",
        metavar="NAME",
        help="MODEL.VIDEO.POOLING of a network for video, where the weights do not show it",
    )
    config = parser.add_mutually_exclusive_group()
    add_config_file(
        parser,
        "YAML config that specifies the blocks, or its name in the model zoo; blocks missing from "
        "the weights are added, and a network for video must be that of the config",
        required=False,
        group=config,
    )
    config.add_argument(
        "--write-config",
        metavar="FILE",
        help="YAML config to write, which builds the network for video and loads the output",
    )
    parser.add_argument("--verbose", action="store_true", help="print every key")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Convert the file, and print the report."""
    args = parse_args(argv)

    from nl_detectron.config import load_config
    from nl_detectron.engine.console import errors_without_traceback
    from nl_detectron.safety.folders import check_output_file
    from nl_detectron.weights import DIALECTS, convert, load, report, save
    from nl_detectron.weights.config_model import ConfigModel
    from nl_detectron.weights.video_config import video_config

    with errors_without_traceback():
        if args.write_config:
            check_output_file(args.write_config)
        config = None
        if args.config_file:
            cfg = load_config(args.config_file, allow_remote=args.allow_remote)
            config = ConfigModel(cfg)
        pooling = args.pooling or (config.pooling if config else None)

        def options(name: str) -> dict[str, Any]:
            return {**(config.options(name) if config else {}), **dict(args.block)}

        state, other_entries = load(args.input)
        result = convert(
            state, args.source, args.target, options, args.dim, args.blocks_only, pooling
        )
        result.dropped |= dict.fromkeys(other_entries, "not part of the state dict")
        if args.pooling and not result.video:
            raise ValueError(f"--pooling: {args.input} is not a whole network for video")
        if config and args.target == "nl_detectron":
            config.add_missing_blocks(result)
            if result.video:
                config.check_video(result, args.source)
        if args.write_config and args.target != "nl_detectron":
            raise ValueError(f"--write-config is for --to nl_detectron, not {args.target}")
        if args.write_config:
            text = video_config(result, args.source, args.input, args.output)
        save(result.state, args.output, DIALECTS[args.target])
        if args.write_config:
            Path(args.write_config).write_text(text, encoding="utf-8")
    for line in report(result, args.source, args.target, args.verbose):
        print(line)
