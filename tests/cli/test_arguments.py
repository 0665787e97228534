"""Arguments that commands share, and the --help of every script and command."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from nl_detectron_cli import COMMANDS
from nl_detectron_cli.arguments import training_parser
from tests.running import ROOT

SCRIPTS = [*sorted((ROOT / "tools").glob("*.py")), *sorted(ROOT.glob("projects/*/demo.py"))]


@pytest.mark.parametrize(
    ("program", "command"),
    [
        *((path.name, [path]) for path in SCRIPTS),
        *((f"nl-detectron {name}", ["-m", "nl_detectron_cli", name]) for name in COMMANDS),
    ],
)
def test_help_imports_the_standard_library_alone(program, command):
    """Without what takes seconds to import; and it shows how it was called, and the defaults."""
    command = [sys.executable, "-X", "importtime", *command, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {program} [-h]")
    imported = re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE)
    assert "argparse" in imported
    assert {"torch", "numpy", "detectron2", "nl_detectron"}.isdisjoint(imported)
    for option, default in {"--count": 8, "--num-gpus": 1, "--image-size": "800 1333"}.items():
        if f"  {option} " in done.stdout:
            (text,) = re.findall(rf"^  {option} [^-]*", done.stdout, re.MULTILINE)
            assert f"(default: {default})" in " ".join(text.split())


def test_renamed_option(capsys):
    parser = training_parser("")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--config-file", "Base-RCNN-FPN.yaml", "--may-lack", "roi_heads"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("--may-lack is now called --allow-missing\n")
    assert "--may-lack" not in parser.format_help()
