"""Print what each non-local block of a trained model does on a few images, as a table.

Residual ratio: |W_z y| / |x|, 0 for a block that does nothing. Entropy: 1 where a query looks at
everything alike, 0 where at one place. Query dependence: 0 where all queries look at the same
places, 1 where no two do. Means over the images; definitions in nl_detectron/analysis/health.py.

    nl-detectron health --config-file my.yaml --weights model_final.pth --input images/
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from nl_detectron_cli.arguments import add_config_file

if TYPE_CHECKING:
    from nl_detectron.analysis.health import BlockHealth


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_file(parser)
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (default: the config's)")
    parser.add_argument("--input", type=Path, required=True, help="image, or folder of images")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the model and print the table."""
    args = parse_args(argv)

    import numpy as np
    from tqdm import tqdm

    from nl_detectron.analysis.health import watch_health
    from nl_detectron.config import load_config
    from nl_detectron.engine.console import mistakes_in_one_sentence, quiet_detectron2
    from nl_detectron.engine.frames import Images, report_done
    from nl_detectron.engine.predictor import Predictor
    from nl_detectron.non_local import find_blocks

    with mistakes_in_one_sentence():
        images = Images(args.input)
        predictor = Predictor(load_config(args.config_file, args.opts), args.weights)
        blocks = find_blocks(predictor.model, "*")

    measured: dict[str, list[BlockHealth]] = defaultdict(list)
    watch = watch_health(predictor.model, lambda name, health: measured[name].append(health))
    with quiet_detectron2(), watch:
        for frame in tqdm(images, unit="image"):
            try:
                predictor(frame.image)
            except (OSError, ValueError) as error:
                images.skip(frame.name, error)
    report_done(args.input, len(images) - images.skipped, images.skipped)
    print("| block | residual ratio | entropy | query dependence |")
    print("|---|---:|---:|---:|")
    for name in blocks:
        # A block of a head has nothing to measure where nothing is detected.
        means = np.mean(measured[name], axis=0) if measured[name] else np.full(3, np.nan)
        print(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
