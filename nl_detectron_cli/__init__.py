"""The commands: ``nl-detectron COMMAND``. Each is a module with ``parse_args`` and ``main``.

They import only the standard library until the arguments are parsed, because importing
``nl_detectron`` takes seconds, and fails without detectron2.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

COMMANDS = {
    "train": "train or evaluate on COCO-format data",
    "ab": "train with and without non-local blocks, and compare",
    "check-data": "find what is wrong with COCO-format data",
    "overfit": "test whether a model can overfit a few images",
    "predict": "detect objects in images, videos or a webcam",
    "attention": "draw the attention of a pixel or a keypoint",
    "health": "measure what each block of a trained model does",
    "analyze": "print parameters, computation and memory of blocks",
    "convert": "convert weights from and to other libraries",
    "export": "write a model for torch.export, ONNX or TorchScript",
    "doctor": "check the installation, and print how to fix it",
}


def version() -> str:
    """Parse the version from the source, because importing the package requires detectron2."""
    init = Path(__file__).resolve().parents[1] / "nl_detectron" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"$', init.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found.group(1)


def main() -> None:
    """Run the command given by the first argument."""
    parser = argparse.ArgumentParser(
        prog="nl-detectron",
        description="Non-local neural networks for detectron2. Run COMMAND --help for details.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    parser.add_argument("--version", action="version", version=f"nl_detectron {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"{parser.prog} {command}", *sys.argv[2:]]  # argparse prints the first in the usage
    importlib.import_module(f"nl_detectron_cli.{command.replace('-', '_')}").main()
