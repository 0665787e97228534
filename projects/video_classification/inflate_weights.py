"""Make weights to start a network for video from those of a network for images.

The result holds the ResNet alone and goes into MODEL.WEIGHTS; blocks and the head start anew.

    cd projects/video_classification
    python inflate_weights.py --input resnet50.pth --from torchvision --output init.pth \\
        --config-file configs/Kinetics/i3d_R_50_NL5_32x2.yaml
"""

from __future__ import annotations

import argparse

from nl_detectron_cli.arguments import add_config_file, add_opts, command_parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--input", required=True, help="checkpoint of the network for images")
    parser.add_argument("--output", required=True, help="checkpoint to write, .pth")
    libraries = ("torchvision", "timm", "detectron2", "caffe2", "nl_detectron")
    parser.add_argument("--from", required=True, choices=libraries, dest="source")
    add_config_file(parser)
    add_opts(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from detectron2.modeling import build_backbone
    from video_classification.config import default_video_config
    from video_classification.models import load_image_weights

    from nl_detectron.config import load_config, without_blocks
    from nl_detectron.engine.console import errors_without_traceback
    from nl_detectron.engine.predictor import model_errors
    from nl_detectron.weights import DIALECTS, save

    with errors_without_traceback(), model_errors():
        remote = args.allow_remote
        cfg = load_config(args.config_file, args.opts, default_video_config, allow_remote=remote)
        backbone = build_backbone(without_blocks(cfg))
        load_image_weights(backbone, args.input, args.source)
        state = backbone.state_dict()
        save(state, args.output, DIALECTS["nl_detectron"])
    settings = DIALECTS[args.source].trained_with()
    print(f"{args.output}: {len(state)} tensors" + (f"; train with {settings}" if settings else ""))


if __name__ == "__main__":
    main()
