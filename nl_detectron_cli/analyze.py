"""Print what non-local blocks add to the parameters, the computation and the memory of a model.

Every config is compared with the same config without the blocks; for a config that is named, each
block is listed as well. Networks are built on the meta device, so nothing is computed or
downloaded. GMAC is what detectron2 and fvcore print as GFLOPs: a multiply and an add count as one.
(Their own counters miss fused attention: nl_detectron.analysis.cost has handles.)

    nl-detectron analyze
    nl-detectron analyze --config-file COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml \\
        --batch-size 2 MODEL.NON_LOCAL.PAIRWISE dot_product
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nl_detectron_cli.arguments import add_config_file, at_least


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, without importing what takes seconds to import."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_file(parser, "default: all of the model zoo but the short ones", required=False)
    parser.add_argument(
        "--image-size",
        type=at_least(1),
        nargs=2,
        default=(800, 1333),
        metavar=("H", "W"),
        help="before padding (default: 800 1333)",
    )
    parser.add_argument(
        "--proposals",
        type=at_least(1),
        default=1000,
        help="RoIs of the box head (default: %(default)s)",
    )
    parser.add_argument(
        "--detections",
        type=at_least(1),
        default=100,
        help="RoIs of the other heads (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=1,
        help="images, for the cost of each block (default: %(default)s)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser.parse_args(argv)


def full_configs() -> list[str]:
    """Return the YAML configs of the model zoo, without those for a quick try."""
    from nl_detectron.model_zoo import get_config_file, names

    wanted = (name for name in names() if name.startswith("COCO-") and name.endswith(".yaml"))
    return [get_config_file(name) for name in wanted]


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    args = parse_args(argv)

    from nl_detectron.analysis.detector_cost import Load, block_rows, build, model_rows
    from nl_detectron.config import load_config
    from nl_detectron.engine.console import mistakes_in_one_sentence
    from nl_detectron.engine.predictor import model_errors

    paths = [args.config_file] if args.config_file else full_configs()
    with mistakes_in_one_sentence(), model_errors():
        configs = [(Path(path).stem, load_config(path, args.opts)) for path in paths]
        for _, cfg in configs:
            build(cfg)
    load = Load(tuple(args.image_size), args.proposals, args.detections)
    for line in model_rows(configs, load):
        print(line, flush=True)
    if args.config_file:
        print()
        for line in block_rows(configs[0][1], load, args.batch_size):
            print(line, flush=True)
