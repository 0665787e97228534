"""Export a trained detector, or its backbone, as a program that runs without this package.

    nl-detectron export --config-file output/config.yaml --weights output/model_final.pth \\
        --input image.jpg --output model.pt2
    nl-detectron export --config-file output/config.yaml --weights output/model_final.pth \\
        --input image.jpg --output backbone.onnx --format onnx --part backbone

Format torch is torch.export's (.pt2), for images of all sizes; torchscript (.ts) is traced by
detectron2's adapter; onnx (.onnx) is for backbones only. Programs normalize and pad the pixels. A
detector takes one image (3, H, W), as float32 in the order of INPUT.FORMAT, resized as for the
network; a backbone takes images (N, 3, H, W). A detector returns the fields of detectron2's
Instances before post-processing, by name: pred_boxes at the size of the input, scores, pred_classes
and, of models that have them, pred_masks (R, 1, 28, 28), pred_keypoints, pred_keypoint_heatmaps.
Traced programs return a tuple in the order that is stored in the file as outputs.json. To load a
detector, import torchvision first.

The file is compared with the model at three sizes, and is only kept if it agrees.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from nl_detectron_cli.arguments import add_config_file, add_fast, add_opts, command_parser

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "torchscript": ".ts"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = command_parser(__doc__)
    add_config_file(parser, "config.yaml in the training's OUTPUT_DIR, or a name in the model zoo")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint")
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="IMAGE",
        help="image with objects to compare the file with the model on",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the file to write"
    )
    parser.add_argument("--format", choices=SUFFIXES, default="torch", help="default: %(default)s")
    parser.add_argument(
        "--part", choices=("model", "backbone"), default="model", help="default: %(default)s"
    )
    add_fast(parser)
    add_opts(parser)
    args = parser.parse_args(argv)
    if args.output.suffix != SUFFIXES[args.format]:
        parser.error(
            f"--output must end in {SUFFIXES[args.format]} with --format {args.format}, got "
            f"{args.output}"
        )
    if args.format == "onnx" and args.part == "model":
        parser.error("--format onnx exports backbones only: add --part backbone")
    if args.format != "torchscript" and args.fast == "bf16":
        parser.error(f"--fast=bf16 is for --format torchscript, got {args.format}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Export, compare, and only then give the file its name."""
    args = parse_args(argv)

    from nl_detectron.config import load_config
    from nl_detectron.engine.coco.data_sets import check_is_detector
    from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings
    from nl_detectron.engine.export import PROGRAMS, check, load, save
    from nl_detectron.engine.frames import make_output_folder
    from nl_detectron.engine.predictor import Predictor
    from nl_detectron.safety.folders import check_output_file

    with errors_without_traceback(), suppress_detectron2_warnings():
        cfg = load_config(args.config_file, args.opts, allow_remote=args.allow_remote)
        check_is_detector(cfg)
        check_output_file(args.output)
        frame = next(iter(Predictor.open(args.input)), None)
        if frame is None:
            raise ValueError(f"--input {args.input} has no image that can be read")
        predictor = Predictor(cfg, args.weights, args.fast)
        image = predictor.network_input(frame.image)["image"].to(predictor.model.device)
        program = PROGRAMS[args.part](predictor.model)
        make_output_folder(args.output.parent)
        with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
            unchecked = Path(folder, args.output.name)
            save(program, unchecked, args.format, image)
            for line in check(program, load(unchecked, args.format), args.format, image):
                print(line, flush=True)
            unchecked.replace(args.output)
    print(f"wrote {args.output}")
