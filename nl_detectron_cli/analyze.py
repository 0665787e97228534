"""Print what non-local blocks add to the parameters, computation and memory of a model.

Every config is compared with the same config without blocks. With --config-file, each block is
listed as well. Networks are built on the meta device, so nothing is computed or downloaded. GMAC is
what detectron2 and fvcore print as GFLOPs: a multiply-add counts as one. (Their own counters miss
fused attention; nl_detectron.analysis.cost has handles for it.)

    nl-detectron analyze
    nl-detectron analyze --config-file COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml \\
        --batch-size 2 MODEL.NON_LOCAL.PAIRWISE dot_product
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nl_detectron_cli.arguments import (
    add_allow_remote,
    add_integer,
    add_opts,
    at_least,
    command_parser,
    config_file,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments, without slow imports."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--config-file",
        type=config_file,
        action="append",
        metavar="FILE",
        help="YAML config, or its name in the model zoo; repeatable, to compare with the first "
        "(default: the model zoo without quick_schedules)",
    )
    add_allow_remote(parser)
    parser.add_argument(
        "--image-size",
        type=at_least(1),
        nargs=2,
        default=(800, 1333),
        metavar=("H", "W"),
        help="input size before padding (default: 800 1333)",
    )
    parser.add_argument(
        "--clip-size",
        type=at_least(1),
        nargs=3,
        default=(32, 224, 224),
        metavar=("T", "H", "W"),
        help="input size of networks for video (default: 32 224 224)",
    )
    add_integer(parser, "--proposals", 1000, "number of RoIs of the box head")
    add_integer(parser, "--detections", 100, "number of RoIs of the other heads")
    add_integer(parser, "--batch-size", 1, "images or clips per batch, for the cost of each block")
    add_opts(parser)
    return parser.parse_args(argv)


def full_configs() -> list[str]:
    """Return the YAML configs of the model zoo, without the quick schedules."""
    from nl_detectron.model_zoo import get_config_file, names

    wanted = (name for name in names() if name.startswith("COCO-") and name.endswith(".yaml"))
    return [get_config_file(name) for name in wanted]


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    args = parse_args(argv)

    from nl_detectron.analysis.detector_cost import (
        Workload,
        block_rows,
        build_meta_model,
        model_rows,
    )
    from nl_detectron.config import load_config
    from nl_detectron.engine.console import errors_without_traceback
    from nl_detectron.engine.predictor import model_errors

    paths = args.config_file or full_configs()
    with errors_without_traceback(), model_errors():
        configs = [
            (Path(path).stem, load_config(path, args.opts, allow_remote=args.allow_remote))
            for path in paths
        ]
        for _, cfg in configs:
            build_meta_model(cfg)
    image_size, clip_size = tuple(args.image_size), tuple(args.clip_size)
    workload = Workload(image_size, args.proposals, args.detections, clip_size)
    named = configs if args.config_file else []
    for line in model_rows(configs, workload, relative=len(named) > 1):
        print(line, flush=True)
    for name, cfg in named:
        print(f"\n{name}: ", end="")
        for line in block_rows(cfg, workload, args.batch_size):
            print(line, flush=True)
