"""Print what each non-local block of a trained model does on a few images or videos, as a table.

Residual ratio: |W_z y| / |x|, 0 for a block that does nothing. Entropy: 1 if a query attends to all
positions equally, 0 if it attends to one. Query dependence: 0 if all queries attend to the same
positions, 1 if no two do. Means over the images, or over a clip in the middle of each video;
defined in nl_detectron/analysis/health.py.

    nl-detectron health --config-file my.yaml --weights model_final.pth --input images/
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import TYPE_CHECKING

from nl_detectron_cli.arguments import add_model_and_images, add_opts, command_parser

if TYPE_CHECKING:
    from nl_detectron.analysis.health import BlockHealth


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = command_parser(__doc__)
    add_model_and_images(parser)
    add_opts(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the model and print the table."""
    args = parse_args(argv)

    import numpy as np
    import torch
    from tqdm import tqdm

    from nl_detectron.analysis.health import watch_health
    from nl_detectron.config import load_config
    from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings
    from nl_detectron.engine.frames import print_summary
    from nl_detectron.engine.predictor import build_predictor
    from nl_detectron.non_local import find_blocks

    with errors_without_traceback():
        cfg = load_config(args.config_file, args.opts, allow_remote=args.allow_remote)
        predictor = build_predictor(cfg, args.weights)
        blocks = find_blocks(predictor.model, "*")
        inputs = predictor.open(args.input)

    measured: dict[str, list[BlockHealth]] = defaultdict(list)
    watch = watch_health(predictor.model, lambda name, health: measured[name].append(health))
    with suppress_detectron2_warnings(), watch, torch.no_grad():
        for file in tqdm(inputs, unit=inputs.kind):
            try:
                predictor.model([predictor.sample(file).inputs])
            except (OSError, ValueError) as error:
                inputs.skip(file.name, error)
    print_summary(args.input, len(inputs) - inputs.skipped, inputs.skipped, inputs.kind)
    print("| block | residual ratio | entropy | query dependence |")
    print("|---|---:|---:|---:|")
    for name in blocks:
        # Blocks of a head do not run if nothing is detected.
        means = np.mean(measured[name], axis=0) if measured[name] else np.full(3, np.nan)
        print(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
