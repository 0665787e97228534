"""Convert weights between this package, detectron2, and other libraries with ResNets or blocks.

Files are .pth, .pt, .pyth, .pkl or .safetensors. What weights do not tell of a block, such as its
subsampling, comes from --config-file or --block. What is printed at the end belongs in the config.

    python tools/convert_weights.py resnet50.pth R-50.pkl --from torchvision --to detectron2
    python tools/convert_weights.py i3d_nl.pth blocks.pth --from mmcv --to nl_detectron --dim 2
    python tools/convert_weights.py model_final.pth mmcv.pth --from nl_detectron --to mmcv \\
        --block subsample=2 subsample_position=after_conv
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from typing import Any

from detectron2.modeling import build_model

from nl_detectron import NonLocalBlock
from nl_detectron.config import backbone_options, keypoint_head_options, load_config
from nl_detectron.weights import DIALECTS, OPTIONS, Block, Conversion, convert, load, save


class Detector:
    """The blocks of a config: what they compute, and their initial weights."""

    def __init__(self, config_file: str):
        """Build the model of the config."""
        self.cfg = load_config(config_file, ["MODEL.DEVICE", "cpu"])
        modules = build_model(self.cfg).named_modules()
        self.blocks = {name: m for name, m in modules if isinstance(m, NonLocalBlock)}

    def options(self, name: str) -> dict[str, Any]:
        """Return the arguments of a block; its name may lack what is before the ResNet."""
        if not any(f".{full_name}".endswith(f".{name}") for full_name in self.blocks):
            raise ValueError(f"the config has no such block; it has {sorted(self.blocks)}")
        options = backbone_options(self.cfg)
        if "keypoint_head" in name:
            options = keypoint_head_options(self.cfg)["block_options"]
        return {k: v for k, v in options.items() if k in OPTIONS}  # those that change the function

    def add_missing_blocks(self, result: Conversion) -> None:
        """Add the blocks that the weights lack, as they are when new: the identity."""
        whole = any(key.startswith("backbone.") for key in result.state)
        for name, block in self.blocks.items():
            if not whole:
                name = re.sub(r"^backbone\.(bottom_up\.)?", "", name)
            if not any(key.startswith(f"{name}.") for key in result.state):
                for parameter, tensor in block.state_dict().items():
                    result.put(f"{name}.{parameter}", tensor, None, "of a new block")


def report(result: Conversion, source: str, target: str, verbose: bool) -> Iterator[str]:
    """Yield lines that account for every key, and what a config must say."""
    yield f"{len(result.mapped)} tensors converted"
    if verbose:
        yield from (f"  {old} -> {new}" for old, new in result.mapped.items())
    for what, entries in (("left out", result.dropped), ("added", result.added)):
        for reason in dict.fromkeys(entries.values()):
            keys = [key for key, why in entries.items() if why == reason]
            shown = keys if verbose else keys[:4]
            yield f"{len(keys)} {what}: {reason}"
            yield f"  {', '.join(shown)}{', ...' if len(keys) > len(shown) else ''}"
    if DIALECTS[target].block:
        yield from describe_blocks(result, target)
    note = DIALECTS[source].note or DIALECTS[target].note
    of_blocks = {key for block in result.blocks.values() for key in block.sources.values()}
    if note and set(result.mapped) - of_blocks:
        library = source if DIALECTS[source].note else target
        yield f"What {library} trains its ResNets with: {note}."


def describe_blocks(result: Conversion, target: str) -> Iterator[str]:
    """Yield what MODEL.NON_LOCAL is for these blocks; blocks that are alike are told once."""
    alike: dict[str, list[str]] = {}
    for name, block in result.blocks.items():
        alike.setdefault("\n".join(_describe(block, target)), []).append(name)
    for text, names in alike.items():
        of_these = ", ".join(filter(None, names)) or "the block"
        if target == "nl_detectron":
            yield f"MODEL.NON_LOCAL must be, for {of_these}:"
        else:
            yield f"What {of_these} computes in {target}, in the words of MODEL.NON_LOCAL:"
        yield text
    if target == "nl_detectron":
        places = re.findall(r"\b(res\d)\.non_local(\d+)", " ".join(result.blocks))
        for stage in sorted({stage for stage, _ in places}):
            indices = tuple(sorted(int(i) for other, i in places if other == stage))
            yield f"  AFTER_BLOCKS.{stage.upper()} {indices}"


def _describe(block: Block, target: str) -> Iterator[str]:
    for option in ("pairwise", "reduction", "scale", "subsample", "subsample_position", "norm"):
        if option in block.assumed:
            yield f"  {option.upper()} {block.options[option]}, taken for granted: make sure of it"
        elif block.matters(option):
            value = block.options.get(option, "as in the source: the weights do not tell")
            yield f"  {option.upper()} {value or repr(value)}"
    if target == "nl_detectron" and block.options["dim"] != 2:
        yield f"  the kernels are {block.options['dim']}-D; a detector needs them with --dim 2"
    for change in block.changes:
        yield f"  for the same result, {change}"


def block_option(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main() -> None:
    """Convert the file, and print the account."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input")
    parser.add_argument("output")
    for direction in ("from", "to"):
        parser.add_argument(f"--{direction}", required=True, choices=DIALECTS, dest=f"{direction}_")
    parser.add_argument("--dim", type=int, choices=(1, 2, 3), help="axes: 2 images, 3 video")
    parser.add_argument(
        "--block",
        type=block_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of NonLocalBlock, for all blocks",
    )
    parser.add_argument(
        "--config-file",
        help="a YAML config of ours: says what its blocks compute; blocks of it that the weights "
        "lack are added",
    )
    parser.add_argument("--verbose", action="store_true", help="print every key")
    args = parser.parse_args()

    try:
        detector = Detector(args.config_file) if args.config_file else None

        def options(name: str) -> dict[str, Any]:
            return {**(detector.options(name) if detector else {}), **dict(args.block)}

        state, beside = load(args.input)
        result = convert(state, args.from_, args.to_, options, args.dim)
        result.dropped |= dict.fromkeys(beside, "beside the weights in the file")
        if detector and args.to_ == "nl_detectron":
            detector.add_missing_blocks(result)
        save(result.state, args.output, DIALECTS[args.to_])
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise SystemExit(f"convert_weights: {error}") from error
    for line in report(result, args.from_, args.to_, args.verbose):
        print(line)


if __name__ == "__main__":
    main()
