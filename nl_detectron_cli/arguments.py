"""Arguments that commands share. The standard library alone, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a type of argument."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {text}")
        return int(text)

    return parse


def config_file(text: str) -> str:
    """A type of argument: the path of a config, or its name in the model zoo. Returns the path.

    A mistake ends the program as one in the config does: with one sentence.
    """
    # Run by itself: importing it would import nl_detectron, and with it torch and detectron2.
    zoo = Path(__file__).resolve().parents[1] / "nl_detectron" / "model_zoo" / "files.py"
    try:
        return runpy.run_path(str(zoo))["find_config_file"](text)
    except ValueError as error:
        raise SystemExit(f"--config-file {error}") from None


def add_config_file(
    parser: argparse.ArgumentParser,
    help: str = "YAML config, or its name in the model zoo",
    *,
    required: bool = True,
) -> None:
    """Add ``--config-file``, the only place that says what it takes."""
    parser.add_argument(
        "--config-file", type=config_file, required=required, metavar="FILE", help=help
    )


class Renamed(argparse.Action):
    """An option of an earlier version, refused with its new name, ``const``."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Refuse it."""
        parser.error(f"{self.option_strings[0]} is now called {self.const}")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of detectron2's train_net, and ours."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_file(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    processes = parser.add_mutually_exclusive_group()
    processes.add_argument(
        "--num-gpus",
        type=at_least(1),
        default=1,
        metavar="N",
        help="GPUs on each machine (default: %(default)s)",
    )
    processes.add_argument(
        "--num-processes", type=at_least(1), metavar="N", help="the same where there is no GPU"
    )
    parser.add_argument(
        "--num-machines", type=at_least(1), default=1, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--machine-rank",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of this machine (default: %(default)s)",
    )
    # A port for each user, as in detectron2: a second run of the same user says that it is taken.
    port = 2**15 + 2**14 + hash(os.getuid() if hasattr(os, "getuid") else 1) % 2**14
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        help="where processes meet; on one machine, auto finds a free port (default: %(default)s)",
    )
    for split in ("train", "test"):
        parser.add_argument(f"--{split}-json", help=f"custom COCO annotations to {split} on")
        parser.add_argument(f"--{split}-images", help=f"the image folder of --{split}-json")
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PREFIX",
        help="a part of the model to start from scratch, such as roi_heads.box_predictor; all else "
        "but non-local blocks must be in the checkpoint; may be given several times",
    )
    parser.add_argument(
        "--may-lack", action=Renamed, const="--allow-missing", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--allow-partial",
        action="append_const",
        dest="allow_missing",
        const="",
        help="accept a checkpoint that lacks anything",
    )
    parser.add_argument(
        "--strip-blocks",
        action="store_true",
        help="leave out the non-local blocks of the checkpoint, which is refused otherwise where "
        "the model has no place for them",
    )
    parser.add_argument(
        "--scale-lr",
        action="store_true",
        help="scale learning rate, iterations and periods linearly from the batch size of the "
        "config to that of SOLVER.IMS_PER_BATCH on the command line; keys given there stay",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config keys and values, such as SOLVER.BASE_LR 0.01"
    )
    return parser


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say about loading a checkpoint, for a ``StrictCheckpointer``."""
    options = {"allow_missing": args.allow_missing, "strip_blocks": args.strip_blocks}
    return {**options, "complete": args.eval_only}
