"""Find what is wrong with data in COCO's format, before a training does.

Checks the annotations, and the header and ending of every image file. Prints each kind of problem
with its number and its first examples; exits with code 1 if there are errors. `nl-detectron train`
does the same within a limited time, and takes what this command has found as long as the files are
the same. With --config-file, the data are checked for what its model needs, such as masks; without
--train-json or --test-json, they are those of the config.

    nl-detectron check-data --train-json train.json --train-images train/ \\
        --test-json val.json --test-images val/ --treat box-outside=warning
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nl_detectron_cli.arguments import add_coco_data, add_config_file, add_opts, command_parser

if TYPE_CHECKING:
    from nl_detectron.engine.coco.checking import Source


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments, without slow imports."""
    parser = command_parser(__doc__)
    add_config_file(parser, required=False)
    add_coco_data(parser)
    parser.add_argument(
        "--time-limit",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="time for the image files of each data set; 0: no limit (default: %(default)g)",
    )
    parser.add_argument("--kinds", action="store_true", help="print all kinds of problems, only")
    add_opts(parser, ", with --config-file")
    args = parser.parse_args(argv)
    if not (args.kinds or args.config_file or args.train_json or args.test_json):
        parser.error("give --train-json, --test-json or --config-file")
    if args.opts and not args.config_file:
        parser.error(f"{args.opts[0]} needs --config-file")
    return args


def data_sets(args: argparse.Namespace) -> list[Source]:
    """Return the data sets to check."""
    from nl_detectron.config import load_config
    from nl_detectron.engine.coco import data_sets
    from nl_detectron.engine.coco.checking import Source

    if args.config_file:
        cfg = load_config(args.config_file, args.opts, allow_remote=args.allow_remote)
        args.eval_only = bool(args.test_json and not args.train_json)
        data_sets.register_custom_data(cfg, args)
        data_sets.validate_data_sets(cfg, not args.eval_only, {})
        data_sets.check_proposals(cfg, not args.eval_only)
        return data_sets.sources(cfg, not args.eval_only)
    sources = []
    for split, keys in (("train", ()), ("test", ("area", "iscrowd"))):
        json_file, image_dir = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if (json_file is None) != (image_dir is None):
            raise ValueError(f"--{split}-json and --{split}-images must be given together")
        if json_file:
            sources.append(Source(json_file, image_dir, (split,), keys))
    return sources


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)

    from nl_detectron.engine.coco.checking import check_sources
    from nl_detectron.engine.coco.findings import KINDS, parse_treat
    from nl_detectron.engine.console import errors_without_traceback

    if args.kinds:
        for name, kind in KINDS.items():
            print(f"{name:20} {kind.severity:8} {kind.meaning}{' (always)' * kind.fixed}")
        return
    with errors_without_traceback():
        treat = parse_treat(args.treat)
        found = check_sources(data_sets(args), args.time_limit)
    errors = 0
    for findings in found:
        for line in findings.lines(treat):
            print(line)
        errors += sum(findings.counts[kind] for kind in findings.of_severity("error", treat))
    if errors:
        raise SystemExit(f"{errors} errors")
