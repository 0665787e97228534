"""Arguments that commands share; imports only the standard library, to keep ``--help`` fast."""

from __future__ import annotations

import argparse
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nl_detectron.engine.options import RunOptions


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer of at least ``minimum``."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {text}")
        return int(text)

    return parse


def add_integer(
    parser: argparse._ActionsContainer, option: str, default: int, help: str, minimum: int = 1
) -> None:
    """Add an integer option of at least ``minimum``."""
    parser.add_argument(
        option,
        type=at_least(minimum),
        default=default,
        metavar="N",
        help=f"{help} (default: %(default)s)",
    )


def config_file(text: str) -> str:
    """Argparse type: the path of a config, or its name in the model zoo. Returns the path.

    Invalid values end the program with a one-line message and exit code 1, as invalid configs do.
    """
    # Run the file, because importing it would import nl_detectron, and thus torch and detectron2.
    zoo = Path(__file__).resolve().parents[1] / "nl_detectron" / "model_zoo" / "files.py"
    try:
        return runpy.run_path(str(zoo))["find_config_file"](text)
    except ValueError as error:
        raise SystemExit(f"--config-file {error}") from None


def command_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that prints the description as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config_file(
    parser: argparse.ArgumentParser,
    help: str = "YAML config, or its name in the model zoo",
    *,
    required: bool = True,
    group: argparse._ActionsContainer | None = None,
) -> None:
    """Add ``--config-file``, to ``group`` if it is given, and ``--allow-remote``."""
    (group or parser).add_argument(
        "--config-file", type=config_file, required=required, metavar="FILE", help=help
    )
    add_allow_remote(parser)


def add_allow_remote(parser: argparse._ActionsContainer) -> None:
    """Add ``--allow-remote``."""
    parser.add_argument(
        "--allow-remote", action="store_true", help="download bases of the config that are URLs"
    )


def add_opts(parser: argparse.ArgumentParser, example: str = "") -> None:
    """Add the config overrides, which come last on the command line."""
    parser.add_argument("opts", nargs=argparse.REMAINDER, help=f"config keys and values{example}")


def add_model_and_images(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that run a trained model on images."""
    add_config_file(parser)
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (default: MODEL.WEIGHTS)")
    parser.add_argument("--input", type=Path, required=True, help="image, video, or folder of them")


def add_fast(parser: argparse._ActionsContainer, note: str = "") -> None:
    """Add ``--fast``."""
    parser.add_argument(
        "--fast",
        nargs="?",
        const="fp32",
        type=precision,
        metavar="fp32|bf16",
        help="optimize the model for inference: results are the same up to rounding; with bf16, "
        f"for hardware that has it, also compute in half precision{note} (default: fp32, if given)",
    )


def add_score_threshold(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--score-threshold``."""
    parser.add_argument(
        "--score-threshold",
        type=probability,
        default=0.5,
        metavar="SCORE",
        help=f"{help} (default: %(default)s)",
    )


def probability(text: str) -> float:
    """Argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def precision(text: str) -> str:
    """Argparse type: fp32 or bf16."""
    if text not in ("fp32", "bf16"):
        raise argparse.ArgumentTypeError(
            f"must be fp32 or bf16, got {text}; before config keys, write --fast=fp32"
        )
    return text


class RenamedOption(argparse.Action):
    """Rejects an option of an earlier version, and prints its new name, ``const``."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Exit with an error."""
        parser.error(f"{self.option_strings[0]} is now called {self.const}")


def add_coco_data(parser: argparse.ArgumentParser) -> None:
    """Add the custom COCO files to train and test on."""
    for split in ("train", "test"):
        parser.add_argument(f"--{split}-json", help=f"custom COCO annotations to {split} on")
        parser.add_argument(f"--{split}-images", help=f"image folder of --{split}-json")
    parser.add_argument(
        "--treat",
        action="append",
        default=[],
        metavar="KIND=SEVERITY",
        help="treat a kind of problem with the data as error, warning or off, such as "
        "box-outside=warning; `nl-detectron check-data --kinds` lists them; repeatable",
    )


def training_parser(
    description: str, add_data: Callable[[argparse.ArgumentParser], None] = add_coco_data
) -> argparse.ArgumentParser:
    """Return a parser with the arguments of detectron2's train_net, and our own.

    Args:
        description: what the command does.
        add_data: adds the arguments that name custom data sets; other tasks have others.
    """
    parser = command_parser(description)
    add_config_file(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate only")
    processes = parser.add_mutually_exclusive_group()
    add_integer(processes, "--num-gpus", 1, "number of GPUs per machine")
    processes.add_argument(
        "--num-processes", type=at_least(1), metavar="N", help="number of CPU processes per machine"
    )
    add_integer(parser, "--num-machines", 1, "number of machines")
    add_integer(parser, "--machine-rank", 0, "rank of this machine, from 0", minimum=0)
    # One port per user, as in detectron2: a second run of the same user fails, as it is taken.
    port = 2**15 + 2**14 + hash(os.getuid() if hasattr(os, "getuid") else 1) % 2**14
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        help="URL to initialize processes; auto finds a free port (default: %(default)s)",
    )
    add_data(parser)
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PREFIX",
        help="parameters to train from scratch, such as roi_heads.box_predictor; all others "
        "except non-local blocks must be in the checkpoint; repeatable",
    )
    parser.add_argument(
        "--may-lack", action=RenamedOption, const="--allow-missing", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--allow-partial",
        action="append_const",
        dest="allow_missing",
        const="",
        help="accept any missing parameters",
    )
    parser.add_argument(
        "--strip-blocks",
        action="store_true",
        help="drop the checkpoint's non-local blocks; otherwise a checkpoint with blocks that the "
        "model does not have is refused",
    )
    parser.add_argument(
        "--scale-lr",
        action="store_true",
        help="scale learning rate, iterations and periods linearly from the config's batch size "
        "to the SOLVER.IMS_PER_BATCH on the command line; other keys given there are kept",
    )
    add_integer(parser, "--keep-last", 0, "periodic checkpoints to keep; 0: all", minimum=0)
    parser.add_argument(
        "--keep-best",
        default="",
        metavar="METRIC",
        help="also keep the checkpoint that is best by this metric, such as bbox/AP",
    )
    add_integer(
        parser,
        "--max-nonfinite",
        10,
        "iterations with a loss or gradients that are not finite to skip before stopping",
        minimum=0,
    )
    parser.add_argument(
        "--bad-images",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with training images that cannot be read (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-images",
        type=probability,
        default=0.1,
        metavar="SHARE",
        help="share of the training images that --bad-images skip may skip (default: %(default)s)",
    )
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="train with the channels of a map next to each other in memory, a few percent faster "
        "on a CPU; results are the same up to rounding",
    )
    parser.add_argument(
        "--fold-norms",
        action="store_true",
        help="train with frozen batch norms folded into convolutions, a few percent faster on a "
        "CPU; results are the same up to rounding",
    )
    add_opts(parser, ", such as SOLVER.BASE_LR 0.01")
    return parser


def run_options(args: argparse.Namespace) -> RunOptions:
    """Return the options of a training run that the arguments ask for."""
    from nl_detectron.engine.options import RunOptions

    return RunOptions(
        keep_last=args.keep_last,
        keep_best=args.keep_best,
        max_nonfinite=args.max_nonfinite,
        max_bad_images=args.max_bad_images if args.bad_images == "skip" else 0.0,
        channels_last=args.channels_last,
        fold_norms=args.fold_norms,
    )


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``StrictCheckpointer`` that the arguments ask for."""
    options = {"allow_missing": args.allow_missing, "strip_blocks": args.strip_blocks}
    return {**options, "complete": args.eval_only}
