"""Convert weights between this package, detectron2, and other libraries with ResNets or blocks.

Files are .pth, .pt, .pyth, .pkl or .safetensors. What weights do not tell of a block, such as its
subsampling, comes from --config-file or --block. What is printed at the end belongs in the config.

    nl-detectron convert resnet50.pth R-50.pkl --from torchvision --to detectron2
    nl-detectron convert i3d_nl.pth blocks.pth --from mmcv --to nl_detectron --dim 2
    nl-detectron convert model_final.pth mmcv.pth --from nl_detectron --to mmcv \\
        --block subsample=2 subsample_position=after_conv
"""

from __future__ import annotations

import argparse
import ast
from typing import Any

from nl_detectron_cli.arguments import add_config_file

LIBRARIES = (
    *("nl_detectron", "detectron2", "mmcv", "pytorchvideo", "slowfast", "alexhex7", "timm"),
    *("torchvision", "caffe2"),
)
"""Names of ``nl_detectron.weights.DIALECTS``."""


def block_option(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, without importing what takes seconds to import."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="checkpoint to read")
    parser.add_argument("output", help="checkpoint to write")
    parser.add_argument("--from", required=True, choices=LIBRARIES, dest="source")
    parser.add_argument("--to", required=True, choices=LIBRARIES, dest="target")
    parser.add_argument("--dim", type=int, choices=(1, 2, 3), help="axes: 2 images, 3 video")
    parser.add_argument(
        "--block",
        type=block_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of NonLocalBlock, for all blocks",
    )
    add_config_file(
        parser,
        "a YAML config of ours, or its name in the model zoo: says what its blocks compute; blocks "
        "of it that the weights lack are added",
        required=False,
    )
    parser.add_argument("--verbose", action="store_true", help="print every key")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Convert the file, and print the account."""
    args = parse_args(argv)

    from nl_detectron.engine.console import mistakes_in_one_sentence
    from nl_detectron.weights import DIALECTS, convert, load, report, save
    from nl_detectron.weights.config_blocks import ConfigBlocks

    with mistakes_in_one_sentence():
        config = ConfigBlocks(args.config_file) if args.config_file else None

        def options(name: str) -> dict[str, Any]:
            return {**(config.options(name) if config else {}), **dict(args.block)}

        state, other_entries = load(args.input)
        result = convert(state, args.source, args.target, options, args.dim)
        result.dropped |= dict.fromkeys(other_entries, "not part of the state dict")
        if config and args.target == "nl_detectron":
            config.add_missing_blocks(result)
        save(result.state, args.output, DIALECTS[args.target])
    for line in report(result, args.source, args.target, args.verbose):
        print(line)
