"""The commands: ``nl-detectron COMMAND``. Each is a module with ``parse_args`` and ``main``.

Until arguments are parsed, they import the standard library alone: importing ``nl_detectron`` takes
seconds, and fails where detectron2 is missing.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

COMMANDS = {
    "train": "train or evaluate on data in COCO's format",
    "ab": "train with and without non-local blocks, and compare",
    "overfit": "train on a few images: does it learn at all?",
    "predict": "find objects in images, a video or a webcam",
    "attention": "draw where a pixel, or a person's joint, looks",
    "health": "tell what each block of a trained model does",
    "analyze": "print what blocks cost: computation and memory",
    "convert": "convert weights from and to other libraries",
    "doctor": "check what is installed, and say how to mend it",
}


def version() -> str:
    """Read the version as text: importing the package would need detectron2 and torch."""
    init = Path(__file__).resolve().parents[1] / "nl_detectron" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"$', init.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found.group(1)


def main() -> None:
    """Run the command that the first argument names."""
    parser = argparse.ArgumentParser(
        prog="nl-detectron",
        description="Non-local neural networks for detectron2. COMMAND --help tells more.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    parser.add_argument("--version", action="version", version=f"nl_detectron {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"{parser.prog} {command}", *sys.argv[2:]]  # its usage begins with the first
    importlib.import_module(f"nl_detectron_cli.{command}").main()
